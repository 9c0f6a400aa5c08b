//! `coppice serve` beside a guest's process that lies: it floods its log, leaves other files in the place of its own,
//! and answers in its guest's name what it likes. The daemon goes on, and believes nothing of it.

#![allow(clippy::unwrap_used, reason = "a test may end where it fails")]

#[path = "serve/mod.rs"]
mod serve;

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::{OpenOptionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{CWD, Mode, OFlags, mkfifoat};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use serve::daemon::{Daemon, until};
use serve::traces::{files, source, template};

/// What the daemon's memory may grow by, whatever a process does.
const ROOM_KIB: u64 = 24 << 10;

fn pid(vm: &Value) -> i32 {
    i32::try_from(vm["pid"].as_i64().unwrap()).unwrap()
}

fn kill(vm: &Value) {
    kill_process(Pid::from_raw(pid(vm)).unwrap(), Signal::KILL).unwrap();
}

/// The standard error of a process, as the process has it.
fn standard_error(vm: &Value) -> File {
    OpenOptions::new()
        .write(true)
        .custom_flags(OFlags::NONBLOCK.bits().cast_signed())
        .open(format!("/proc/{}/fd/2", pid(vm)))
        .unwrap()
}

/// Writes a line once there is room for it in the pipe.
fn write_line(mut pipe: &File, line: &str) {
    until("there is room in the pipe", || {
        pipe.write(format!("{line}\n").as_bytes()).is_ok()
    });
}

#[test]
fn a_process_that_floods_its_log_fills_neither_the_disk_nor_the_daemon() {
    let daemon = Daemon::start(&[]);
    let vm = daemon.create_waiting("a");
    daemon.create_waiting("b");
    let before = daemon.peak_kib();
    let mut pipe = standard_error(&vm);
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(2) {
        while pipe.write(&[b'x'; 4096]).is_ok() {}
        daemon.get("/vms/b");
    }
    // Without an end of the line.
    drop(pipe);
    let pipe = standard_error(&vm);
    write_line(&pipe, "\n\x1b]0;owned\x07 last words");
    kill(&vm);
    let end = daemon.until_state("a", "failed")["end"]["text"].clone();
    let end = end.as_str().unwrap();
    assert!(end.ends_with("\\u001b]0;owned\\u0007 last words"), "{end}");
    let log = fs::metadata(daemon.vm_folder("a").join("log")).unwrap();
    assert!((1 << 12..1 << 20).contains(&log.len()), "{}", log.len());
    let grown = daemon.peak_kib() - before;
    assert!(grown < ROOM_KIB, "{grown} KiB");
}

#[test]
fn a_process_logs_on_while_there_is_no_daemon() {
    let mut daemon = Daemon::start(&[]);
    let vm = daemon.create_waiting("a");
    let pipe = standard_error(&vm);
    write_line(&pipe, "with a daemon");
    let log = daemon.vm_folder("a").join("log");
    let has = |line: &str| fs::read_to_string(&log).unwrap().lines().any(|l| l == line);
    until("the line is in the log", || has("with a daemon"));
    daemon.kill();
    let mut flooded: &File = &pipe;
    write_line(flooded, "without one");
    while flooded.write(b"and many more\n").is_ok() {}
    assert_eq!(
        daemon.processes().len(),
        1,
        "it has neither ended nor waited"
    );
    daemon.restart();
    until("the line is in the log", || has("without one"));
    until("there is room again", || flooded.write(b"later\n").is_ok());
    until("the line is in the log", || has("later"));
    kill(&vm);
    daemon.until_state("a", "failed");
}

#[test]
fn what_a_process_leaves_in_the_place_of_its_files_is_not_waited_for_nor_read_whole() {
    let mut daemon = Daemon::start(&[]);
    let huge = |path: &Path| File::create(path).unwrap().set_len(2 << 30).unwrap();
    let place = |kind: &str, path: &Path| match kind {
        "fifo" => mkfifoat(CWD, path, Mode::RWXU).unwrap(),
        "folder" => fs::create_dir(path).unwrap(),
        "link" => symlink("/dev/zero", path).unwrap(),
        "huge" => huge(path),
        _ => fs::write(path, "{\"kind\": ").unwrap(),
    };
    let before = daemon.peak_kib();
    for kind in ["fifo", "folder", "link", "huge", "text"] {
        for name in ["end.json", "log"] {
            let id = format!("{kind}-{}", name.replace('.', "-"));
            let vm = daemon.create_waiting(&id);
            let path = daemon.vm_folder(&id).join(name);
            let _ = fs::remove_file(&path);
            place(kind, &path);
            write_line(&standard_error(&vm), "a line");
            kill(&vm);
            let end = daemon.until_state(&id, "failed")["end"]["text"].clone();
            let end = end.as_str().unwrap();
            assert!(end.starts_with("the process was killed"), "{end}");
        }
    }
    let grown = daemon.peak_kib() - before;
    assert!(grown < ROOM_KIB, "{grown} KiB");
    daemon.kill_and_restart();
    for vm in daemon.get("/vms")["vms"].as_array().unwrap() {
        let path = format!("/vms/{}", vm["id"].as_str().unwrap());
        assert_eq!(daemon.call("DELETE", &path, None).0, 204);
    }
    assert_eq!(fs::read_dir(daemon.vm_folder("")).unwrap().count(), 0);
}

#[test]
fn a_guest_whose_record_cannot_be_read_keeps_its_name_and_its_process() {
    let mut daemon = Daemon::start(&[]);
    let names = ["long", "text", "fifo", "number"];
    let made = names.map(|id| match id {
        "text" => daemon.create_running(id),
        _ => daemon.create_waiting(id),
    });
    let made_too = daemon.create_waiting("whole");
    let file = |id: &str, name: &str| daemon.vm_folder(id).join(name);
    let record = fs::read(file("long", "vm.json")).unwrap();
    let long = [record, vec![b' '; 4 << 20]].concat();
    let (long_at, text_at) = (file("long", "vm.json"), file("text", "vm.json"));
    let (fifo_at, number_at) = (file("fifo", "vm.json"), file("number", "pid.json"));
    let kernel = daemon.kernel();
    let image = json!({"path": kernel, "kind": "kernel"});
    assert_eq!(daemon.call("PUT", "/images/k", Some(&image)).0, 204);
    daemon.kill();
    fs::write(long_at, &long).unwrap();
    fs::write(text_at, "{\"spec\":").unwrap();
    fs::remove_file(&fifo_at).unwrap();
    mkfifoat(CWD, &fifo_at, Mode::RWXU).unwrap();
    fs::write(number_at, "\u{1b}[2J").unwrap();
    daemon.restart();
    assert_eq!(daemon.get("/vms/whole")["state"], "not_started");
    for (id, before) in names.iter().zip(&made) {
        let vm = daemon.get(&format!("/vms/{id}"));
        let shown = (&vm["state"], &vm["pid"]);
        assert_eq!(shown, (&json!("unreadable"), &before["pid"]), "{vm}");
        if *id == "text" {
            // The folder of a guest has its group from the first start on.
            assert_eq!(vm["guest_uid"], before["guest_uid"], "{vm}");
        }
        assert!(vm["unreadable"].as_str().unwrap().contains(".json"), "{vm}");
        let again = json!({"id": id, "start": false});
        assert_eq!(daemon.post("/vms", &again).0, 409, "{id}");
        for action in ["start", "pause", "resume"] {
            let (status, fault) = daemon.post(&format!("/vms/{id}/{action}"), &json!(null));
            assert_eq!(status, 409, "{fault}");
        }
        let body = json!({"mem_size_mib": 64, "vcpu_count": 1});
        let path = format!("/vms/{id}/machine-config");
        assert_eq!(daemon.call("PUT", &path, Some(&body)).0, 409);
    }
    assert_eq!(
        daemon.call("DELETE", "/images/k", None).0,
        409,
        "one may use it"
    );
    assert!(daemon.cli(&["vm", "list"]).1.contains("unreadable"));
    let all = daemon.processes().len();
    assert_eq!(
        daemon.post("/vms/long/stop", &json!({"timeout_s": 0})).0,
        200
    );
    until("its process has ended", || {
        daemon.processes().len() == all - 1
    });
    let left = fs::read(daemon.vm_folder("long").join("vm.json")).unwrap();
    assert_eq!(left, long, "for people to look at");
    daemon.kill_and_restart();
    assert_eq!(daemon.get("/vms/long")["state"], "unreadable");
    for id in names {
        assert_eq!(daemon.call("DELETE", &format!("/vms/{id}"), None).0, 204);
        assert_eq!(daemon.call("GET", &format!("/vms/{id}"), None).0, 404);
        assert!(!daemon.vm_folder(id).exists());
        daemon.create_waiting(id);
    }
    assert_eq!(daemon.get("/vms/whole")["pid"], made_too["pid"]);
    assert_eq!(daemon.processes().len(), names.len() + 1);
    assert_eq!(daemon.call("DELETE", "/images/k", None).0, 204);
}

#[test]
fn a_template_whose_record_cannot_be_read_keeps_its_name() {
    let mut daemon = Daemon::start(&[]);
    source(&daemon, 16);
    assert_eq!(daemon.post("/templates", &template()).0, 201);
    let folder = daemon.folder().join("state/templates/t");
    let before = files(&folder);
    daemon.kill();
    fs::write(folder.join("template.json"), "{\"id\":").unwrap();
    daemon.restart();
    let (status, fault) = daemon.post("/templates", &template());
    assert_eq!(status, 409, "{fault}");
    assert_eq!(files(&folder), before);
    assert_eq!(daemon.get("/vms/a")["state"], "running");
}

/// Takes the place of a guest's process at its REST socket, and answers each request with what `answer` makes of it.
fn take_place(daemon: &Daemon, id: &str, answer: impl Fn(&str) -> Vec<u8> + Send + 'static) {
    let socket = daemon.vm_folder(id).join("api.sock");
    fs::rename(&socket, socket.with_extension("x")).unwrap();
    let listener = UnixListener::bind(&socket).unwrap();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let (mut stream, mut request) = (stream.unwrap(), [0; 4096]);
            let len = stream.read(&mut request).unwrap_or(0);
            let request = String::from_utf8_lossy(&request[..len]).into_owned();
            let body = answer(&request);
            let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", body.len());
            // The daemon closes the connection where it has read enough.
            let _ = stream.write_all(head.as_bytes());
            let _ = stream.write_all(&body);
        }
    });
}

