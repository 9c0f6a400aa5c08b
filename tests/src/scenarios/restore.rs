//! Measures how long a saved guest takes to run again, with Coppice and a peer.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::bench::median;
use super::boot::unpacked;
use crate::api::{expect_ok, request};
use crate::guest::{Guest, Start};
use crate::result::{Failure, Figures};

/// How often each guest is loaded, in turns.
const LOADS: usize = 5;
/// RAM in MiB, and how often the disk of 64 MiB is copied to it.
const SIZES: [(u32, u32); 2] = [(128, 0), (640, 4)];
const DISK: &str = "guest/root.raw";
/// The prompt of QEMU's monitor.
const PROMPT: &str = "(qemu) ";

/// A script that fills memory, and then prints lines in a loop.
fn script(fill: u32) -> String {
    format!(
        "for i in $(seq {fill}); do cat /dev/vda >/tmp/fill$i; done; echo READY; while true; do echo TICK; sleep 0.02; done"
    )
}

/// QEMU's monitor, in which a command is complete when the next prompt appears.
struct Monitor(BufReader<UnixStream>);

impl Monitor {
    fn connect(path: &Path) -> Result<Self, Failure> {
        let stream = UnixStream::connect(path).map_err(Failure::io("connect to the monitor"))?;
        let timeout = stream.set_read_timeout(Some(Duration::from_mins(2)));
        timeout.map_err(Failure::io("set a timeout"))?;
        let mut monitor = Self(BufReader::new(stream));
        monitor.read_reply()?;
        Ok(monitor)
    }

    fn read_reply(&mut self) -> Result<String, Failure> {
        let mut reply = Vec::new();
        while !reply.ends_with(PROMPT.as_bytes()) {
            let more = self.0.fill_buf().map_err(Failure::io("read the monitor"))?;
            if more.is_empty() {
                return Failure::claim("the peer's monitor has closed");
            }
            let len = more.len();
            reply.extend_from_slice(more);
            self.0.consume(len);
        }
        Ok(String::from_utf8_lossy(&reply).into_owned())
    }

    fn execute(&mut self, command: &str) -> Result<String, Failure> {
        let written = writeln!(self.0.get_mut(), "{command}");
        written.map_err(Failure::io("write to the monitor"))?;
        self.read_reply()
    }
}

fn save(out: &Path, mib: u32, fill: u32) -> Result<(), Failure> {
    let socket = out.join(format!("{mib}.sock"));
    let guest = Start::new()
        .args(&[
            "--mem",
            &format!("{mib}M"),
            "--disk",
            &format!("{DISK},ro,format=raw"),
        ])
        .args(&["--api-sock", &socket.display().to_string()])
        .script(&script(fill))
        .spawn()?;
    guest.wait_for("TICK")?;
    expect_ok(&socket, "PATCH", "/vm", &json!({"state": "Paused"}))?;
    let (state, memory) = (
        out.join(format!("{mib}.state")),
        out.join(format!("{mib}.memory")),
    );
    let files = json!({"snapshot_path": state, "mem_file_path": memory});
    expect_ok(&socket, "PUT", "/snapshot/create", &files)?;
    Ok(())
}

fn peer(mib: u32) -> Result<Start, Failure> {
    Ok(Start::peer(&unpacked()?, &format!("{DISK},format=raw")).args(&["-m", &mib.to_string()]))
}

fn save_peer(out: &Path, mib: u32, fill: u32) -> Result<(), Failure> {
    let socket = out.join(format!("peer-{mib}.sock"));
    let monitor = format!("unix:{},server=on,wait=off", socket.display());
    let guest = peer(mib)?
        .args(&["-monitor", &monitor])
        .script(&script(fill))
        .spawn()?;
    guest.wait_for("TICK")?;
    let mut monitor = Monitor::connect(&socket)?;
    // The guest is not stopped before it is saved, because a stopped one would wait for a command after its load.
    let file = out.join(format!("{mib}.peer"));
    let reply = monitor.execute(&format!("migrate \"exec:cat >{}\"", file.display()))?;
    let status = monitor.execute("info migrate")?;
    if status.contains("completed") {
        Ok(())
    } else {
        Failure::claim(format!("the peer is not saved: {reply} {status}"))
    }
}

/// The time from the start of a process to the first line of the guest.
fn seconds(start: Start) -> Result<f64, Failure> {
    let guest: Guest = start.spawn()?;
    Ok(guest.wait_for("TICK")?.as_secs_f64())
}

/// The time of a load over REST by a process that waits for it: from the request to the response.
fn request_seconds(out: &Path, mib: u32) -> Result<f64, Failure> {
    let socket = out.join("waiting.sock");
    let guest = Start::bare(&["--api-sock", &socket.display().to_string()]).spawn()?;
    let begun = Instant::now();
    while request(&socket, "GET", "/", &Value::Null).is_err() {
        if begun.elapsed() > Duration::from_secs(20) {
            return Failure::claim("the REST socket does not answer");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    let asked = Instant::now();
    let body = json!({"snapshot_path": out.join(format!("{mib}.state")), "resume_vm": true, "verify_memory": false});
    expect_ok(&socket, "PUT", "/snapshot/load", &body)?;
    let answered = asked.elapsed().as_secs_f64();
    guest.wait_for("TICK")?;
    drop(guest);
    fs::remove_file(&socket).map_err(Failure::io("remove a socket"))?;
    Ok(answered)
}

/// Loads guests of two sizes by Coppice and by QEMU.
pub fn bench(out: &Path) -> Result<Figures, Failure> {
    let mut figures = Figures::new();
    for (mib, fill) in SIZES {
        save(out, mib, fill)?;
        save_peer(out, mib, fill)?;
        let (mut own, mut asked, mut peers) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..LOADS {
            let state = out.join(format!("{mib}.state")).display().to_string();
            own.push(seconds(Start::bare(&[
                "--restore",
                &format!("{state},trust"),
            ]))?);
            asked.push(request_seconds(out, mib)?);
            let incoming = format!("exec:cat {}", out.join(format!("{mib}.peer")).display());
            peers.push(seconds(peer(mib)?.args(&["-incoming", &incoming]))?);
        }
        println!(
            "lab: {mib} MiB: run --restore {own:.2?} s, load {asked:.3?} s, QEMU -incoming {peers:.2?} s"
        );
        for (name, values) in [("restore", own), ("request", asked), ("peer", peers)] {
            figures.insert(format!("{name}_{mib}_mib_seconds"), json!(median(values)));
        }
        for kind in ["memory", "peer", "state"] {
            let file = out.join(format!("{mib}.{kind}"));
            fs::remove_file(file).map_err(Failure::io("remove a snapshot"))?;
        }
    }
    Ok(figures)
}
