//! Snapshots of a tiny guest, loaded by another process: with its memory from files, and from a page-fault handler.

#![allow(clippy::unwrap_used, reason = "a test may end where it fails")]

#[path = "../../machine/tests/page_server/mod.rs"]
mod page_server;
#[path = "serve/mod.rs"]
mod serve;

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use page_server::Handler;
use serde_json::{Value, json};
use serve::daemon::{PATIENCE, call, coppice, until};
use serve::kernel;

const PAGE: usize = 4096;

/// A guest's process. Killed when dropped.
struct Guest {
    child: Child,
    folder: PathBuf,
}

impl Guest {
    /// `coppice run`, with its sockets in `folder`.
    fn start(folder: &Path, arguments: &[&str]) -> Self {
        fs::create_dir(folder).unwrap();
        let child = coppice()
            .arg("run")
            .args(arguments)
            .arg("--api-sock")
            .arg(folder.join("api.sock"))
            .arg("--console-sock")
            .arg(folder.join("console.sock"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(fs::File::create(folder.join("log")).unwrap())
            .spawn()
            .unwrap();
        let guest = Self {
            child,
            folder: folder.to_owned(),
        };
        until("the guest's process answers", || {
            guest.try_call("GET", "/", None).is_some()
        });
        guest
    }

    fn try_call(&self, method: &str, path: &str, body: Option<&Value>) -> Option<(u16, Value)> {
        call(&self.folder.join("api.sock"), method, path, body)
    }

    fn put(&self, path: &str, body: &Value) -> (u16, Value) {
        let answer = self.try_call("PUT", path, Some(body));
        answer.unwrap_or_else(|| panic!("{}", self.log()))
    }

    fn set_state(&self, state: &str) {
        let body = json!({"state": state});
        assert_eq!(self.try_call("PATCH", "/vm", Some(&body)).unwrap().0, 204);
    }

    /// Saves it, paused, as `name`.
    fn save(&self, name: &str, kind: &str) -> (u16, Value) {
        let file = |end: &str| self.folder.join(format!("{name}.{end}"));
        let body = json!({
            "snapshot_type": kind, "snapshot_path": file("state"), "mem_file_path": file("memory"),
        });
        self.put("/snapshot/create", &body)
    }

    /// It runs, and answers on its console.
    fn echoes(&self) {
        self.answers(b'z', b'z');
    }

    /// It prints the one when the other is typed.
    fn answers(&self, key: u8, expected: u8) {
        let mut console = UnixStream::connect(self.folder.join("console.sock")).unwrap();
        console.set_read_timeout(Some(PATIENCE)).unwrap();
        console.write_all(&[key]).unwrap();
        let mut byte = [0];
        while byte != [expected] {
            let len = console.read(&mut byte);
            assert_eq!(len.ok(), Some(1), "{}", self.log());
        }
    }

    fn log(&self) -> String {
        fs::read_to_string(self.folder.join("log")).unwrap()
    }

    /// Waits for its end, and returns its exit code and output.
    fn end(&mut self) -> (Option<i32>, String) {
        let mut code = None;
        until("the guest's process ends", || {
            code = self.child.try_wait().unwrap();
            code.is_some()
        });
        (code.unwrap().code(), self.log())
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A folder with the snapshot of a guest, whose initrd has bytes that nobody can guess.
struct Saved(tempfile::TempDir);

impl Saved {
    fn new(arguments: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        kernel::write(&folder.path().join("kernel"));
        Self::of(folder, arguments, Guest::echoes)
    }

    /// Of a guest that has done something.
    fn of(folder: tempfile::TempDir, arguments: &[&str], done: impl FnOnce(&Guest)) -> Self {
        let path = |name: &str| folder.path().join(name);
        let mut initrd = vec![0; 64 * PAGE];
        fs::File::open("/dev/urandom")
            .unwrap()
            .read_exact(&mut initrd)
            .unwrap();
        fs::write(path("initrd"), initrd).unwrap();
        let (kernel, initrd) = (path("kernel"), path("initrd"));
        let mut all = vec!["--kernel", kernel.to_str().unwrap()];
        all.extend([
            "--initrd",
            initrd.to_str().unwrap(),
            "--mem",
            "16M",
            "--share",
            "off",
        ]);
        all.extend(arguments);
        let guest = Guest::start(&path("saved"), &all);
        done(&guest);
        guest.set_state("Paused");
        let (status, answer) = guest.save("full", "Full");
        assert_eq!(status, 204, "{answer}");
        drop(guest);
        Self(folder)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn state(&self) -> String {
        let path = self.path("saved/full.state");
        path.to_str().unwrap().to_owned()
    }

    fn memory(&self) -> PathBuf {
        self.path("saved/full.memory")
    }

    fn socket(&self) -> PathBuf {
        self.path("uffd.sock")
    }

    fn handler(&self) -> Handler {
        Handler::start(&self.socket(), &self.memory())
    }

    /// Loads it as the guest `name`, with its memory from the handler.
    fn served(&self, name: &str, options: &str) -> Guest {
        let restore = format!("{},uffd={}{options}", self.state(), self.socket().display());
        Guest::start(&self.path(name), &["--restore", &restore])
    }

    /// Runs `coppice run --restore` with options that are refused, and returns its output.
    fn refused(&self, options: &str) -> String {
        let output = coppice()
            .args(["run", "--restore", &format!("{}{options}", self.state())])
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let printed = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{printed}");
        assert_eq!(printed.lines().count(), 1, "{printed}");
        printed
    }
}

/// Pages of two memory files that differ.
fn differences(one: &Path, other: &Path) -> usize {
    let (one, other) = (fs::read(one).unwrap(), fs::read(other).unwrap());
    assert_eq!(one.len(), other.len());
    let pages = one.chunks(PAGE).zip(other.chunks(PAGE));
    pages.filter(|(one, other)| one != other).count()
}

#[test]
fn a_guest_goes_on_with_memory_from_a_handler_and_can_be_saved_as_a_whole() {
    let saved = Saved::new(&[]);
    let handler = saved.handler();
    let guest = saved.served("b", "");
    guest.echoes();
    let given = handler.seen(|seen| seen.given.len());
    assert!((1..100).contains(&given), "{given} pages");
    guest.set_state("Paused");
    let (status, why) = guest.save("diff", "Diff");
    let why = why["fault_message"].as_str().unwrap().to_owned();
    assert_eq!(status, 400);
    assert!(why.contains("page-fault handler"), "{why}");
    assert_eq!(guest.save("full", "Full").0, 204);
    // But for the pages with the number of its generation and with its clock.
    assert_eq!(
        differences(&saved.memory(), &saved.path("b/full.memory")),
        2
    );
    guest.set_state("Resumed");
    guest.echoes();
    drop(guest);
    let restore = saved.path("b/full.state");
    let again = Guest::start(&saved.path("c"), &["--restore", restore.to_str().unwrap()]);
    again.echoes();
}

#[test]
fn with_dirty_pages_tracked_it_goes_on_from_the_file_and_needs_the_handler_no_more() {
    let saved = Saved::new(&[]);
    let mut handler = saved.handler();
    let guest = Guest::start(&saved.path("b"), &[]);
    let load = json!({
        "snapshot_path": saved.state(), "track_dirty_pages": true, "resume_vm": true,
        "mem_backend": {"backend_type": "Uffd", "backend_path": saved.socket()},
    });
    assert_eq!(guest.put("/snapshot/load", &load).0, 204);
    guest.echoes();
    guest.set_state("Paused");
    assert_eq!(guest.save("full", "Full").0, 204);
    handler.stop();
    assert_eq!(guest.save("diff", "Diff").0, 204);
    guest.set_state("Resumed");
    guest.echoes();
    drop(guest);
    let restore = saved.path("b/diff.state");
    let again = Guest::start(&saved.path("c"), &["--restore", restore.to_str().unwrap()]);
    again.echoes();
}

#[test]
fn limits_and_a_larger_disk_are_taken_while_it_runs_and_go_with_its_snapshot() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    kernel::write(&path("kernel"));
    let disk = fs::File::create(path("disk")).unwrap();
    disk.set_len(1 << 20).unwrap();
    let (kernel, drive) = (
        path("kernel").display().to_string(),
        format!("{},id=data,format=raw,rate=1M", path("disk").display()),
    );
    let arguments = ["--kernel", &kernel, "--mem", "16M", "--share", "off"];
    let serial = ["--serial-rate", "64K", "--disk", &drive];
    let guest = Guest::start(&path("a"), &[&arguments[..], &serial].concat());
    guest.echoes();
    let patch = |body: &Value| guest.try_call("PATCH", "/drives/data", Some(body)).unwrap();
    let ops = json!({"size": 5, "one_time_burst": 3, "refill_time": 100});
    let limits = json!({"drive_id": "data", "rate_limiter": {"ops": ops}});
    assert_eq!(patch(&limits).0, 204);
    disk.set_len(2 << 20).unwrap();
    let same = json!({"drive_id": "data", "path_on_host": path("disk")});
    let (status, answer) = patch(&same);
    assert_eq!(status, 204, "{answer}");
    let limiter = |guest: &Guest| {
        let (_, config) = guest.try_call("GET", "/vm/config", None).unwrap();
        config["drives"][0]["rate_limiter"].clone()
    };
    let bandwidth = json!({"size": 1 << 20, "one_time_burst": null, "refill_time": 1000});
    let expected = json!({"bandwidth": bandwidth, "ops": ops});
    assert_eq!(limiter(&guest), expected);
    guest.set_state("Paused");
    assert_eq!(guest.save("full", "Full").0, 204);
    let state = guest.folder.join("full.state");
    drop(guest);
    let again = Guest::start(&path("b"), &["--restore", state.to_str().unwrap()]);
    again.echoes();
    assert_eq!(limiter(&again), expected);
}

#[test]
fn ram_in_huge_pages_is_saved_whole_and_loaded_from_its_file_or_from_a_handler() {
    // 16 MiB for each of two guests.
    let Some(_reserved) = skip::HugePages::reserve(16) else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    kernel::write(&path("kernel"));
    let config = json!({
        "boot-source": {"kernel_image_path": path("kernel")},
        "machine-config": {
            "vcpu_count": 1, "mem_size_mib": 16, "huge_pages": "2M", "track_dirty_pages": true,
        },
        "balloon": {"amount_mib": 0, "deflate_on_oom": false},
    });
    fs::write(path("vm.json"), config.to_string()).unwrap();
    let saved = Guest::start(
        &path("saved"),
        &[
            "--log",
            "info",
            "--config",
            path("vm.json").to_str().unwrap(),
        ],
    );
    saved.echoes();
    let log = saved.log();
    assert!(log.contains("sharing.mode has no effect"), "{log}");
    let (_, sharing) = saved.try_call("GET", "/vm/sharing", None).unwrap();
    assert_eq!(sharing["mode"], "off", "{sharing}");
    saved.set_state("Paused");
    for (name, kind) in [("full", "Full"), ("diff", "Diff")] {
        let (status, answer) = saved.save(name, kind);
        assert_eq!(status, 204, "{answer}");
    }
    assert_eq!(
        differences(&path("saved/full.memory"), &path("saved/diff.memory")),
        0
    );
    drop(saved);
    for name in ["full", "diff"] {
        let state = path(&format!("saved/{name}.state"));
        let loaded = Guest::start(&path(name), &["--restore", state.to_str().unwrap()]);
        loaded.echoes();
        loaded.set_state("Paused");
        let (status, answer) = loaded.save("again", "Diff");
        assert_eq!(status, 204, "{answer}");
    }
    // It goes on in small pages as well, and from those in huge ones again.
    let small = Guest::start(&path("small"), &[]);
    let load = |state: PathBuf, huge_pages: &str| json!({"snapshot_path": state, "resume_vm": true, "huge_pages": huge_pages});
    let (status, answer) = small.put("/snapshot/load", &load(path("saved/full.state"), "None"));
    assert_eq!(status, 204, "{answer}");
    small.echoes();
    small.set_state("Paused");
    assert_eq!(small.save("diff", "Diff").0, 204);
    drop(small);
    let huge = Guest::start(&path("huge"), &[]);
    let (status, answer) = huge.put("/snapshot/load", &load(path("small/diff.state"), "2M"));
    assert_eq!(status, 204, "{answer}");
    huge.echoes();
    drop(huge);
    let (socket, memory) = (path("uffd.sock"), path("saved/full.memory"));
    let handler = Handler::start(&socket, &memory);
    let restore = format!(
        "{},uffd={}",
        path("saved/full.state").display(),
        socket.display()
    );
    let served = Guest::start(&path("served"), &["--restore", &restore]);
    served.echoes();
    let mappings = handler.seen(|seen| seen.mappings.clone());
    assert_eq!(mappings[0]["page_size"], 2 << 20, "{mappings}");
    let given = handler.seen(|seen| seen.given.clone());
    assert!(
        given.iter().all(|offset| offset % (2 << 20) == 0),
        "{given:?}"
    );
}

#[test]
fn a_guest_does_not_start_without_the_huge_pages_that_it_asks_for() {
    let folder = tempfile::tempdir().unwrap();
    let kernel = folder.path().join("kernel");
    kernel::write(&kernel);
    let guest = Guest::start(&folder.path().join("a"), &[]);
    let tib = json!({"vcpu_count": 1, "mem_size_mib": 1 << 20, "huge_pages": "2M"});
    assert_eq!(guest.put("/machine-config", &tib).0, 204);
    let source = json!({"kernel_image_path": kernel});
    assert_eq!(guest.put("/boot-source", &source).0, 204);
    let start = json!({"action_type": "InstanceStart"});
    let (status, answer) = guest.put("/actions", &start);
    let why = answer["fault_message"].as_str().unwrap();
    assert_eq!(status, 400, "{answer}");
    assert!(why.contains("machine-config.huge_pages"), "{why}");
}

#[test]
fn a_guest_does_not_start_with_a_cpu_template_of_another_vendor() {
    let folder = tempfile::tempdir().unwrap();
    let kernel = folder.path().join("kernel");
    kernel::write(&kernel);
    let guest = Guest::start(&folder.path().join("a"), &[]);
    assert_eq!(
        guest
            .put("/boot-source", &json!({"kernel_image_path": kernel}))
            .0,
        204
    );
    // No processor is of both.
    let refused = ["T2", "T2A"].map(|template| {
        let machine =
            json!({"vcpu_count": 2, "mem_size_mib": 16, "smt": true, "cpu_template": template});
        assert_eq!(guest.put("/machine-config", &machine).0, 204);
        guest.put("/actions", &json!({"action_type": "InstanceStart"}))
    });
    assert!(
        refused.iter().any(|(status, answer)| {
            let why = answer["fault_message"].as_str().unwrap_or_default();
            *status == 400 && why.contains("machine-config.cpu_template")
        }),
        "{refused:?}"
    );
}

/// Of a file, by `losetup`; removed with the value. `None`, with a report, where the host gives none.
struct LoopDevice(String);

impl LoopDevice {
    fn of(file: &Path) -> Option<Self> {
        if !skip::unless_root() {
            return None;
        }
        let made = Command::new("losetup")
            .args(["--find", "--show"])
            .arg(file)
            .output();
        match made {
            Ok(made) if made.status.success() => {
                let name = String::from_utf8(made.stdout).unwrap();
                Some(Self(name.trim().to_owned()))
            }
            Ok(made) => {
                skip::because(&String::from_utf8_lossy(&made.stderr));
                None
            }
            Err(error) => {
                skip::because(&format!("losetup: {error}"));
                None
            }
        }
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["-d", &self.0]).status();
    }
}

#[test]
fn a_block_device_is_a_drive_in_a_jail_too_and_goes_on_with_a_snapshot_of_its_size() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    kernel::write(&path("kernel"));
    let file = fs::File::create(path("disk")).unwrap();
    file.set_len(1 << 20).unwrap();
    let Some(device) = LoopDevice::of(&path("disk")) else {
        return;
    };
    let (kernel, drive) = (
        path("kernel").display().to_string(),
        format!("{},id=data", device.0),
    );
    let arguments = ["--kernel", &kernel, "--mem", "16M", "--share", "off"];
    let jailed = [&arguments[..], &["--disk", &drive, "--jail"]].concat();
    let guest = Guest::start(&path("jailed"), &jailed);
    guest.echoes();
    file.set_len(2 << 20).unwrap();
    let grown = Command::new("losetup").args(["-c", &device.0]).status();
    assert!(grown.unwrap().success());
    let same = json!({"drive_id": "data", "path_on_host": device.0});
    let patch = |guest: &Guest| {
        guest
            .try_call("PATCH", "/drives/data", Some(&same))
            .unwrap()
    };
    let (status, answer) = patch(&guest);
    assert_eq!(status, 204, "{answer}");
    drop(guest);

    let guest = Guest::start(&path("a"), &[&arguments[..], &["--disk", &drive]].concat());
    guest.echoes();
    guest.set_state("Paused");
    assert_eq!(guest.save("full", "Full").0, 204);
    let state = guest.folder.join("full.state");
    drop(guest);
    let again = Guest::start(&path("b"), &["--restore", state.to_str().unwrap()]);
    again.echoes();
    drop(again);
    file.set_len(4 << 20).unwrap();
    let grown = Command::new("losetup").args(["-c", &device.0]).status();
    assert!(grown.unwrap().success());
    let refused = coppice()
        .args(["run", "--restore", state.to_str().unwrap()])
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let printed = String::from_utf8(refused.stderr).unwrap();
    assert!(
        printed.contains("a block device of 2097152 bytes"),
        "{printed}"
    );
}

/// The report of a guest whose handler has ended.
fn ends_with_a_report(mut guest: Guest, saved: &Saved) {
    let (code, printed) = guest.end();
    let expected = format!(
        "coppice: the page-fault handler at {} has closed its connection: the guest ends",
        saved.socket().display()
    );
    assert_eq!(code, Some(1), "{printed}");
    let reports = printed.lines().filter(|line| line.starts_with(&expected));
    assert_eq!(reports.count(), 1, "{printed}");
}

#[test]
fn a_guest_ends_with_a_report_when_its_handler_dies_whether_it_waits_for_a_page_or_not() {
    let saved = Saved::new(&[]);
    for case in ["runs", "waits", "stuck"] {
        let _ = fs::remove_file(saved.socket());
        let mut handler = saved.handler();
        let guest = saved.served(case, if case == "waits" { ",paused" } else { "" });
        if case != "waits" {
            guest.echoes();
        }
        match case {
            "runs" => {}
            // A vCPU waits for its first page.
            "waits" => {
                handler.stop_answering();
                guest.set_state("Resumed");
            }
            // A thread of the host waits for one while it holds the lock of all requests, and never releases it.
            _ => {
                guest.set_state("Paused");
                handler.stop_answering();
                let api = guest.folder.join("api.sock");
                let body = json!({"snapshot_path": guest.folder.join("s"), "mem_file_path": guest.folder.join("m")});
                std::thread::spawn(move || call(&api, "PUT", "/snapshot/create", Some(&body)));
                // The memory file has no name before it is whole.
                let descriptors = format!("/proc/{}/fd", guest.child.id());
                let nameless = |entry: fs::DirEntry| {
                    let file = fs::read_link(entry.path()).unwrap_or_default();
                    file.starts_with(&guest.folder) && file.to_string_lossy().ends_with("(deleted)")
                };
                until("memory is read", || {
                    let mut open = fs::read_dir(&descriptors).unwrap().flatten();
                    open.any(nameless)
                });
            }
        }
        handler.stop();
        ends_with_a_report(guest, &saved);
    }
}

#[test]
fn a_handler_that_is_not_there_is_named_and_the_process_can_load_later() {
    let saved = Saved::new(&[]);
    let socket = saved.socket();
    let printed = saved.refused(&format!(",uffd={}", socket.display()));
    assert!(
        printed.contains(socket.to_str().unwrap()) && printed.contains("start it first"),
        "{printed}"
    );
    let guest = Guest::start(&saved.path("b"), &[]);
    let load = json!({
        "snapshot_path": saved.state(), "resume_vm": true,
        "mem_backend": {"backend_type": "Uffd", "backend_path": socket},
    });
    let (status, why) = guest.put("/snapshot/load", &load);
    assert_eq!(status, 400, "{why}");
    assert!(why.to_string().contains("uffd.sock"), "{why}");
    let _handler = saved.handler();
    assert_eq!(guest.put("/snapshot/load", &load).0, 204);
    guest.echoes();
}

#[test]
fn a_jailed_guest_has_its_handler_from_before_the_jail() {
    let saved = Saved::new(&[]);
    let _handler = saved.handler();
    let restore = format!("{},uffd={}", saved.state(), saved.socket().display());
    let guest = Guest::start(&saved.path("b"), &["--restore", &restore, "--jail"]);
    guest.echoes();
    assert_eq!(guest.log(), "");
}

#[test]
fn a_jailed_guest_that_is_loaded_later_needs_the_device_and_the_socket_in_its_jail() {
    let saved = Saved::new(&[]);
    let _handler = saved.handler();
    let folder = saved.path("saved").to_str().unwrap().to_owned();
    let load = json!({
        "snapshot_path": saved.state(), "resume_vm": true,
        "mem_backend": {"backend_type": "Uffd", "backend_path": saved.socket()},
    });
    let mut jail = format!("allow={folder}");
    let mut load_in = |name: &str, more: &str| {
        jail += more;
        let guest = Guest::start(&saved.path(name), &["--jail", &jail]);
        let (status, why) = guest.put("/snapshot/load", &load);
        (guest, status, why.to_string())
    };
    let (_, status, why) = load_in("b", "");
    assert!(status == 400 && why.contains("allow="), "{why}");
    let socket = format!(",allow={}", saved.socket().display());
    let (_, status, why) = load_in("c", &socket);
    assert!(
        status == 400 && why.contains("allow=/dev/userfaultfd"),
        "{why}"
    );
    // The handler has seen that one go, and is done.
    fs::remove_file(saved.socket()).unwrap();
    let _handler = saved.handler();
    let (guest, status, why) = load_in("d", ",allow=/dev/userfaultfd");
    assert_eq!((status, &*why), (204, "null"), "{}", guest.log());
    guest.echoes();
}

/// A folder with the kernel that has memory that is a disk, and a disk.
fn with_disk(name: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    kernel::write_of_pmem(&folder.path().join("kernel"));
    let disk = folder.path().join(name);
    if name == "d.raw" {
        fs::write(&disk, vec![0; 8 << 20]).unwrap();
        return folder;
    }
    let made = coppice()
        .args(["disk", "create", disk.to_str().unwrap(), "--size", "8M"])
        .status();
    assert!(made.unwrap().success());
    folder
}

/// Saves a guest that has written `a` to memory that is a disk, and has flushed nothing.
fn with_pmem(name: &str) -> Saved {
    let folder = with_disk(name);
    let disk = folder.path().join(name).display().to_string();
    Saved::of(
        folder,
        &["--pmem", &format!("{disk},rw,id=data")],
        |guest| {
            guest.answers(b'a', b'a');
            guest.answers(b'g', b'a');
        },
    )
}

#[test]
fn writes_to_a_pmem_device_are_on_the_disk_when_a_saved_guest_goes_on() {
    for name in ["d.vhdx", "d.raw"] {
        let saved = with_pmem(name);
        let guest = Guest::start(&saved.path("b"), &["--restore", &saved.state()]);
        guest.answers(b'g', b'a');
        guest.answers(b'm', b'a');
        // Saved again, with more, and loaded from another place.
        guest.answers(b'b', b'b');
        guest.set_state("Paused");
        let (status, why) = guest.save("full", "Diff");
        assert_eq!(status, 204, "{why}");
        drop(guest);
        let moved = saved.path(&format!("moved-{name}"));
        fs::rename(saved.path(name), &moved).unwrap();
        let state = saved.path("b/full.state").display().to_string();
        let restore = format!("{state},disk.data={}", moved.display());
        let guest = Guest::start(&saved.path("c"), &["--restore", &restore]);
        guest.answers(b'g', b'b');
        guest.answers(b'm', b'b');
        drop(guest);
        // What is older goes with the disk as it was then.
        let old = saved.refused(&format!(",disk.data={}", moved.display()));
        assert!(old.contains("pmem data: its disk was"), "{old}");
        let missing = saved.refused("");
        assert!(missing.contains(name), "{missing}");
    }
}

#[test]
fn a_jail_has_none_of_the_files_that_only_the_snapshot_names() {
    let saved = with_pmem("d.vhdx");
    let disk = saved.path("d.vhdx");
    let given = format!(
        "{},memory={},disk.data={}",
        saved.state(),
        saved.memory().display(),
        disk.display()
    );
    let refused = |restore: &str| {
        let mut run = coppice();
        let output = run.args(["run", "--restore", restore, "--jail"]).output();
        let output = output.unwrap();
        assert_eq!(output.status.code(), Some(1));
        String::from_utf8(output.stderr).unwrap()
    };
    let (without_disk, _) = given.rsplit_once(',').unwrap();
    for (restore, missing) in [
        (saved.state().as_str(), saved.memory()),
        (without_disk, disk.clone()),
    ] {
        let why = refused(restore);
        let names = why.contains(missing.to_str().unwrap()) && why.contains("allow=");
        assert!(names, "{restore}: {why}");
    }
    let guest = Guest::start(&saved.path("b"), &["--restore", &given, "--jail"]);
    guest.answers(b'g', b'a');
    drop(guest);
    let folder = saved.0.path().to_str().unwrap();
    let jail = format!("allow={folder}");
    let arguments = ["--restore", &saved.state(), "--jail", &jail];
    let guest = Guest::start(&saved.path("c"), &arguments);
    guest.answers(b'g', b'a');
}

#[test]
fn a_clone_writes_to_a_child_of_the_disk_and_others_can_be_made() {
    let saved = with_pmem("d.vhdx");
    for name in ["b", "c"] {
        let child = saved.path(&format!("{name}.vhdx"));
        let restore = format!("{},clone.data={}", saved.state(), child.display());
        let guest = Guest::start(&saved.path(name), &["--restore", &restore]);
        guest.answers(b'g', b'a');
        guest.answers(b'b', b'b');
        guest.answers(b'g', b'b');
    }
}

#[test]
fn memory_that_is_a_disk_and_has_changed_is_refused() {
    let folder = with_disk("d.raw");
    let disk = folder.path().join("d.raw");
    let argument = format!("{},ro,id=data", disk.display());
    let saved = Saved::of(folder, &["--pmem", &argument], |guest| {
        // Its writes are dropped.
        guest.answers(b'a', b'a');
        guest.answers(b'g', 0);
    });
    let guest = Guest::start(&saved.path("b"), &["--restore", &saved.state()]);
    guest.answers(b'm', b'a');
    drop(guest);
    fs::write(&disk, vec![1; 8 << 20]).unwrap();
    let changed = saved.refused("");
    assert!(
        changed.contains("pmem data: its disk was a raw disk"),
        "{changed}"
    );
}

#[test]
fn what_a_guest_wrote_to_its_copy_of_a_disk_is_saved_with_it_and_the_disk_stays_as_it_was() {
    for name in ["d.vhdx", "d.raw"] {
        let folder = with_disk(name);
        let disk = folder.path().join(name);
        let before = fs::read(&disk).unwrap();
        let argument = format!("{},cow,id=data", disk.display());
        let saved = Saved::of(folder, &["--pmem", &argument], |guest| {
            guest.answers(b'a', b'a');
        });
        // RAM, and the one page.
        let len = fs::metadata(saved.memory()).unwrap().len();
        assert_eq!(len, (16 << 20) + PAGE as u64);
        // Side by side, with no disk of their own.
        let load = |name: &str, state: &str| Guest::start(&saved.path(name), &["--restore", state]);
        let (one, other) = (load("b", &saved.state()), load("c", &saved.state()));
        one.answers(b'g', b'a');
        one.answers(b'b', b'b');
        other.answers(b'g', b'a');
        // As it was loaded, and as it was written since; also as a difference.
        for (guest, kind, expected) in [(&other, "Diff", b'a'), (&one, "Diff", b'b')] {
            guest.set_state("Paused");
            let (status, why) = guest.save("again", kind);
            assert_eq!(status, 204, "{why}");
            let state = guest.folder.join("again.state").display().to_string();
            let name = format!("of-{}", char::from(expected));
            let again = load(&name, &state);
            again.answers(b'g', expected);
            again.answers(b'm', expected);
        }
        drop((one, other));
        assert!(fs::read(&disk).unwrap() == before);
    }
}

#[test]
fn a_copy_of_a_disk_that_is_damaged_or_not_in_a_file_is_refused() {
    let folder = with_disk("d.raw");
    let disk = folder.path().join("d.raw").display().to_string();
    let argument = format!("{disk},cow,id=data");
    let saved = Saved::of(folder, &["--pmem", &argument], |guest| {
        guest.answers(b'a', b'a');
    });
    let listens = saved.handler();
    let handler = saved.refused(&format!(",uffd={}", saved.socket().display()));
    drop(listens);
    assert!(
        handler.contains("pmem data") && handler.contains("RAM alone"),
        "{handler}"
    );
    let memory = fs::File::options()
        .write(true)
        .open(saved.memory())
        .unwrap();
    memory.write_all_at(b"!", (16 << 20) + 5).unwrap();
    let damaged = saved.refused("");
    assert!(
        damaged.contains("full.memory is damaged: the checksum of its bytes from 0x1000000 on"),
        "{damaged}"
    );
    memory.set_len(16 << 20).unwrap();
    let cut = saved.refused(",trust");
    assert!(
        cut.contains("ends after 16777216 of 16781312 bytes"),
        "{cut}"
    );
}

#[test]
fn a_loaded_guest_has_the_vsock_device_that_it_had_with_another_socket_and_identifier() {
    let folder = tempfile::tempdir().unwrap();
    kernel::write(&folder.path().join("kernel"));
    let first = folder.path().join("v");
    let vsock = format!("9,path={}", first.display());
    let saved = Saved::of(folder, &["--vsock", &vsock], |guest| {
        guest.echoes();
        let config = guest.try_call("GET", "/vm/config", None).unwrap().1;
        assert_eq!(config["vsock"]["guest_cid"], 9);
    });
    let second = saved.path("w");
    let (state, socket) = (saved.state(), second.display());
    let restore = format!("{state},vsock={socket},cid=10");
    let metadata = saved.path("metadata.json");
    fs::write(&metadata, r#"{"name": "second"}"#).unwrap();
    let loaded = Guest::start(
        &saved.path("loaded"),
        &[
            "--restore",
            &restore,
            "--metadata",
            metadata.to_str().unwrap(),
        ],
    );
    loaded.echoes();
    assert!(second.exists() && first.exists());
    let config = loaded.try_call("GET", "/vm/config", None).unwrap().1;
    assert_eq!(
        config["vsock"],
        json!({"guest_cid": 10, "uds_path": second})
    );
    let reported = loaded.try_call("GET", "/mmds", None).unwrap().1;
    assert_eq!(reported, json!({"name": "second"}));

    // By REST, as Firecracker has it.
    let empty = Guest::start(&saved.path("empty"), &[]);
    let third = saved.path("x");
    let body = json!({
        "snapshot_path": saved.state(), "mem_file_path": saved.memory(), "resume_vm": true,
        "vsock_override": {"uds_path": third},
    });
    let (status, answer) = empty.put("/snapshot/load", &body);
    assert_eq!(status, 204, "{answer}");
    empty.echoes();
    assert!(third.exists());

    // A socket that another guest has is not taken from it.
    let printed = saved.refused(&format!(",vsock={socket}"));
    assert!(
        printed.contains("another process listens there"),
        "{printed}"
    );
    let plain = Saved::new(&[]);
    let printed = plain.refused(",cid=5");
    assert!(printed.contains("no vsock device"), "{printed}");
}

#[test]
fn the_vsock_socket_of_a_jailed_guest_is_made_before_or_where_it_is_allowed_and_goes_with_it() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    kernel::write(&folder.path().join("kernel"));
    let called = |socket: &str| {
        let mut caller = UnixStream::connect(socket).unwrap();
        caller.write_all(b"CONNECT 1\n").unwrap();
        // This guest has no driver.
        caller.read(&mut [0; 8]).unwrap()
    };
    for name in ["v", "w", "later"] {
        fs::create_dir(path(name)).unwrap();
    }
    let socket = path("v/sock");
    let kernel = path("kernel");
    let mut guest = Guest::start(
        &folder.path().join("before"),
        &[
            "--kernel",
            &kernel,
            "--mem",
            "16M",
            "--share",
            "off",
            "--jail",
            "--vsock",
            &format!("path={socket}"),
        ],
    );
    guest.echoes();
    assert_eq!(called(&socket), 0);
    let pid = rustix::process::Pid::from_child(&guest.child);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    let (code, log) = guest.end();
    assert_eq!(code, Some(143), "{log}");
    assert!(!Path::new(&socket).exists(), "{log}");

    // So does that of one that is never started.
    let mut waiting = Guest::start(
        &folder.path().join("waiting"),
        &[
            "--kernel",
            &kernel,
            "--no-start",
            "--vsock",
            &format!("path={socket}"),
        ],
    );
    assert!(Path::new(&socket).exists());
    let pid = rustix::process::Pid::from_child(&waiting.child);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    assert_eq!(waiting.end().0, Some(143));
    assert!(!Path::new(&socket).exists());

    let (allowed, not) = (path("later"), path("w/sock"));
    let jail = format!("allow={allowed},allow={kernel}");
    let guest = Guest::start(&folder.path().join("told"), &["--jail", &jail]);
    let source = json!({"kernel_image_path": kernel});
    let machine = json!({"vcpu_count": 1, "mem_size_mib": 16});
    for (path, body) in [
        ("/boot-source", source),
        ("/machine-config", machine),
        ("/sharing", json!({"mode": "off"})),
        ("/vsock", json!({"guest_cid": 3, "uds_path": not})),
    ] {
        assert_eq!(guest.put(path, &body).0, 204, "{path}");
    }
    let start = json!({"action_type": "InstanceStart"});
    let (status, why) = guest.put("/actions", &start);
    assert!(status == 400 && why.to_string().contains("w/sock"), "{why}");
    let later = format!("{allowed}/sock");
    guest.put("/vsock", &json!({"guest_cid": 3, "uds_path": later}));
    let (status, why) = guest.put("/actions", &start);
    assert_eq!(status, 204, "{why}");
    guest.echoes();
    assert_eq!(called(&later), 0);
}
