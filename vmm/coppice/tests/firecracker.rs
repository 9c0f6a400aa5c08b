//! The `coppice` binary under the name `firecracker`, as the clients of Firecracker start it.

#![allow(clippy::unwrap_used, reason = "a test may end where it fails")]

#[path = "serve/mod.rs"]
mod serve;

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use serve::daemon::{call, until};
use serve::kernel;

/// A folder with the link, a kernel, and what a test makes beside these.
struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        let folder = Self(tempfile::tempdir().unwrap());
        symlink(env!("CARGO_BIN_EXE_coppice"), folder.path("firecracker")).unwrap();
        kernel::write(&folder.path("kernel"));
        folder
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(self.path("firecracker"));
        command.args(arguments).current_dir(self.0.path());
        command
    }

    fn output(&self, arguments: &[&str]) -> Output {
        let mut command = self.command(arguments);
        command.stdin(Stdio::null()).output().unwrap()
    }

    fn start(&self, arguments: &[&str]) -> Running {
        let child = self
            .command(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(fs::File::create(self.path("stderr")).unwrap())
            .spawn()
            .unwrap();
        Running {
            child,
            socket: self.path("api.sock"),
        }
    }
}

/// A process that was started. Killed when dropped.
struct Running {
    child: Child,
    socket: PathBuf,
}

impl Running {
    fn call(&self, method: &str, path: &str, body: Option<&Value>) -> (u16, Value) {
        call(&self.socket, method, path, body).expect("an answer")
    }

    fn answers(&self) {
        until("the process answers", || {
            call(&self.socket, "GET", "/machine-config", None).is_some()
        });
    }

    /// The guest has printed that it is up.
    fn is_up(&mut self) {
        let mut line = [0; 3];
        let console = self.child.stdout.as_mut().unwrap();
        console.read_exact(&mut line).unwrap();
        assert_eq!(&line, b"up\n");
    }

    fn type_key(&mut self, key: u8) {
        let console = self.child.stdin.as_mut().unwrap();
        console.write_all(&[key]).unwrap();
    }

