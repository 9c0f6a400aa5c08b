//! The jail, from within: what a guest process can reach, and what one gets that tries to get out.
//!
//! Each case is a process of its own, as it cannot leave the jail again: this test binary again, with words in its
//! environment. It has one thread, as `coppice run` has when it is jailed.

#![allow(clippy::unwrap_used, reason = "a test may end where it fails")]

mod attempts;
mod host;
mod warming;

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use config::{DriveConfig, DriveFormat, VmConfig, VsockConfig};
use jail::{self, Confinement, JailConfig, JailReport, SeccompMode};
use rustix::process::{DumpableBehavior, Gid, Uid, set_dumpable_behavior};
use rustix::thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid};
use serde_json::{Value, json};

use attempts::{ATTEMPTS, Attempt, Got};
use host::{Host, USER};

const CASE: &str = "COPPICE_JAIL_CASE";
const KIND: &str = "COPPICE_JAIL_KIND";
const HOST: &str = "COPPICE_JAIL_HOST";
/// The beginning of the line with the child's output: the test harness writes to standard output, too.
const MARK: &str = "\u{1}";

/// Who is jailed, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// Root, who becomes a user of the jail's own.
    Root,
    /// Root, without a filter of system calls.
    RootUnfiltered,
    /// A user without privileges.
    Rootless,
    /// A user without privileges on a host that makes no namespaces for users: as it is for a process that has threads
    /// already.
    Bare,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Root => "root",
            Self::RootUnfiltered => "root unfiltered",
            Self::Rootless => "rootless",
            Self::Bare => "rootless without namespaces",
        }
    }

    fn of(name: &str) -> Self {
        let kinds = [Self::Root, Self::RootUnfiltered, Self::Rootless, Self::Bare];
        kinds.into_iter().find(|kind| kind.name() == name).unwrap()
    }
}

/// Enters the jail as `coppice run` does.
fn enter(kind: Kind, host: &Host) -> JailReport {
    let mut jail = JailConfig::default();
    if matches!(kind, Kind::Rootless | Kind::Bare) {
        let (uid, gid) = (Uid::from_raw(USER), Gid::from_raw(USER));
        set_thread_groups(&[]).unwrap();
        set_thread_res_gid(gid, gid, gid).unwrap();
        set_thread_res_uid(uid, uid, uid).unwrap();
        // As for a program that this user has started.
        set_dumpable_behavior(DumpableBehavior::Dumpable).unwrap();
    } else {
        (jail.uid, jail.gid) = (Some(USER), Some(USER));
    }
    let config = VmConfig {
        drives: vec![DriveConfig {
            format: Some(DriveFormat::Raw),
            ..DriveConfig::new("own", host.own_disk())
        }],
        // Of those that it may connect to, there is none but where a test makes one.
        vsock: Some(VsockConfig::new(None, host.folder().join("vsock"))),
        ..VmConfig::default()
    };
    let confinement = Confinement {
        jail: Some(jail),
        seccomp: match kind {
            Kind::Root | Kind::Rootless | Kind::Bare => SeccompMode::Kill,
            Kind::RootUnfiltered => SeccompMode::Off,
        },
    };
    jail::enter(&confinement, &config, None, &[]).unwrap()
}

/// Goes on in a process with one thread, as `coppice run` is before it is jailed; the one there was passes on how that
/// ends.
fn become_single() {
    // SAFETY: the other thread of the process waits for this test to end, and holds nothing that the new process takes.
    let pid = unsafe { libc::fork() };
    assert!(pid >= 0);
    if pid > 0 {
        let pid = rustix::process::Pid::from_raw(pid);
        let (_, status) = rustix::process::waitpid(pid, rustix::process::WaitOptions::empty())
            .unwrap()
            .unwrap();
        let by_signal = || 128 + status.terminating_signal().unwrap_or(0);
        std::process::exit(status.exit_status().unwrap_or_else(by_signal));
    }
}

