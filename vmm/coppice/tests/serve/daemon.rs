//! A daemon as a process of its own, and a client of it.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use super::kernel;

/// How long anything here may take.
pub const PATIENCE: Duration = Duration::from_secs(40);

pub fn coppice() -> Command {
    Command::new(env!("CARGO_BIN_EXE_coppice"))
}

/// A daemon and its state. All its guests end when it is dropped.
pub struct Daemon {
    child: Child,
    folder: tempfile::TempDir,
    arguments: Vec<String>,
}

impl Daemon {
    pub fn start(arguments: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        kernel::write(&folder.path().join("kernel"));
        let arguments: Vec<_> = arguments.iter().map(ToString::to_string).collect();
        let child = spawn(folder.path(), &arguments);
        let daemon = Self {
            child,
            folder,
            arguments,
        };
        daemon.answers();
        daemon
    }

    pub fn answers(&self) {
        until("the daemon answers", || {
            UnixStream::connect(self.socket()).is_ok()
                && self.try_call("GET", "/healthz", None).is_some()
        });
    }

    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    pub fn socket(&self) -> PathBuf {
        self.folder().join("s")
    }

    pub fn kernel(&self) -> String {
        self.folder().join("kernel").to_str().unwrap().to_owned()
    }

    pub fn vm_folder(&self, id: &str) -> PathBuf {
        self.folder().join("state/vms").join(id)
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The most memory that it has had.
    pub fn peak_kib(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmHWM:"));
        let mut words = line.unwrap().split_whitespace();
        words.nth(1).unwrap().parse().unwrap()
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.folder().join("log")).unwrap()
    }

    /// Kills it by `SIGKILL`, and starts the next.
    pub fn kill_and_restart(&mut self) {
        self.kill();
        self.restart();
    }

    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    pub fn restart(&mut self) {
        self.start_again();
        self.answers();
    }

    /// Starts the next one, and does not wait until it answers.
    pub fn start_again(&mut self) {
        self.child = spawn(self.folder.path(), &self.arguments);
    }

    /// Has the next daemon started with other arguments.
    pub fn change_arguments(&mut self, arguments: &[&str]) {
        self.arguments = arguments.iter().map(ToString::to_string).collect();
    }

    /// Ends it in good order.
    pub fn terminate(&mut self) {
        kill_process(Pid::from_child(&self.child), Signal::TERM).unwrap();
        assert!(self.child.wait().unwrap().success());
    }

    /// Sends a request; `None` where the daemon ends before it answers.
    pub fn try_call(&self, method: &str, path: &str, body: Option<&Value>) -> Option<(u16, Value)> {
        call(&self.socket(), method, path, body)
    }

    pub fn call(&self, method: &str, path: &str, body: Option<&Value>) -> (u16, Value) {
        self.try_call(method, path, body).expect("an answer")
    }

    pub fn get(&self, path: &str) -> Value {
        let (status, answer) = self.call("GET", path, None);
        assert_eq!(status, 200, "{path}: {answer}");
        answer
    }

    pub fn post(&self, path: &str, body: &Value) -> (u16, Value) {
        self.call("POST", path, Some(body))
    }

    /// Makes a guest that waits to be started.
    pub fn create_waiting(&self, id: &str) -> Value {
        let (status, vm) = self.post("/vms", &json!({"id": id, "start": false}));
        assert_eq!(status, 201, "{vm}");
        vm
    }

    /// The body of `POST /vms` for a guest that runs the kernel.
    pub fn spec(&self, id: &str) -> Value {
        json!({
            "id": id,
            "config": {
                "boot-source": {"kernel_image_path": self.kernel()},
                "machine-config": {"vcpu_count": 1, "mem_size_mib": 16},
                "sharing": {"mode": "off"},
            },
        })
    }

    /// Makes a guest that runs.
    pub fn create_running(&self, id: &str) -> Value {
        let (status, vm) = self.post("/vms", &self.spec(id));
        assert_eq!((status, &vm["state"]), (201, &json!("running")), "{vm}");
        vm
    }

    /// Whether the guest echoes a letter: it runs, and its serial port works.
    pub fn echoes(&self, id: &str) -> bool {
        echoes(&self.vm_folder(id).join("console.sock"))
    }

    pub fn until_state(&self, id: &str, state: &str) -> Value {
        let path = format!("/vms/{id}");
        until(state, || self.get(&path)["state"] == state);
        self.get(&path)
    }

    /// A line of its events.
    pub fn events(&self, last: u64) -> Events {
        let mut stream = UnixStream::connect(self.socket()).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        write!(
            stream,
            "GET /events HTTP/1.1\r\nHost: l\r\nLast-Event-ID: {last}\r\n\r\n"
        )
        .unwrap();
        Events(BufReader::new(stream))
    }