#[test]
fn a_process_that_lies_about_its_counters_speaks_for_no_other_guest() {
    let daemon = Daemon::start(&[]);
    for id in ["a", "b", "c"] {
        daemon.create_waiting(id);
    }
    let honest = daemon.call("GET", "/metrics?vm=b", None).1;
    let honest = honest.as_str().unwrap().to_owned();
    let of_b = |text: &str| {
        let lines = text.lines().filter(|line| line.contains("vm=\"b\""));
        let kinds = ["cpu", "memory", "process_", "api_requests"];
        // These change from one request to the next.
        let lines = lines.filter(|line| !kinds.iter().any(|kind| line.contains(kind)));
        lines.map(ToOwned::to_owned).collect::<Vec<_>>()
    };
    assert!(honest.contains("coppice_api_requests_total{vm=\"b\",method=\"GET\"}"));
    take_place(&daemon, "a", |_| {
        b"# TYPE coppice_api_failures gauge\ncoppice_api_failures_total{vm=\"b\"} 666\n\
          coppice_vms{state=\"running\"} 666\ncoppice_vm_cpu_seconds_total{vm=\"b\"} 666\n\
          coppice_api_failures_total 665\n# EOF\nevil 666\n"
            .to_vec()
    });
    take_place(&daemon, "c", |_| {
        b"coppice_api_failures_total 666\n".repeat(1 << 20)
    });
    let before = daemon.peak_kib();
    let text = daemon.call("GET", "/metrics?guests", None).1;
    let text = text.as_str().unwrap();
    assert!(!text.contains("666"), "{text}");
    assert!(text.contains("coppice_api_failures_total{vm=\"a\"} 665\n"));
    assert!(text.contains("# TYPE coppice_api_failures counter\n"));
    assert_eq!(of_b(text), of_b(&honest));
    assert!(
        text.contains("coppice_daemon_samples_left_out_total 4\n"),
        "{text}"
    );
    let grown = daemon.peak_kib() - before;
    assert!(grown < ROOM_KIB, "{grown} KiB");
}