/// Not a test: the process that the tests below start, and that goes into the jail.
#[test]
#[ignore = "the process that other tests start"]
fn child() {
    let case = std::env::var(CASE).expect("run by the tests that start it");
    let kind = Kind::of(&std::env::var(KIND).unwrap());
    let host = Host::from_json(&std::env::var(HOST).unwrap());
    if kind != Kind::Bare {
        become_single();
    }
    let report = enter(kind, &host);
    jail::seccomp::started(case == PORT).unwrap();
    let printed = if case == PORT {
        let connected = std::os::unix::net::UnixStream::connect(host.folder().join(PORT));
        json!({"report": report, "connected": connected.map_err(|error| error.to_string()).err()})
    } else if case == "look" {
        json!({"report": report, "seen": look()})
    } else {
        let attempt = ATTEMPTS
            .iter()
            .find(|attempt| attempt.name == case)
            .unwrap();
        match (attempt.run)(&host) {
            Ok(Got(what)) => json!({"got": what}),
            Err(errno) => json!({"refused": errno}),
        }
    };
    println!("{MARK}{printed}");
    // Until it has been looked at.
    let _ = std::io::stdin().read_to_end(&mut Vec::new());
    std::process::exit(0);
}

fn command(kind: Kind, host: &Host, case: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args([
            "--exact",
            "child",
            "--ignored",
            "--nocapture",
            "--test-threads=1",
        ])
        .env(CASE, case)
        .env(KIND, kind.name())
        .env(HOST, host.to_json())
        .env("HOME", host.folder())
        .env_remove("XDG_CACHE_HOME");
    command
}

fn printed_json(text: &str) -> Option<Value> {
    let (_, printed) = text.split_once(MARK)?;
    serde_json::from_str(printed.lines().next()?).ok()
}

/// The report of a process about itself.
fn look() -> Value {
    let listed = std::fs::read_dir("/").is_ok();
    json!({"pid": std::process::id(), "lists_root": listed})
}

/// All that there is from the root folder of a process on, as one finds it who may see everything; but for what is
/// below the process's own folder.
fn reachable(pid: u64) -> Vec<PathBuf> {
    fn walk(root: &Path, folder: &Path, found: &mut Vec<PathBuf>) {
        for entry in std::fs::read_dir(folder).unwrap().flatten() {
            let path = entry.path();
            let inside = Path::new("/").join(path.strip_prefix(root).unwrap());
            let is_process = inside.parent() == Some(Path::new("/proc"))
                && entry
                    .file_name()
                    .as_encoded_bytes()
                    .iter()
                    .all(u8::is_ascii_digit);
            found.push(inside);
            if entry.file_type().unwrap().is_dir() && !is_process {
                walk(root, &path, found);
            }
        }
    }
    let root = PathBuf::from(format!("/proc/{pid}/root"));
    let mut found = Vec::new();
    walk(&root, &root, &mut found);
    found.sort();
    found
}

fn field<'a>(status: &'a str, name: &str) -> Vec<&'a str> {
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    line.unwrap().split_whitespace().collect()
}

fn shows_only_what_was_given(kind: Kind, layers: &[&str], missing: &[&str]) {
    let host = Host::new();
    let mut child = command(kind, &host, "look")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let printed = lines
        .map_while(Result::ok)
        .find_map(|line| printed_json(&line));
    let printed = printed.unwrap_or_else(|| panic!("it says nothing: {:?}", child.wait()));
    let pid = printed["seen"]["pid"].as_u64().unwrap();
    let found = reachable(pid);
    let read = |name| std::fs::read_to_string(format!("/proc/{pid}/{name}")).unwrap();
    let (net, status) = (read("net/dev"), read("status"));
    drop(child.stdin.take());
    assert!(child.wait().unwrap().success());
    let names = |value: &Value| -> Vec<String> {
        let list = value.as_array().unwrap().iter();
        list.map(|name| name.as_str().unwrap().to_owned()).collect()
    };
    let report = &printed["report"];
    assert_eq!(names(&report["layers"]), layers, "{report}");
    let without: Vec<_> = report["missing"].as_array().unwrap().iter().collect();
    let without: Vec<_> = without.iter().map(|missing| &missing["layer"]).collect();
    assert_eq!(without, missing, "{report}");
    assert_eq!(
        (&report["uid"], &report["gid"]),
        (&json!(USER), &json!(USER))
    );

    let seen = &printed["seen"];
    let process = Path::new("/proc").join(pid.to_string());
    let devices = ["/dev/kvm", "/dev/null", "/dev/random", "/dev/urandom"].map(PathBuf::from);
    let mut given: Vec<_> = devices.into_iter().filter(|path| path.exists()).collect();
    given.extend([
        host.own_disk(),
        "/proc/self".into(),
        "/proc/sys/vm/max_map_count".into(),
        process,
        // Paths from here on mean what they did.
        std::env::current_dir().unwrap(),
    ]);
    for path in &found {
        let leads_there = given.iter().any(|given| given.starts_with(path));
        assert!(leads_there, "{} is there", path.display());
    }
    for path in &given {
        assert!(found.contains(path), "{} is not there", path.display());
    }
    assert_eq!(seen["lists_root"], false);
    let devices: Vec<_> = net.lines().skip(2).collect();
    assert!(
        matches!(devices[..], [lo] if lo.trim().starts_with("lo:")),
        "{net}"
    );
    for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
        assert_eq!(field(&status, set), ["0000000000000000"], "{set}");
    }
    assert_eq!(field(&status, "NoNewPrivs"), ["1"]);
    assert_eq!(field(&status, "Seccomp"), ["2"]);
    let user = &*USER.to_string();
    assert_eq!(field(&status, "Uid"), [user; 4]);
    assert_eq!(field(&status, "Gid"), [user; 4]);
    if kind == Kind::Root {
        assert_eq!(field(&status, "CapBnd"), ["0000000000000000"]);
        assert!(field(&status, "Groups").is_empty());
    }
}

