//! Scenarios of the REST socket.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};

use crate::api::{expect_ok, request, request_text};
use crate::guest::{Guest, Start, script_word};
use crate::result::{Failure, Figures};

const TICKS: &str = "i=0; while true; do i=$((i+1)); echo TICK $i; usleep 50000; done";

fn socket(name: &str) -> PathBuf {
    PathBuf::from(format!("/tmp/{name}.sock"))
}

fn ticks(guest: &Guest) -> usize {
    guest.console().matches("TICK").count()
}

/// The number of ticks, once all that the guest has written before its pause has been read, or after some time.
fn final_ticks(guest: &Guest) -> usize {
    let mut before = ticks(guest);
    for _ in 0..20 {
        std::thread::sleep(Duration::from_millis(500));
        let now = ticks(guest);
        if now == before {
            break;
        }
        before = now;
    }
    before
}

/// Waits until the REST socket responds.
fn wait_for_api(socket: &Path) -> Result<Value, Failure> {
    for _ in 0..500 {
        if let Ok((200, info)) = request(socket, "GET", "/", &Value::Null) {
            return Ok(info);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Failure::claim("the REST socket does not answer")
}

fn stop(guest: &mut Guest) -> Result<(), Failure> {
    guest.signal(rustix::process::Signal::TERM)?;
    guest.expect_exit(128 + 15)
}

/// A paused guest prints nothing, and a resumed one goes on where it was.
pub fn pause_and_resume(_: &Path) -> Result<Figures, Failure> {
    let socket = socket("pause");
    let args = [
        "--api-sock",
        &socket.to_string_lossy(),
        "--cpus",
        "2",
        "--disk",
        "guest/root.vhdx,ro",
    ];
    let mut guest = Start::new().args(&args).script(TICKS).spawn()?;
    guest.wait_for("TICK 5")?;
    for _ in 0..3 {
        expect_ok(&socket, "PATCH", "/vm", &json!({"state": "Paused"}))?;
        let info = expect_ok(&socket, "GET", "/", &Value::Null)?;
        if info["state"] != "Paused" {
            return Failure::claim(format!("a paused guest is {}", info["state"]));
        }
        let before = final_ticks(&guest);
        std::thread::sleep(Duration::from_secs(1));
        if ticks(&guest) != before {
            return Failure::claim("a paused guest went on");
        }
        expect_ok(&socket, "PATCH", "/vm", &json!({"state": "Resumed"}))?;
        guest.wait_for(&format!("TICK {}", before + 3))?;
    }
    stop(&mut guest)?;
    if socket.exists() {
        Failure::claim("the socket is left behind")
    } else {
        Ok(Figures::new())
    }
}

/// A guest is configured and started over REST, with only the socket on the command line.
pub fn started_over_rest(_: &Path) -> Result<Figures, Failure> {
    let socket = socket("rest");
    let mut guest = Start::bare(&["--api-sock", &socket.to_string_lossy()]).spawn()?;
    let info = wait_for_api(&socket)?;
    if info["state"] != "Not started" {
        return Failure::claim(format!("before its start a guest is {}", info["state"]));
    }
    let boot_args = format!(
        "console=ttyS0 reboot=k panic=-1 quiet {}",
        script_word("echo CPUS $(nproc); mount -o ro /dev/vda /mnt && echo MOUNTED; read x")
    );
    let puts = [
        (
            "/machine-config",
            json!({"vcpu_count": 2, "mem_size_mib": 160}),
        ),
        (
            "/boot-source",
            json!({"kernel_image_path": "guest/vmlinuz", "initrd_path": "guest/initrd.cpio.gz", "boot_args": boot_args}),
        ),
        (
            "/drives/base",
            json!({"drive_id": "base", "path_on_host": "guest/root.vhdx", "is_root_device": false, "is_read_only": true}),
        ),
        ("/entropy", json!({})),
        ("/actions", json!({"action_type": "InstanceStart"})),
    ];
    for (path, body) in puts {
        expect_ok(&socket, "PUT", path, &body)?;
    }
    let (late, _) = request(
        &socket,
        "PUT",
        "/machine-config",
        &json!({"vcpu_count": 1, "mem_size_mib": 128}),
    )?;
    if late != 400 {
        return Failure::claim(format!("a change after the start is answered {late}"));
    }
    guest.wait_for("MOUNTED")?;
    if guest.line("CPUS ")? != "2" {
        return Failure::claim("the guest has another number of CPUs");
    }
    let seconds = boot_time(&socket)?;
    guest.type_in("\n")?;
    guest.expect_exit(0)?;
    Ok(Figures::from([(
        "boot_time_seconds".into(),
        json!(seconds),
    )]))
}

/// How long the guest took from its start to its first process, which has written to the boot timer.
fn boot_time(socket: &Path) -> Result<f64, Failure> {
    let (status, metrics) = request_text(socket, "GET", "/metrics", &Value::Null)?;
    let mut lines = metrics.lines();
    let line = lines.find_map(|line| line.strip_prefix("coppice_boot_time_seconds "));
    match line.and_then(|seconds| seconds.parse().ok()) {
        Some(seconds) if seconds > 0.0 => Ok(seconds),
        Some(_) | None => Failure::claim(format!("no boot time: {status} {metrics}")),
    }
}

/// The guest's keyboard driver gets Ctrl-Alt-Del.
pub fn ctrl_alt_del(_: &Path) -> Result<Figures, Failure> {
    let socket = socket("keys");
    let script = "echo READY; while true; do sleep 1; done";
    let mut guest = Start::new()
        .args(&["--api-sock", &socket.to_string_lossy()])
        .script(script)
        .spawn()?;
    guest.wait_for("READY")?;
    expect_ok(
        &socket,
        "PUT",
        "/actions",
        &json!({"action_type": "SendCtrlAltDel"}),
    )?;
    // By default, the kernel resets at Ctrl-Alt-Del, unless an init process has requested a signal instead.
    guest.expect_exit(10)?;
    Ok(Figures::new())
}
