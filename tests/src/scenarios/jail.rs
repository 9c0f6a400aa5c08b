//! Scenarios of jailed guests.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use super::disk::ext4_write_as;
use crate::api::expect_ok;
use crate::guest::Start;
use crate::result::{Failure, Figures};

/// The number of a user and a group that nobody else has.
const USER: u32 = 4242;

/// The layers that every host of the lab has.
const LAYERS: [&str; 9] = [
    "mount_namespace",
    "net_namespace",
    "ipc_namespace",
    "uts_namespace",
    "tree",
    "limits",
    "capabilities",
    "no_new_privs",
    "seccomp",
];

pub(super) fn expect_layers(report: &Value, more: &[&str]) -> Result<(), Failure> {
    println!("lab: jail: {report}");
    let layers = report["layers"].as_array().cloned().unwrap_or_default();
    match LAYERS
        .iter()
        .chain(more)
        .find(|layer| !layers.contains(&json!(layer)))
    {
        Some(layer) => Failure::claim(format!("there is no {layer}: {report}")),
        None => Ok(()),
    }
}

/// A guest in a jail without options writes to its disk.
pub fn own_disk(out: &Path) -> Result<Figures, Failure> {
    ext4_write_as(out, &["--jail"])
}

/// A guest whose process is a user of its own boots, shares memory and responds over REST. Its kernel is in root's
/// cache.
pub fn own_user(out: &Path) -> Result<Figures, Failure> {
    let socket = out.join("jail.sock");
    let jail = format!("uid={USER},gid={USER}");
    let name = socket.display().to_string();
    let script = "mount -t ext4 -o ro /dev/vda /mnt && echo READ $(md5sum </mnt/bin/busybox || md5sum </mnt/etc/passwd); echo OVER; read x";
    let mut guest = Start::new()
        .args(&["--disk", "guest/root.vhdx,ro", "--api-sock", &name])
        .args(&["--jail", &jail])
        .script(script)
        .spawn()?;
    guest.wait_for("OVER")?;
    guest.line("READ ")?;
    let report = expect_ok(&socket, "GET", "/vm/jail", &Value::Null)?;
    expect_layers(&report, &["credentials"])?;
    if (&report["uid"], &report["gid"]) != (&json!(USER), &json!(USER)) {
        return Failure::claim(format!("it is somebody else: {report}"));
    }
    let sharing = expect_ok(&socket, "GET", "/vm/sharing", &Value::Null)?;
    if sharing["mapped_pages"].as_u64().unwrap_or(0) == 0 {
        return Failure::claim(format!("its kernel is not shared: {sharing}"));
    }
    let smaps =
        fs::read_to_string(guest.proc().join("smaps")).map_err(Failure::io("read smaps"))?;
    fs::write(out.join("smaps"), smaps).map_err(Failure::io("write smaps"))?;
    guest.type_in("\n")?;
    guest.expect_exit(0)?;
    Ok(Figures::from([
        ("jail".into(), report),
        ("sharing".into(), sharing),
    ]))
}