/// A socket that a guest's vsock device leads to.
const PORT: &str = "vsock_1000";

#[test]
fn a_guest_process_connects_to_the_sockets_that_its_vsock_device_leads_to() {
    if !skip::unless_root() {
        return;
    }
    for kind in [Kind::Root, Kind::Rootless] {
        let host = Host::new();
        let socket = host.folder().join(PORT);
        let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        std::os::unix::fs::chown(&socket, Some(USER), Some(USER)).unwrap();
        let output = command(kind, &host, PORT)
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let printed = printed_json(&String::from_utf8_lossy(&output.stdout));
        let printed = printed.unwrap_or_else(|| panic!("{output:?}"));
        let layers = printed["report"]["layers"].as_array().unwrap();
        assert!(layers.contains(&json!("tree")), "{printed}");
        assert_eq!(printed["connected"], Value::Null, "{printed}");
    }
}

const LAYERS: [&str; 11] = [
    "mount_namespace",
    "net_namespace",
    "ipc_namespace",
    "uts_namespace",
    "tree",
    "limits",
    "credentials",
    "capabilities",
    "no_new_privs",
    "landlock",
    "seccomp",
];

#[test]
fn a_guest_process_of_root_finds_only_what_its_guest_needs() {
    if skip::unless_root() {
        let missing = ["cgroup", "user_namespace", "pid_namespace"];
        shows_only_what_was_given(Kind::Root, &LAYERS, &missing);
    }
}

#[test]
fn a_guest_process_of_a_user_finds_only_what_its_guest_needs_and_reports_what_it_lacks() {
    if skip::unless_root() {
        let layers: Vec<_> = ["user_namespace"]
            .into_iter()
            .chain(LAYERS.into_iter().filter(|layer| *layer != "credentials"))
            .collect();
        let missing = ["cgroup", "pid_namespace", "credentials"];
        shows_only_what_was_given(Kind::Rootless, &layers, &missing);
    }
}

/// Who kept a hostile process from what it tried.
fn refused_by(kind: Kind, host: &Host, attempt: &Attempt) -> Result<String, String> {
    let output = command(kind, host, attempt.name)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let stdout = String::from_utf8_lossy(&output.stdout);
    let stderr = String::from_utf8_lossy(&output.stderr);
    match (output.status.code(), printed_json(&stdout)) {
        (Some(148), None) => stderr
            .split("stopped system call ")
            .nth(1)
            .map(|call| format!("seccomp: {}", call.trim()))
            .ok_or_else(|| format!("it ended without a word: {stderr}")),
        (Some(0), Some(printed)) => match printed["refused"].as_i64() {
            Some(errno) => Ok(std::io::Error::from_raw_os_error(errno as i32).to_string()),
            None => Err(format!("it got {}", printed["got"])),
        },
        _ => Err(format!("{:?}: {stderr}", output.status)),
    }
}

fn gets_nothing(kind: Kind, attempts: impl Iterator<Item = &'static Attempt>) {
    let mut host = Host::new();
    let mut failed = Vec::new();
    let mut tried = 0;
    for attempt in attempts {
        tried += 1;
        match refused_by(kind, &host, attempt) {
            Ok(why) => println!("{:32} {why}", attempt.name),
            Err(what) => failed.push(format!("{}: {what}", attempt.name)),
        }
    }
    assert!(failed.is_empty(), "{failed:#?}");
    host.is_as_before();
    println!(
        "{tried} attempts as {}, none of which got anything",
        kind.name()
    );
}

#[test]
fn a_hostile_guest_process_of_root_gets_nothing() {
    assert!(ATTEMPTS.len() >= 40);
    if skip::unless_root() {
        gets_nothing(Kind::Root, ATTEMPTS.iter());
    }
}

