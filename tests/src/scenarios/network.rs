//! Scenarios of network interfaces: a Linux guest gets its address by DHCP, and talks to the host over a tap, also when
//! it goes on from a snapshot.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use serde_json::{Value, json};

use crate::api::expect_ok;
use crate::guest::{Guest, Start};
use crate::programs::command;
use crate::result::{Failure, Figures};

/// MiB that are moved each way.
const MIB: u32 = 4;
/// What udhcpc(8) runs with what it was given.
pub(super) const LEASED: &str = "echo '#!/bin/sh
[ \"$1\" = bound ] || exit 0
ip addr add $ip/$mask dev $interface
ip route add default via $router
echo LEASE $ip/$mask $router $dns $hostname $mtu END' >/tmp/leased; chmod +x /tmp/leased; ";
/// The guest asks for its address, serves a file, and then executes the lines that are typed on its console.
const SCRIPT: &str = "ip link set lo up; ip link set eth0 up; \
    udhcpc -n -q -i eth0 -O mtu -O hostname -s /tmp/leased </dev/null 2>&1; \
    mkdir /tmp/www; dd if=/dev/urandom of=/tmp/www/file bs=1M count=4 2>/dev/null; httpd -h /tmp/www; \
    echo SUM $(md5sum </tmp/www/file) END; echo READY; while read line; do eval \"$line\"; done";

/// Runs a program of the lab's host.
pub(super) fn host(line: &str) -> Result<(), Failure> {
    let mut words = line.split_whitespace();
    let program = words.next().unwrap_or_default();
    command(Command::new(program).args(words))
}

/// A tap of the host with this address, and a server of files behind it.
struct Tap(&'static str);

impl Tap {
    fn make(name: &'static str, address: &str) -> Result<Self, Failure> {
        host(&format!("tunctl -t {name}"))?;
        let tap = Self(name);
        host(&format!("ip addr add {address} dev {name}"))?;
        host(&format!("ip link set {name} up"))?;
        Ok(tap)
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        // The host is about to end.
        let _ = host(&format!("tunctl -d {}", self.0));
    }
}

fn sum(path: &Path) -> Result<String, Failure> {
    let output = Command::new("md5sum").arg(path).output();
    let output = output.map_err(Failure::io("run md5sum"))?;
    let text = String::from_utf8_lossy(&output.stdout);
    Ok(text
        .split_whitespace()
        .next()
        .unwrap_or_default()
        .to_owned())
}

/// The guest fetches a file of the host; gives MiB a second.
fn download(guest: &mut Guest, expected: &str, run: u32) -> Result<f64, Failure> {
    let begun = Instant::now();
    let line = format!("echo GOT{run} $(wget -q -O - http://10.9.0.1:8080/file | md5sum) END\n");
    guest.type_in(&line)?;
    guest.wait_from_now(&format!("GOT{run} {expected}"))?;
    Ok(f64::from(MIB) / begun.elapsed().as_secs_f64())
}

/// The host fetches a file of the guest; gives MiB a second.
fn upload(expected: &str, to: &Path) -> Result<f64, Failure> {
    let begun = Instant::now();
    let to_text = to.display().to_string();
    command(Command::new("wget").args(["-q", "-O", &to_text, "http://10.9.0.2/file"]))?;
    let took = begun.elapsed();
    if sum(to)? != expected {
        return Failure::claim("the file that the host fetched is another");
    }
    Ok(f64::from(MIB) / took.as_secs_f64())
}

fn serve_files(out: &Path) -> Result<String, Failure> {
    let www = out.join("www");
    fs::create_dir_all(&www).map_err(Failure::io("make a folder"))?;
    let file = www.join("file");
    host(&format!(
        "dd if=/dev/urandom of={} bs=1M count={MIB}",
        file.display()
    ))?;
    let www = www.display().to_string();
    command(Command::new("httpd").args(["-p", "8080", "-h", &www]))?;
    sum(&file)
}

/// A jailed guest gets its address and its metadata from its own process, moves files both ways, is saved amid a
/// download, and goes on with another tap, while a frame of a network that it does not know is no matter to it.
pub fn talks(out: &Path) -> Result<Figures, Failure> {
    let mut figures = Figures::new();
    let expected = serve_files(out)?;
    let first = Tap::make("tap0", "10.9.0.1/24")?;
    let api = Path::new("/tmp/net.sock");
    let here = std::env::current_dir().map_err(Failure::io("find the folder"))?;
    let jail = format!("allow={}", here.join(out).display());
    let config = json!({
        "network-interfaces": [{
            "iface_id": "eth0", "host_dev_name": "tap0", "mtu": 1400,
            "lease": {
                "ipv4": "10.9.0.2/24", "gateway": "10.9.0.1", "ipv6": "fd00:0:0:9::/64",
                "dns": ["9.9.9.9"], "host_name": "web-1",
            },
        }],
        "mmds-config": {"network_interfaces": ["eth0"]},
    });
    let (file, metadata) = (out.join("vm.json"), out.join("metadata.json"));
    fs::write(&file, config.to_string()).map_err(Failure::io("write the configuration"))?;
    fs::write(&metadata, r#"{"name": "told"}"#).map_err(Failure::io("write metadata"))?;
    let mut guest = Start::new()
        .args(&["--config", &file.display().to_string(), "--jail", &jail])
        .args(&["--metadata", &metadata.display().to_string()])
        .args(&["--api-sock", &api.display().to_string()])
        .script(&format!("{LEASED}{SCRIPT}"))
        .spawn()?;
    guest.wait_for("LEASE 10.9.0.2/24 10.9.0.1 9.9.9.9 web-1 1400 END")?;
    guest.wait_for("READY")?;
    let served = guest.line("SUM ")?;
    let served = served
        .split_whitespace()
        .next()
        .unwrap_or_default()
        .to_owned();
    host("ping -c 2 -W 10 10.9.0.2")?;
    guest
        .type_in("ping -c 2 -W 10 10.9.0.1 >/dev/null && echo PI''NGED; ip addr show dev eth0\n")?;
    guest.wait_from_now("PINGED")?;
    guest.wait_from_now("inet6 fd00::9:")?;
    guest.wait_from_now("mtu 1400")?;
    for run in 0..6 {
        guest.type_in(&format!(
            "echo N{run} $(wget -q -O - http://169.254.169.254/name) END\n"
        ))?;
        guest.wait_from_now(&format!("N{run} told END"))?;
    }
    figures.insert(
        "to_guest_mib_per_second".into(),
        json!(download(&mut guest, &expected, 1)?),
    );
    figures.insert(
        "to_host_mib_per_second".into(),
        json!(upload(&served, &out.join("got"))?),
    );

    // Limits that are changed while it runs: 4 MiB at 8 MiB a second, less what the bucket has.
    let limit = json!({"bandwidth": {"size": 1 << 20, "refill_time": 125}});
    let body = json!({"iface_id": "eth0", "rx_rate_limiter": limit});
    expect_ok(api, "PATCH", "/network-interfaces/eth0", &body)?;
    figures.insert(
        "limited_to_8_mib_per_second".into(),
        json!(download(&mut guest, &expected, 2)?),
    );
    let none = json!({"bandwidth": {"size": 0, "refill_time": 0}});
    let body = json!({"iface_id": "eth0", "rx_rate_limiter": none});
    expect_ok(api, "PATCH", "/network-interfaces/eth0", &body)?;

    // It is saved while frames come.
    guest.type_in("wget -q -O - http://10.9.0.1:8080/file >/dev/null 2>&1 &\n")?;
    expect_ok(api, "PATCH", "/vm", &json!({"state": "Paused"}))?;
    let (state, memory) = (here.join(out).join("state"), here.join(out).join("memory"));
    let body = json!({"snapshot_path": state, "mem_file_path": memory});
    expect_ok(api, "PUT", "/snapshot/create", &body)?;
    expect_ok(api, "PATCH", "/vm", &json!({"state": "Resumed"}))?;
    download(&mut guest, &expected, 3)?;
    let config = expect_ok(api, "GET", "/vm/config", &Value::Null)?;
    println!("lab: {}", config["network-interfaces"]);
    drop(guest);
    drop(first);

    let second = Tap::make("tap1", "10.9.0.1/24")?;
    let restore = format!("{},tap.eth0=tap1", state.display());
    let jail = format!("allow={}", here.join(out).display());
    let mut other =
        Start::bare(&["--restore", &restore, "--jail", &jail, "--log", "info"]).spawn()?;
    download(&mut other, &expected, 4)?;
    upload(&served, &out.join("got"))?;
    other.type_in("kill %1; poweroff -f\n")?;
    other.expect_exit(0)?;
    drop(second);
    fs::remove_file(&memory).map_err(Failure::io("remove"))?;
    fs::remove_file(out.join("got")).map_err(Failure::io("remove"))?;
    fs::remove_dir_all(out.join("www")).map_err(Failure::io("remove"))?;
    Ok(figures)
}