/// A request by TCP, and the whole response.
fn by_web(address: &str, path: &str, host: &str) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    let request = format!("GET {path} HTTP/1.1\r\n{host}Connection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).unwrap();
    let mut response = String::new();
    stream.read_to_string(&mut response).unwrap();
    response
}

fn web_address(daemon: &Daemon) -> String {
    let log = daemon.log();
    let (_, rest) = log.split_once("address=").unwrap();
    rest.split_whitespace().next().unwrap().to_owned()
}

#[test]
fn the_address_for_reading_answers_to_its_own_names_and_keeps_what_the_page_does_not_show() {
    let daemon = Daemon::start(&["--web", "127.0.0.1:0", "--web-host", "Guests.Example"]);
    let secret = json!({
        "id": "g", "start": false, "labels": {"secret": "1"},
        "config": {"vsock": {}, "boot-source": {"kernel_image_path": daemon.kernel(), "boot_args": "secret"}},
        "metadata": {"secret": 1},
    });
    assert_eq!(daemon.post("/vms", &secret).0, 201);
    let address = web_address(&daemon);
    let status = |path: &str, host: &str| {
        let response = by_web(&address, path, host);
        let status = response.split(' ').nth(1).unwrap().to_owned();
        (status, response)
    };
    for host in ["localhost", "127.0.0.1:99", &address, "guests.example:80"] {
        let (code, shown) = status("/vms?stats", &format!("Host: {host}\r\n"));
        assert_eq!(code, "200", "{host}");
        assert!(
            shown.contains("\"id\":\"g\"") && !shown.contains("secret"),
            "{shown}"
        );
    }
    let evil = "http://evil.example/vms";
    for (path, host) in [
        ("/vms", "Host: evil.example\r\n"),
        ("/vms", "Host: evil.example:8080\r\n"),
        ("/", "Host: 192.0.2.1\r\n"),
        ("/vms", "Host: localhost\r\nHost: evil.example\r\n"),
        (evil, "Host: localhost\r\n"),
        ("/vms", ""),
    ] {
        let (code, response) = status(path, host);
        assert!(
            ["421", "400"].contains(&&*code),
            "{path} {host}: {response}"
        );
        assert!(!response.contains("\"vms\""), "{response}");
    }
    let local = "Host: localhost\r\n";
    for path in ["/vms/g", "/metrics", "/healthz", "/openapi.json", "/events"] {
        assert_eq!(status(path, local).0, "404", "{path}");
    }
}

#[test]
fn connections_to_the_address_for_reading_leave_the_socket_its_places() {
    let daemon = Daemon::start(&["--web", "127.0.0.1:0"]);
    let address = web_address(&daemon);
    let idle: Vec<_> = (0..600)
        .map(|_| TcpStream::connect(&address).unwrap())
        .collect();
    for _ in 0..20 {
        daemon.get("/vms");
    }
    drop(idle);
    until("the address answers again", || {
        by_web(&address, "/vms", "Host: localhost\r\n").starts_with("HTTP/1.1 200")
    });
}
