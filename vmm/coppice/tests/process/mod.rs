//! `coppice` as a process of its own, and a terminal for it.

use std::ffi::CString;
use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use rustix::fs::{Mode, OFlags};
use rustix::process::{Pid, Signal, kill_process};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use serde_json::Value;

/// The binary under test.
pub fn command() -> Command {
    Command::new(env!("CARGO_BIN_EXE_coppice"))
}

/// A process that waits on its socket to be configured. Killed when dropped.
pub struct Coppice {
    child: Child,
    socket: PathBuf,
    folder: tempfile::TempDir,
}

impl Coppice {
    /// A process without a terminal.
    pub fn waiting() -> Self {
        Self::start(command().stdin(Stdio::null()).stderr(Stdio::null()))
    }

    /// A process on a terminal.
    pub fn waiting_on(terminal: &Terminal) -> Self {
        Self::start(&mut terminal.command())
    }

    fn start(command: &mut Command) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("api.sock");
        let mut child = command
            .args(["run", "--api-sock"])
            .arg(&socket)
            .spawn()
            .unwrap();
        answer(&mut child, &socket);
        Self {
            child,
            socket,
            folder,
        }
    }

    /// Starts anew on the same socket after the process was killed.
    pub fn restart(&mut self) {
        self.child.wait().unwrap();
        let mut command = command();
        command.stdin(Stdio::null()).stderr(Stdio::null());
        self.child = command
            .args(["run", "--api-sock"])
            .arg(&self.socket)
            .spawn()
            .unwrap();
        answer(&mut self.child, &self.socket);
    }

    /// Where it listens.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Its number.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// A folder for files.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// Waits for its end; the exit code.
    pub fn wait(mut self) -> i32 {
        self.child.wait().unwrap().code().unwrap()
    }

    /// A request by curl: status and body.
    pub fn curl(&self, method: &str, path: &str, body: Option<&Value>) -> (u16, Value) {
        let mut curl = Command::new("curl");
        curl.args([
            "--silent",
            "--show-error",
            "--write-out",
            "\n%{http_code}",
            "--request",
            method,
            "--unix-socket",
        ]);
        curl.arg(&self.socket)
            .arg(format!("http://localhost{path}"));
        if let Some(body) = body {
            curl.args(["--data", &body.to_string()]);
        }
        let output = curl.output().expect("curl is installed");
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        let text = String::from_utf8(output.stdout).unwrap();
        let (body, status) = text.rsplit_once('\n').unwrap();
        let body = if body.is_empty() {
            Value::Null
        } else {
            serde_json::from_str(body).unwrap()
        };
        (status.parse().unwrap(), body)
    }
}

/// Waits until the process answers on its socket: then it has come to its event loop.
fn answer(child: &mut Child, socket: &Path) {
    loop {
        assert!(child.try_wait().unwrap().is_none(), "it has ended");
        if let Ok(mut client) = UnixStream::connect(socket) {
            std::io::Write::write_all(&mut client, b"GET / HTTP/1.1\r\nHost: l\r\n\r\n").unwrap();
            client.read_exact(&mut [0; 12]).unwrap();
            return;
        }
        std::thread::yield_now();
    }
}

impl Drop for Coppice {
    fn drop(&mut self) {
        // It has ended already in most tests.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A terminal.
pub struct Terminal {
    master: OwnedFd,
    name: CString,
    /// Keeps it, and its mode, while no process has it open.
    kept: OwnedFd,
}

impl Terminal {
    /// A new one.
    pub fn open() -> Self {
        let master =
            openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        let name = ptsname(&master, Vec::new()).unwrap();
        let kept = open(&name);
        Self { master, name, kept }
    }

    /// `coppice` on this terminal.
    pub fn command(&self) -> Command {
        let end = || Stdio::from(open(&self.name));
        let mut command = command();
        command.stdin(end()).stdout(end()).stderr(end());
        command
    }

    /// All of its settings.
    pub fn mode(&self) -> String {
        format!("{:?}", rustix::termios::tcgetattr(&self.kept).unwrap())
    }

    /// Another size.
    pub fn resize(&self, rows: u16, columns: u16) {
        let size = rustix::termios::Winsize {
            ws_row: rows,
            ws_col: columns,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        rustix::termios::tcsetwinsize(&self.master, size).unwrap();
    }

    /// What a user does.
    pub fn type_keys(&self, keys: &[u8]) {
        rustix::io::write(&self.master, keys).unwrap();
    }

    /// Reads until `text` is shown.
    pub fn see(&self, text: &str) {
        let mut shown = Vec::new();
        let mut master = File::from(self.master.try_clone().unwrap());
        while !String::from_utf8_lossy(&shown).contains(text) {
            let mut byte = [0];
            master.read_exact(&mut byte).unwrap();
            shown.extend(byte);
        }
    }
}

fn open(name: &CString) -> OwnedFd {
    rustix::fs::open(
        name.as_c_str(),
        OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .unwrap()
}