#[test]
fn a_hostile_guest_process_of_a_user_gets_nothing() {
    if skip::unless_root() {
        gets_nothing(Kind::Rootless, ATTEMPTS.iter());
    }
}

#[test]
fn a_hostile_guest_process_on_a_host_without_namespaces_gets_nothing() {
    if skip::unless_root() {
        gets_nothing(Kind::Bare, ATTEMPTS.iter());
    }
}

#[test]
fn a_hostile_guest_process_that_no_filter_stops_gets_nothing_of_the_host_or_of_others() {
    if skip::unless_root() {
        let kept = ATTEMPTS.iter().filter(|attempt| attempt.without_seccomp);
        gets_nothing(Kind::RootUnfiltered, kept);
    }
}

/// A kernel for the PVH entry that writes `J` to the serial port, and powers off.
fn tiny_kernel() -> Vec<u8> {
    // SLP_EN and S5 to the sleep control register.
    let power_off = [0x66, 0xba, 0x00, 0x06, 0xb0, 0x20 | 5 << 2, 0xee];
    let write = [0x66, 0xba, 0xf8, 0x03, 0xb0, b'J', 0xee];
    kernel_of(&[&write[..], &power_off, &HANG].concat())
}

/// Code that goes on for ever.
const HANG: [u8; 3] = [0xf4, 0xeb, 0xfd];

/// A kernel for the PVH entry of at most 32 bytes of code.
fn kernel_of(code: &[u8]) -> Vec<u8> {
    const TEXT: u32 = 0x10_0000;
    let header = |kind: u32, flags: u32, offset: u64, address: u64, len: u64| {
        let mut bytes = [kind.to_le_bytes(), flags.to_le_bytes()].concat();
        for word in [offset, address, address, len, len, 0x1000] {
            bytes.extend(word.to_le_bytes());
        }
        bytes
    };
    let mut bytes = b"\x7fELF\x02\x01\x01".to_vec();
    bytes.resize(16, 0);
    bytes.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    bytes.extend(u64::from(TEXT).to_le_bytes());
    bytes.extend(64u64.to_le_bytes());
    bytes.extend([0; 12]);
    bytes.extend([64, 0, 56, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
    // PT_LOAD, and PT_NOTE with XEN_ELFNOTE_PHYS32_ENTRY.
    bytes.extend(header(1, 5, 0x1000, TEXT.into(), 32));
    bytes.extend(header(4, 4, 0xc0, 0, 20));
    bytes.resize(0xc0, 0);
    bytes.extend([4, 0, 0, 0, 4, 0, 0, 0, 18, 0, 0, 0]);
    bytes.extend(b"Xen\0");
    bytes.extend(TEXT.to_le_bytes());
    bytes.resize(0x1000, 0);
    bytes.extend(code);
    bytes.resize(0x1000 + 32, 0);
    bytes
}

#[test]
fn a_guest_runs_in_every_jail_and_needs_no_more_than_the_policy_has() {
    let cache = tempfile::tempdir().unwrap();
    let user = format!("uid={USER},gid={USER}");
    let ways: [&[&str]; 6] = [
        &[],
        &["--seccomp", "off"],
        &["--seccomp", "log"],
        &["--jail"],
        &["--jail", &user],
        &["--jail", "--share", "off"],
    ];
    for way in ways {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let (kernel, disk, socket) = (path("kernel"), path("disk"), path("sock"));
        std::fs::write(&kernel, tiny_kernel()).unwrap();
        std::fs::write(&disk, vec![0; 1 << 20]).unwrap();
        // Without a right of root's, everybody has to own what they use.
        if way.contains(&&*user) {
            for path in [folder.path(), &kernel, &disk] {
                std::os::unix::fs::chown(path, Some(USER), Some(USER)).unwrap();
            }
        }
        let disk = format!("{},format=raw", disk.display());
        let output = Command::new(env!("CARGO_BIN_EXE_coppice"))
            .args([
                "run",
                "--cpus",
                "2",
                "--balloon",
                "--disk",
                &disk,
                "--kernel",
            ])
            .arg(&kernel)
            .arg("--api-sock")
            .arg(&socket)
            .args(way)
            .env("XDG_CACHE_HOME", cache.path())
            .stdin(Stdio::null())
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(0), "{way:?}: {output:?}");
        assert_eq!(output.stdout, b"J", "{way:?}: {output:?}");
        assert!(!socket.exists(), "{way:?}: {output:?}");
    }
}
