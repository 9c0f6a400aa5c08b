//! A guest's process that lies: the test takes its place at the guest's socket, and answers the daemon as it likes.
//! Nothing outside of the guest's folder may come of that, the guest's settings stay those of its operator, and the
//! daemon goes on serving.

use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::{Value, json};

use crate::serve::daemon::Daemon;
use crate::serve::liar::{Answer, Liar};
use crate::serve::outside::{Canaries, Outside};
use crate::serve::traces::source;

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

/// Each answer comes after `skip` others, so that each request meets each of them in some run.
fn lie(folder: &Path, outside: &Path, skip: usize) -> Liar {
    let (answers, asked) = (answers(outside), AtomicUsize::new(skip));
    Liar::take_over(folder, move |_| {
        let number = asked.fetch_add(1, Ordering::SeqCst);
        let (status, body) = &answers[number % answers.len()];
        Answer::new(*status, body)
    })
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
    let canaries = Canaries::new();
    let outside = canaries.path();
    let mut daemon = Daemon::start(&[]);
    source(&daemon, 16);
    let asked_for = settings(&daemon);
    let folder = daemon.vm_folder("a");
    let not_its_own = [folder.clone(), daemon.folder().join("a.vhdx")];
    let unchanged = |daemon: &Daemon| Outside::of(&canaries, daemon, &not_its_own);
    let before = unchanged(&daemon);
    for skip in 0..answers(outside).len() {
        let liar = lie(&folder, outside, skip);
        for (method, path, body) in requests(&daemon) {
            let body = Some(&body).filter(|body| !body.is_null());
            let (status, answer) = daemon.call(method, path, body);
            assert!(status < 600, "{method} {path}: {answer}");
        }
        assert!(liar.asked() > 5);
        unchanged(&daemon).expect(&before, &format!("after {skip}"));
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
        unchanged(&daemon).expect(&before, &format!("after {skip}, started again"));
        let _ = daemon.call("DELETE", "/templates/t", None);
    }
    let shown = daemon.get("/vms/a").to_string();
    for planted in ["another tenant", "secret", "evil"] {
        assert!(!shown.contains(planted), "{shown}");
    }
    assert!(daemon.call("DELETE", "/vms/a", None).0 < 300);
    unchanged(&daemon).expect(&before, "deleted");
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
        let (status, answer) = daemon.post("/vms/a/start", &json!(null));
        assert_eq!(status, 200, "{output}: {answer}");
        assert!(path.symlink_metadata().unwrap().is_file());
        assert!(daemon.post("/vms/a/stop", &json!({"timeout_s": 0})).0 < 300);
        fs::remove_file(&path).unwrap();
        symlink(&secret, &path).unwrap();
        let (status, answer) = daemon.post("/vms/a/start", &json!(null));
        assert_ne!(status, 200, "{output}: {answer}");
        assert_eq!(fs::read(&secret).unwrap(), b"secret");
        assert_eq!(secret.metadata().unwrap().uid(), 0);
    }
}
