//! Scenarios of vsock: a Linux guest and its host connect to each other, and clones read their metadata.

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::serve::Daemon;
use crate::api::expect_ok;
use crate::guest::{Guest, Start};
use crate::result::{Failure, Figures};
use crate::socket;

const PATIENCE: Duration = Duration::from_mins(1);
/// How much is sent in each direction.
const MIB: u32 = 8;
const BYTES: u64 = (MIB as u64) << 20;
/// The guest copies the lab's own program from its disk, and then executes the lines that are typed on its console.
const SCRIPT: &str = "cat /dev/vda >/tmp/lab; chmod +x /tmp/lab; echo READY; while read line; do eval \"$line\"; done";

/// Makes a disk with the lab's program on it, in whole sectors.
fn program(out: &Path) -> Result<PathBuf, Failure> {
    let mut bytes = fs::read("lab").map_err(Failure::io("read the lab's program"))?;
    bytes.resize(bytes.len().next_multiple_of(4096), 0);
    let path = out.join("lab.raw");
    fs::write(&path, bytes).map_err(Failure::io("write the lab's program"))?;
    Ok(path)
}

fn timed(stream: UnixStream) -> Result<UnixStream, Failure> {
    let failed = || Failure::io("set a limit");
    stream.set_read_timeout(Some(PATIENCE)).map_err(failed())?;
    stream.set_write_timeout(Some(PATIENCE)).map_err(failed())?;
    Ok(stream)
}

fn expect(what: &str, found: &str, expected: &str) -> Result<(), Failure> {
    if found == expected {
        return Ok(());
    }
    Failure::claim(format!("{what}: {found:?}, not {expected:?}"))
}

/// Sends data from the host to a port of the guest, and checks the guest's response.
fn to_guest(uds: &Path, port: u32) -> Result<Duration, Failure> {
    let failed = || Failure::io("talk to the guest");
    let mut stream = timed(UnixStream::connect(uds).map_err(failed())?)?;
    writeln!(stream, "CONNECT {port}").map_err(failed())?;
    let mut line = Vec::new();
    while !line.ends_with(b"\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte).map_err(failed())?;
        line.extend(byte);
    }
    if !line.starts_with(b"OK ") {
        return Failure::claim(format!("CONNECT is answered {line:?}"));
    }
    let begun = Instant::now();
    socket::send(&stream, BYTES).map_err(failed())?;
    stream.shutdown(Shutdown::Write).map_err(failed())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).map_err(failed())?;
    let sum = socket::sum_of(BYTES).map_err(failed())?;
    expect("the guest has got", &answer, &sum)?;
    Ok(begun.elapsed())
}

/// Listens at the socket that a guest's connection to a port of the host leads to.
fn listen(uds: &Path, port: u32) -> Result<UnixListener, Failure> {
    let path = format!("{}_{port}", uds.display());
    UnixListener::bind(&path).map_err(Failure::io(path))
}

/// Accepts a connection, with a time limit, because a guest that is refused never connects.
fn accept(listener: &UnixListener) -> Result<UnixStream, Failure> {
    let failed = || Failure::io("wait for the guest");
    listener.set_nonblocking(true).map_err(failed())?;
    let begun = Instant::now();
    while begun.elapsed() < PATIENCE {
        match listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false).map_err(failed())?;
                return Ok(stream);
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                std::thread::sleep(Duration::from_millis(20));
            }
            Err(error) => return Err(failed()(error)),
        }
    }
    Failure::claim("the guest has not connected")
}

/// Has the guest send data to a program of the host, which responds.
fn to_host(guest: &mut Guest, listener: &UnixListener, port: u32) -> Result<Duration, Failure> {
    let failed = || Failure::io("talk to the guest");
    guest.type_in(&format!("/tmp/lab socket send {port} {BYTES}\n"))?;
    let mut stream = timed(accept(listener)?)?;
    let begun = Instant::now();
    let sum = socket::sum(&mut stream).map_err(failed())?;
    let took = begun.elapsed();
    stream.write_all(sum.as_bytes()).map_err(failed())?;
    drop(stream);
    let expected = socket::sum_of(BYTES).map_err(failed())?;
    expect("the host has got", &sum, &expected)?;
    guest.wait_from_now(&format!("SENT {expected}."))?;
    Ok(took)
}

fn mib_per_second(took: Duration) -> Value {
    json!(f64::from(MIB) / took.as_secs_f64())
}