    /// `coppice vm` and its output.
    pub fn cli(&self, arguments: &[&str]) -> (i32, String, String) {
        let output = coppice()
            .args(arguments)
            .env("COPPICE_SOCKET", self.socket())
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (
            output.status.code().unwrap(),
            text(output.stdout),
            text(output.stderr),
        )
    }

    /// Processes of this daemon's guests, also those that an earlier daemon has started; without those that wait to
    /// make an image for a guest.
    pub fn processes(&self) -> Vec<u32> {
        let mut processes = self.all_processes();
        processes.retain(|pid| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let mut words = line.split(|byte| *byte == 0);
            !words.any(|word| word == b"warm-when-told")
        });
        processes
    }

    /// The process that its guests' processes are copies of.
    pub fn zygote(&self) -> u32 {
        // Any thread of the daemon may have started it.
        let threads = fs::read_dir(format!("/proc/{}/task", self.pid())).unwrap();
        let children = |thread: fs::DirEntry| fs::read_to_string(thread.path().join("children"));
        let children: String = threads.flatten().flat_map(children).collect();
        let is_zygote = |pid: &u32| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            line.starts_with(b"coppice\0zygote\0")
        };
        let mut children = children.split_whitespace().map(|pid| pid.parse().unwrap());
        children.find(is_zygote).unwrap()
    }

    /// Processes of this daemon's guests, with those that wait to make an image.
    pub fn all_processes(&self) -> Vec<u32> {
        let vms = fs::canonicalize(self.folder()).unwrap().join("state/vms");
        let entries = fs::read_dir("/proc").unwrap().flatten();
        entries
            .filter(|entry| {
                fs::read_link(entry.path().join("cwd")).is_ok_and(|cwd| cwd.starts_with(&vms))
            })
            .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
            .collect()
    }
}

/// The tests run with guests without a jail, and again, as a part of `serve_jailed`, with the daemon's default.
fn jail_argument(arguments: &[String]) -> &'static [&'static str] {
    let is_jailed = env!("CARGO_CRATE_NAME") == "serve_jailed";
    let is_said = arguments.iter().any(|argument| argument == "--jail");
    if is_jailed || is_said {
        &[]
    } else {
        &["--jail", "off"]
    }
}

fn spawn(folder: &Path, arguments: &[String]) -> Child {
    let log = fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(folder.join("log"))
        .unwrap();
    coppice()
        .arg("serve")
        .arg("--socket")
        .arg(folder.join("s"))
        .arg("--state")
        .arg(folder.join("state"))
        .args(jail_argument(arguments))
        .args(arguments)
        .env("XDG_CACHE_HOME", folder.join("cache"))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()
        .unwrap()
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        for pid in self.all_processes() {
            let _ = kill_process(Pid::from_raw(pid.cast_signed()).unwrap(), Signal::KILL);
        }
    }
}

/// One request on a connection of its own.
pub fn call(socket: &Path, method: &str, path: &str, body: Option<&Value>) -> Option<(u16, Value)> {
    let mut stream = UnixStream::connect(socket).ok()?;
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let body = body.map(Value::to_string).unwrap_or_default();
    // In one write, as the daemon may answer and close the connection before it has read a body that it refuses.
    let request = format!(
        "{method} {path} HTTP/1.1\r\nHost: l\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(request.as_bytes()).ok()?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).ok()?;
    // The process of a guest may have written it.
    let answer = String::from_utf8_lossy(&answer);
    let (head, body) = answer.split_once("\r\n\r\n")?;
    let status = head.split(' ').nth(1)?.parse().ok()?;
    let body = if body.is_empty() {
        Value::Null
    } else {
        serde_json::from_str(body).unwrap_or_else(|_| Value::String(body.to_owned()))
    };
    Some((status, body))
}

/// The events of a daemon.
pub struct Events(BufReader<UnixStream>);

impl Events {
    /// The next event of a guest and kind.
    pub fn next(&mut self, vm: &str, kind: &str) -> Value {
        let mut line = String::new();
        loop {
            line.clear();
            assert!(self.0.read_line(&mut line).unwrap() > 0, "no more events");
            let Some(data) = line.strip_prefix("data: ") else {
                continue;
            };
            let event: Value = serde_json::from_str(data).unwrap();
            if event["vm"] == vm && event["kind"] == kind {
                return event;
            }
        }
    }
}

/// Whether the guest behind a console echoes a letter.
pub fn echoes(socket: &Path) -> bool {
    let mut console = UnixStream::connect(socket).unwrap();
    console.set_read_timeout(Some(PATIENCE)).unwrap();
    console.write_all(b"z").unwrap();
    let mut byte = [0];
    while console.read(&mut byte).unwrap() > 0 {
        if byte == *b"z" {
            return true;
        }
    }
    false
}

/// Waits until a condition is true.
pub fn until(what: &str, mut so: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !so() {
        assert!(begun.elapsed() < PATIENCE, "in vain: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}
