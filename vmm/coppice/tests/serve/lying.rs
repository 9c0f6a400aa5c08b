//! A guest's process that lies: the test takes its place at the guest's socket, and answers the daemon as it likes.
//! Nothing outside of the guest's folder may come of that, the guest's settings stay those of its operator, and the
//! daemon goes on serving.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use crate::serve::daemon::Daemon;
use crate::serve::traces::source;
use serde_json::{Value, json};

/// What the host has outside of the folder of a guest, which no lie may change.
#[derive(Debug, PartialEq, Eq)]
struct Outside(BTreeMap<PathBuf, (u32, u32, u32, u64, Vec<u8>)>);

impl Outside {
    fn of(folders: &[&Path], but: &Path) -> Self {
        fn walk(
            folder: &Path,
            but: &Path,
            found: &mut BTreeMap<PathBuf, (u32, u32, u32, u64, Vec<u8>)>,
        ) {
            for entry in fs::read_dir(folder).unwrap().flatten() {
                let path = entry.path();
                let metadata = entry.path().symlink_metadata().unwrap();
                if path == but || metadata.is_dir() && path.ends_with("cache") {
                    continue;
                }
                let content = if metadata.is_file() {
                    fs::read(&path).unwrap()
                } else {
                    Vec::new()
                };
                let owner = (metadata.uid(), metadata.gid());
                let known = (owner.0, owner.1, metadata.mode(), metadata.ino(), content);
                found.insert(path.clone(), known);
                if metadata.is_dir() {
                    walk(&path, but, found);
                }
            }
        }
        let mut found = BTreeMap::new();
        for folder in folders {
            walk(folder, but, &mut found);
        }
        Self(found)
    }
}

/// A configuration that names what a guest's process would like to have.
fn hostile_config(outside: &Path) -> Value {
    let at = |name: &str| outside.join(name);
    json!({
        "boot-source": {"kernel_image_path": at("secret"), "boot_args": "evil"},
        "machine-config": {"vcpu_count": 32, "mem_size_mib": 1_000_000},
        "sharing": {"mode": "all", "domain": "another tenant"},
        "drives": [
            {"drive_id": "root", "path_on_host": at("secret"), "is_root_device": false, "parents": "/"},
            {"drive_id": format!("x/../..{}", at("planted").display()), "path_on_host": at("secret"), "is_root_device": false},
        ],
        "pmem": [{"id": "../../../p", "path_on_host": at("secret"), "mode": "rw"}],
        "vsock": {"guest_cid": 3, "uds_path": at("v.sock")},
        "serial": {"serial_out_path": at("serial")},
        "logger": {"log_path": at("log"), "level": "Trace"},
        "metrics": {"metrics_path": at("metrics")},
    })
}

/// The bodies with which it answers, one after the other.
fn answers(outside: &Path) -> Vec<(u16, Vec<u8>)> {
    let config = hostile_config(outside);
    let secret = outside.join("secret");
    let json = |value: Value| (200, value.to_string().into_bytes());
    let deep = |open: &str| open.repeat(100_000).into_bytes();
    vec![
        json(config.clone()),
        (204, Vec::new()),
        json(json!({"path_on_host": secret})),
        json(json!({"operation": "commit", "state": "Done", "path_on_host": secret})),
        json(json!({"state": "Running"})),
        json(json!({"state": config})),
        (200, deep("[")),
        (200, deep("{\"a\":")),
        (200, vec![b' '; 5 << 20]),
        (
            400,
            json!({"fault_message": "\u{1b}[2J".repeat(100_000)})
                .to_string()
                .into_bytes(),
        ),
        (500, b"\0no JSON".to_vec()),
        (204, Vec::new()),
    ]
}

/// Takes the place of a guest's process at its socket.
struct Liar {
    socket: PathBuf,
    asked: Arc<AtomicUsize>,
}

impl Drop for Liar {
    /// It ends with its process.
    fn drop(&mut self) {
        fs::remove_file(&self.socket).unwrap();
    }
}

impl Liar {
    /// Each answer comes after `skip` others, so that each request meets each of them in some run.
    fn take_over(folder: &Path, outside: &Path, skip: usize) -> Self {
        let socket = folder.join("api.sock");
        fs::rename(&socket, folder.join("api.real")).unwrap();
        let listener = UnixListener::bind(&socket).unwrap();
        fs::set_permissions(&socket, fs::Permissions::from_mode(0o666)).unwrap();
        let (asked, answers) = (Arc::<AtomicUsize>::default(), answers(outside));
        let counter = asked.clone();
        thread::spawn(move || {
            for client in listener.incoming() {
                let Ok(client) = client else { return };
                let number = counter.fetch_add(1, Ordering::SeqCst) + skip;
                let (status, body) = answers[number % answers.len()].clone();
                thread::spawn(move || answer(client, status, &body));
            }
        });
        Self { socket, asked }
    }
}

fn answer(mut client: UnixStream, status: u16, body: &[u8]) {
    client
        .set_read_timeout(Some(Duration::from_secs(5)))
        .unwrap();
    // A request of the daemon comes at once, and is short.
    let _ = client.read(&mut [0; 8 << 10]);
    let head = format!("HTTP/1.1 {status} OK\r\nContent-Type: application/json\r\n");
    let length = match status {
        204 => "\r\n".to_owned(),
        _ => format!("Content-Length: {}\r\n\r\n", body.len()),
    };
    let _ = client.write_all(&[head.as_bytes(), length.as_bytes(), body].concat());
}