/// A jailed guest transfers much data both ways, has connections refused, and reads its metadata. Then it is saved, and
/// loaded with another CID.
pub fn talks(out: &Path) -> Result<Figures, Failure> {
    let disk = format!("{},ro,format=raw", program(out)?.display());
    // Paths of sockets have to be short.
    let (uds, api) = (Path::new("/tmp/v/v.sock"), Path::new("/tmp/v/api.sock"));
    fs::create_dir_all("/tmp/v").map_err(Failure::io("make a folder"))?;
    // The sockets that exist at the start are in the jail.
    let (listener, _held) = (listen(uds, 2000)?, listen(uds, 5000)?);
    let here = std::env::current_dir().map_err(Failure::io("find the folder"))?;
    let jail = format!("allow={}", here.join(out).display());
    let vsock = format!("42,path={}", uds.display());
    let metadata = out.join("metadata.json");
    fs::write(&metadata, r#"{"name": "first"}"#).map_err(Failure::io("write metadata"))?;
    let mut guest = Start::new()
        .args(&["--disk", &disk, "--vsock", &vsock, "--jail", &jail])
        .args(&["--metadata", &metadata.display().to_string()])
        .args(&["--api-sock", &api.display().to_string()])
        .script(SCRIPT)
        .spawn()?;
    guest.wait_for("READY")?;
    let tell = |guest: &mut Guest, line: &str, text: &str| -> Result<(), Failure> {
        guest.type_in(&format!("/tmp/lab socket {line}\n"))?;
        guest.wait_from_now(text).map(drop)
    };
    tell(&mut guest, "cid", "CID 42.")?;
    tell(&mut guest, "sink 1000 &", "LISTENS at 1000.")?;
    let mut figures = Figures::new();
    let took = to_guest(uds, 1000)?;
    figures.insert("to_guest_mib_per_second".into(), mib_per_second(took));
    let took = to_host(&mut guest, &listener, 2000)?;
    figures.insert("to_host_mib_per_second".into(), mib_per_second(took));
    tell(&mut guest, "send 3000 1 2>&1 || echo NOB''ODY", "NOBODY")?;
    let mut refused = timed(UnixStream::connect(uds).map_err(Failure::io("connect"))?)?;
    writeln!(refused, "CONNECT 4000").map_err(Failure::io("connect"))?;
    if refused.read(&mut [0]).map_err(Failure::io("connect"))? != 0 {
        return Failure::claim("the guest is connected to where nobody listens");
    }
    tell(&mut guest, "get /name", "first")?;
    let changed = json!({"name": "second"});
    expect_ok(api, "PATCH", "/mmds", &changed)?;
    tell(&mut guest, "get /name", "second")?;

    // The guest is saved with an open connection, which the next process does not have.
    tell(&mut guest, "hold 5000 &", "HOLDS 5000.")?;
    expect_ok(api, "PATCH", "/vm", &json!({"state": "Paused"}))?;
    let (state, memory) = (here.join(out).join("state"), here.join(out).join("memory"));
    let body = json!({"snapshot_path": state, "mem_file_path": memory});
    expect_ok(api, "PUT", "/snapshot/create", &body)?;
    let restore = format!("{},vsock=/tmp/w.sock,cid=43", state.display());
    fs::write(&metadata, r#"{"name": "third"}"#).map_err(Failure::io("write metadata"))?;
    let metadata = metadata.display().to_string();
    let mut other = Start::bare(&["--restore", &restore, "--metadata", &metadata]).spawn()?;
    // The guest gets ECONNRESET, or ENOTCONN where it had not begun to wait.
    other.wait_for("HELD Err(")?;
    tell(&mut other, "cid", "CID 43.")?;
    tell(&mut other, "get /name", "third")?;
    tell(&mut other, "sink 1001 &", "LISTENS at 1001.")?;
    to_guest(Path::new("/tmp/w.sock"), 1001)?;
    let listener = listen(Path::new("/tmp/w.sock"), 2001)?;
    to_host(&mut other, &listener, 2001)?;
    // The first guest goes on unchanged.
    expect_ok(api, "PATCH", "/vm", &json!({"state": "Resumed"}))?;
    let ask = "echo ST''ILL $(/tmp/lab socket cid) $(/tmp/lab socket get /name)\n";
    guest.type_in(ask)?;
    guest.wait_from_now("STILL CID 42. second")?;
    fs::remove_file(&memory).map_err(Failure::io("remove"))?;
    Ok(figures)
}

/// Clones of the daemon read their names from the metadata.
pub fn clones(out: &Path) -> Result<Figures, Failure> {
    let daemon = Daemon::start(out, &["--memory-ratio", "4"])?;
    let disk = program(out)?;
    let here = std::env::current_dir().map_err(Failure::io("find the folder"))?;
    let more = json!({
        "vsock": {},
        "drives": [{"drive_id": "lab", "path_on_host": here.join(disk), "format": "raw",
                    "is_read_only": true, "is_root_device": false}],
    });
    daemon.boot_with("source", SCRIPT, &more)?;
    let ask = "hostname $(/tmp/lab socket get /coppice/hostname); /tmp/lab socket cid; echo NA''MED $(hostname).";
    daemon.console("source", ask, "NAMED source.")?;
    daemon.template("t", "source")?;
    let mut cids = Vec::new();
    for id in ["one", "two"] {
        daemon.clone_of("t", id)?;
        daemon.console(id, ask, &format!("NAMED {id}."))?;
        let status = daemon.expect(200, "GET", &format!("/vms/{id}"), &Value::Null)?;
        let cid = status["vsock"]["guest_cid"].as_u64().unwrap_or(0);
        daemon.console(id, "/tmp/lab socket cid", &format!("CID {cid}."))?;
        cids.push(cid);
    }
    match cids[..] {
        [one, two] if one > 3 && two > 3 && one != two => Ok(Figures::new()),
        _ => Failure::claim(format!("the clones have the identifiers {cids:?}")),
    }
}