    fn end(&mut self) -> Option<i32> {
        self.child.wait().unwrap().code()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It has ended already in most tests.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn the_requests_of_the_go_sdk_start_and_end_a_guest() {
    let folder = Folder::new();
    fs::write(folder.path("root.raw"), vec![0; 1 << 20]).unwrap();
    let mut guest = folder.start(&["--api-sock", "api.sock", "--id", "01HXVM", "--no-seccomp"]);
    guest.answers();
    let (log, metrics) = (folder.path("log"), folder.path("metrics"));
    let drive = json!({
        "drive_id": "root", "path_on_host": folder.path("root.raw"), "is_root_device": true, "is_read_only": true,
    });
    let boot =
        json!({"kernel_image_path": folder.path("kernel"), "boot_args": "console=ttyS0 reboot=k"});
    let logger =
        json!({"log_path": log, "level": "Debug", "show_level": true, "show_log_origin": false});
    let machine =
        json!({"vcpu_count": 1, "mem_size_mib": 64, "smt": false, "track_dirty_pages": false});
    let requests = [
        ("/logger", logger),
        ("/metrics", json!({"metrics_path": metrics})),
        ("/machine-config", machine.clone()),
        ("/boot-source", boot),
        ("/drives/root", drive),
        ("/actions", json!({"action_type": "InstanceStart"})),
    ];
    for (path, body) in &requests {
        let answer = guest.call("PUT", path, Some(body));
        assert_eq!(answer.0, 204, "{path}: {answer:?}");
    }
    guest.is_up();
    let (status, info) = guest.call("GET", "/", None);
    assert_eq!(
        (status, &info["id"], &info["state"]),
        (200, &json!("01HXVM"), &json!("Running"))
    );
    let (_, now) = guest.call("GET", "/machine-config", None);
    assert_eq!(now["mem_size_mib"], machine["mem_size_mib"]);
    // `Machine.Shutdown` of the SDK.
    let press = json!({"action_type": "SendCtrlAltDel"});
    assert_eq!(guest.call("PUT", "/actions", Some(&press)).0, 204);
    assert_eq!(guest.end(), Some(0));
    assert!(!guest.socket.exists());
    assert!(
        fs::read_to_string(&log)
            .unwrap()
            .contains("REST request done")
    );
    assert_eq!(fs::read_to_string(&metrics).unwrap().lines().count(), 1);
}

#[test]
fn a_configuration_file_starts_a_guest_without_an_api_and_each_end_is_a_success() {
    let folder = Folder::new();
    let config = json!({
        "boot-source": {"kernel_image_path": folder.path("kernel")},
        "machine-config": {"vcpu_count": 1, "mem_size_mib": 64},
    });
    fs::write(folder.path("vm.json"), config.to_string()).unwrap();
    for key in [b'q', b'r', b't', b'p'] {
        let log = format!("log-{key}");
        let mut guest = folder.start(&[
            "--no-api",
            "--config-file",
            "vm.json",
            "--log-path",
            &log,
            "--show-level",
            "--boot-timer",
            "--metrics-path",
            "metrics",
        ]);
        guest.is_up();
        guest.type_key(key);
        assert_eq!(guest.end(), Some(0), "{}", char::from(key));
        let log = fs::read_to_string(folder.path(&log)).unwrap();
        assert!(log.contains("INFO") && log.contains("ending"), "{log}");
        assert!(!guest.socket.exists());
    }
    let metrics = fs::read_to_string(folder.path("metrics")).unwrap();
    assert_eq!(metrics.lines().count(), 4);
    // With an API, the guest is started just so.
    let mut guest = folder.start(&["--api-sock", "api.sock", "--config-file", "vm.json"]);
    guest.is_up();
    guest.answers();
    guest.type_key(b'q');
    assert_eq!(guest.end(), Some(0));
}

#[test]
fn the_limits_of_bodies_and_metadata_are_those_of_the_command_line() {
    let folder = Folder::new();
    let guest = folder.start(&[
        "--api-sock",
        "api.sock",
        "--http-api-max-payload-size",
        "2000",
        "--mmds-size-limit",
        "20",
    ]);
    guest.answers();
    let of = |len| json!({"a": "x".repeat(len)});
    for (len, status) in [(1, 204), (20, 400), (1900, 400), (2000, 413)] {
        assert_eq!(
            guest.call("PUT", "/mmds", Some(&of(len))).0,
            status,
            "{len}"
        );
    }
    assert_eq!(guest.call("GET", "/mmds", None), (200, of(1)));
    drop(guest);
    let guest = folder.start(&[
        "--api-sock",
        "api.sock",
        "--http-api-max-payload-size",
        "99999",
    ]);
    guest.answers();
    assert_eq!(guest.call("PUT", "/mmds", Some(&of(90_000))).0, 204);
    assert_eq!(guest.call("GET", "/mmds", None), (200, of(90_000)));
}

#[test]
fn exit_codes_and_versions_are_as_clients_read_them() {
    let folder = Folder::new();
    let config = json!({"boot-source": {"kernel_image_path": folder.path("missing")}});
    fs::write(folder.path("vm.json"), config.to_string()).unwrap();
    fs::write(folder.path("metadata"), "[]").unwrap();
    let mut state = b"COPPSNAP\x07\0\0\0".to_vec();
    state.resize(24, 0);
    fs::write(folder.path("state"), state).unwrap();
    for (arguments, code, said) in [
        (&["--version"][..], 0, "Firecracker v1.17.0\n"),
        (&["--snapshot-version"], 0, "v1.0.0\n"),
        (&["--describe-snapshot", "state"], 0, "v7.0.0\n"),
        (
            &["--describe-snapshot", "vm.json"],
            1,
            "vm.json is not the state of a snapshot",
        ),
        (&["--help"], 0, "--http-api-max-payload-size"),
        (&["--colour"], 153, "--colour"),
        (&["--no-api"], 153, "--config-file"),
        (&["--enable-pci"], 153, "no PCI"),
        (&["--seccomp-filter", "f"], 153, "--no-seccomp"),
        (&["--level", "loud"], 152, "loud"),
        (&["--no-api", "--config-file", "vm.json"], 1, "missing"),
        (&["--no-api", "--config-file", "none.json"], 1, "none.json"),
        (
            &["--api-sock", "a", "--metadata", "metadata"],
            1,
            "--metadata metadata",
        ),
        (&["--api-sock", "a", "--log-path", "no/log"], 1, "no/log"),
        (&["--api-sock", "vm.json"], 1, "not a socket"),
    ] {
        let output = folder.output(arguments);
        let (out, err) = (
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr),
        );
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {err}");
        let found = if code == 0 { &out } else { &err };
        assert!(found.contains(said), "{arguments:?}: {found}");
        assert_eq!(code == 0, err.is_empty(), "{arguments:?}: {err}");
    }
    for (signal, code) in [(Signal::HUP, 156), (Signal::TERM, 143), (Signal::INT, 130)] {
        let mut guest = folder.start(&["--api-sock", "api.sock"]);
        guest.answers();
        kill_process(Pid::from_child(&guest.child), signal).unwrap();
        assert_eq!(guest.end(), Some(code));
    }
}