/// What the daemon is asked while the process lies: everything that makes it ask the process, or record something of
/// the guest.
fn requests(daemon: &Daemon) -> Vec<(&'static str, &'static str, Value)> {
    let child = daemon.vm_folder("a").join("child.vhdx");
    vec![
        ("PATCH", "/vms/a/mmds", json!({"role": "web"})),
        ("PUT", "/vms/a/mmds", json!({"role": "db"})),
        (
            "PUT",
            "/vms/a/drives/root/snapshot",
            json!({"path_on_host": child}),
        ),
        ("PUT", "/vms/a/drives/root/commit", json!({})),
        ("GET", "/vms/a/drives/root/job", Value::Null),
        ("GET", "/vms/a/vm/config", Value::Null),
        ("GET", "/vms/a?stats=true", Value::Null),
        ("GET", "/metrics", Value::Null),
        ("POST", "/templates", json!({"id": "t", "vm": "a"})),
        ("PATCH", "/vms/a/balloon", json!({"amount_mib": 1})),
        ("POST", "/vms/a/pause", json!({})),
        ("POST", "/vms/a/resume", json!({})),
    ]
}

/// What the operator has asked of the guest, as the daemon shows it.
fn settings(daemon: &Daemon) -> Value {
    let vm = daemon.get("/vms/a");
    json!([vm["config"], vm["vsock"], vm["mem_size_mib"], vm["vcpus"]])
}

#[test]
fn what_a_lying_process_answers_changes_nothing_but_its_own_guest() {
    if !skip::unless_root() {
        return;
    }
    let outside = tempfile::tempdir().unwrap();
    for (name, mode) in [("secret", 0o600), ("open", 0o666)] {
        fs::write(outside.path().join(name), name).unwrap();
        let mode = fs::Permissions::from_mode(mode);
        fs::set_permissions(outside.path().join(name), mode).unwrap();
    }
    let mut daemon = Daemon::start(&[]);
    source(&daemon, 16);
    let asked_for = settings(&daemon);
    let folder = daemon.vm_folder("a");
    let unchanged = |daemon: &Daemon| {
        let templates = daemon.folder().join("state/templates");
        Outside::of(&[outside.path(), &templates], &folder)
    };
    let before = unchanged(&daemon);
    for skip in 0..answers(outside.path()).len() {
        let liar = Liar::take_over(&folder, outside.path(), skip);
        for (method, path, body) in requests(&daemon) {
            let body = Some(&body).filter(|body| !body.is_null());
            let (status, answer) = daemon.call(method, path, body);
            assert!(status < 600, "{method} {path}: {answer}");
        }
        assert!(liar.asked.load(Ordering::SeqCst) > 5);
        assert_eq!(unchanged(&daemon), before, "after {skip}");
        // The next daemon finds the guest, whose process goes on lying.
        if skip % 3 == 0 {
            daemon.kill_and_restart();
        }
        let (status, answer) = daemon.post("/vms/a/stop", &json!({"timeout_s": 0}));
        assert!(status < 300, "{answer}");
        drop(liar);
        // A disk in its own folder that the process said it had made is not there: only its own guest has that loss.
        let (status, answer) = daemon.post("/vms/a/start", &json!(null));
        if status != 200 {
            assert!(answer.to_string().contains("state/vms/a/"), "{answer}");
            assert!(daemon.call("DELETE", "/vms/a", None).0 < 300);
            source(&daemon, 16);
        }
        assert_eq!(
            settings(&daemon)[0]["boot-source"],
            asked_for[0]["boot-source"]
        );
        assert_eq!(settings(&daemon)[2], asked_for[2]);
        assert_eq!(unchanged(&daemon), before, "after {skip}, started again");
        let _ = daemon.call("DELETE", "/templates/t", None);
    }
    let shown = daemon.get("/vms/a").to_string();
    for planted in ["another tenant", "secret", "evil"] {
        assert!(!shown.contains(planted), "{shown}");
    }
    assert!(daemon.call("DELETE", "/vms/a", None).0 < 300);
    assert_eq!(unchanged(&daemon), before);
}

#[test]
fn an_output_of_a_guest_is_not_opened_through_a_link_in_its_folder() {
    if !skip::unless_root() {
        return;
    }
    let outside = tempfile::tempdir().unwrap();
    let secret = outside.path().join("secret");
    fs::write(&secret, "secret").unwrap();
    let daemon = Daemon::start(&[]);
    source(&daemon, 16);
    let folder = daemon.vm_folder("a");
    assert!(daemon.post("/vms/a/stop", &json!({"timeout_s": 0})).0 < 300);
    for (output, name) in [
        ("serial", "serial_out_path"),
        ("metrics", "metrics_path"),
        ("logger", "log_path"),
    ] {
        assert!(daemon.call("DELETE", "/vms/a", None).0 < 300);
        let mut spec = daemon.spec("a");
        let path = folder.canonicalize().unwrap_or(folder.clone()).join("out");
        spec["config"][output] = json!({name: path});
        spec["start"] = json!(false);
        let (status, answer) = daemon.post("/vms", &spec);
        assert_eq!(status, 201, "{answer}");
        let _ = fs::remove_file(&path);
        symlink(&secret, &path).unwrap();
        let (status, answer) = daemon.post("/vms/a/start", &json!(null));
        assert_ne!(status, 200, "{output}: {answer}");
        assert_eq!(fs::read(&secret).unwrap(), b"secret");
        assert_eq!(secret.metadata().unwrap().uid(), 0);
    }
}
