//! The `coppice` binary: its terminal, its socket, its exit codes. No guest gets to run here.

#![allow(clippy::unwrap_used, reason = "a test may end where it fails")]

mod process;
mod top;

use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;

use process::{Coppice, Terminal};
use rustix::process::Signal;
use serde_json::{Value, json};

fn output(arguments: &[&str]) -> (i32, String, String) {
    let output = process::command()
        .args(arguments)
        .stdin(std::process::Stdio::null())
        .output()
        .unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (
        output.status.code().unwrap(),
        text(output.stdout),
        text(output.stderr),
    )
}

#[test]
fn an_error_is_printed_in_one_line_and_has_an_exit_code() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    fs::write(
        path("text"),
        "not a kernel, but long enough to be looked at\n",
    )
    .unwrap();
    fs::write(path("empty"), "").unwrap();
    fs::write(path("config"), r#"{"drives": [{"drive_id": "a"}]}"#).unwrap();
    let (text, empty, config, missing) =
        (path("text"), path("empty"), path("config"), path("missing"));
    let cases: [(&[&str], i32, &str); 13] = [
        (&["run"], 2, "--kernel"),
        (&["run", "--kernel", &text, "--mem", "12"], 2, "--mem"),
        (
            &["run", "--kernel", &text, "--disk", "d,format=qcow2"],
            2,
            "qcow2",
        ),
        (&["run", "--kernel", &text, "--colour"], 2, "--colour"),
        (&["run", "--config", &config], 2, "config"),
        (&["run", "--config", &missing], 2, "missing"),
        (&["fly"], 2, "fly"),
        (&[], 2, "subcommand"),
        (&["run", "--kernel", &missing], 1, "missing"),
        (&["run", "--kernel", &text], 1, "text"),
        (&["run", "--kernel", &empty], 1, "empty"),
        (
            &["run", "--kernel", &text, "--disk", &missing],
            1,
            "missing",
        ),
        (
            &["run", "--kernel", &text, "--api-sock", &text],
            1,
            "not a socket",
        ),
    ];
    for (arguments, code, named) in cases {
        let (status, out, err) = output(arguments);
        assert_eq!(status, code, "{arguments:?}: {err}");
        assert!(
            err.starts_with("coppice: ") && err.contains(named),
            "{arguments:?}: {err}"
        );
        assert_eq!(
            (err.lines().count(), out.as_str()),
            (1, ""),
            "{arguments:?}: {err}"
        );
    }
    assert_eq!(
        fs::read_to_string(&text).unwrap(),
        "not a kernel, but long enough to be looked at\n"
    );
}

#[test]
fn help_and_version_are_no_errors() {
    for arguments in [
        &["--version"][..],
        &["--help"],
        &["run", "--help"],
        &["doctor", "--help"],
    ] {
        let (status, out, err) = output(arguments);
        assert_eq!((status, err.as_str()), (0, ""), "{arguments:?}");
        assert!(!out.is_empty());
    }
}

#[test]
fn signals_end_it_with_their_number_and_the_socket_goes() {
    for (signal, code) in [
        (Signal::TERM, 143),
        (Signal::INT, 130),
        (Signal::HUP, 129),
        (Signal::QUIT, 131),
    ] {
        let coppice = Coppice::waiting();
        let mode = fs::symlink_metadata(coppice.socket())
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o600);
        let socket = coppice.socket().to_owned();
        coppice.signal(signal);
        assert_eq!(coppice.wait(), code);
        assert!(!socket.exists());
    }
}

#[test]
fn a_socket_that_was_left_behind_is_replaced_and_one_in_use_is_not() {
    let mut coppice = Coppice::waiting();
    let socket = coppice.socket().to_str().unwrap().to_owned();
    let (status, _, err) = output(&["run", "--api-sock", &socket]);
    assert_eq!(status, 1);
    assert!(err.contains("another process listens"), "{err}");
    assert_eq!(coppice.curl("GET", "/", None).0, 200);
    coppice.signal(Signal::KILL);
    coppice.restart();
    assert_eq!(coppice.curl("GET", "/", None).0, 200);
}

#[test]
fn a_real_client_configures_and_a_guest_that_cannot_start_does_not_end_it() {
    let coppice = Coppice::waiting();
    let kernel = coppice.folder().join("kernel");
    fs::write(&kernel, vec![b'#'; 8192]).unwrap();
    let done = (204, Value::Null);
    assert_eq!(
        coppice.curl(
            "PUT",
            "/boot-source",
            Some(&json!({"kernel_image_path": kernel}))
        ),
        done
    );
    assert_eq!(
        coppice.curl(
            "PUT",
            "/machine-config",
            Some(&json!({"vcpu_count": 1, "mem_size_mib": 64}))
        ),
        done
    );
    let before = coppice.curl("GET", "/vm/config", None);
    for _ in 0..2 {
        let (status, fault) = coppice.curl(
            "PUT",
            "/actions",
            Some(&json!({"action_type": "InstanceStart"})),
        );
        assert_eq!(status, 400);
        assert!(
            fault["fault_message"]
                .as_str()
                .unwrap()
                .contains("cannot start"),
            "{fault}"
        );
    }
    assert_eq!(coppice.curl("GET", "/vm/config", None), before);
    assert_eq!(coppice.curl("GET", "/", None).1["state"], "Not started");
    assert_eq!(
        coppice
            .curl("PUT", "/entropy", Some(&json!(" ".repeat(60_000))))
            .0,
        413
    );
}

#[test]
fn the_log_goes_where_it_is_sent() {
    let coppice = Coppice::waiting();
    let log = coppice.folder().join("log");
    let logger = json!({"log_path": log, "level": "Info"});
    assert_eq!(coppice.curl("PUT", "/logger", Some(&logger)).0, 204);
    assert_eq!(coppice.curl("GET", "/nothing", None).0, 400);
    assert!(fs::read_to_string(&log).unwrap().contains("/nothing"));
}

type End = fn(&Coppice, &Terminal);

#[test]
fn the_terminal_is_raw_while_it_runs_and_as_before_afterwards() {
    let ways: [(&str, End, i32); 4] = [
        (
            "Ctrl-A x",
            |_, terminal| terminal.type_keys(b"ls\r\x01x"),
            130,
        ),
        ("SIGTERM", |coppice, _| coppice.signal(Signal::TERM), 143),
        ("SIGINT", |coppice, _| coppice.signal(Signal::INT), 130),
        ("SIGHUP", |coppice, _| coppice.signal(Signal::HUP), 129),
    ];
    for (name, end, code) in ways {
        let terminal = Terminal::open();
        let before = terminal.mode();
        let coppice = Coppice::waiting_on(&terminal);
        assert_ne!(terminal.mode(), before, "{name}");
        end(&coppice, &terminal);
        assert_eq!(coppice.wait(), code, "{name}");
        assert_eq!(terminal.mode(), before, "{name}");
    }
}

#[test]
fn the_terminal_is_as_before_after_a_guest_that_cannot_start() {
    let terminal = Terminal::open();
    let before = terminal.mode();
    let kernel = tempfile::NamedTempFile::new().unwrap();
    let mut child = terminal
        .command()
        .args(["run", "--kernel"])
        .arg(kernel.path())
        .spawn()
        .unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(1));
    assert_eq!(terminal.mode(), before);
    terminal.see("coppice: ");
}

#[test]
fn the_help_of_the_keys_is_shown_on_the_terminal() {
    let terminal = Terminal::open();
    let coppice = Coppice::waiting_on(&terminal);
    terminal.type_keys(b"\x01h");
    terminal.see("Ctrl-A x");
    terminal.type_keys(b"\x01x");
    assert_eq!(coppice.wait(), 130);
}

#[test]
fn the_end_is_written_to_a_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (end, missing) = (path("end"), path("missing"));
    let report = || -> Value { serde_json::from_slice(&fs::read(&end).unwrap()).unwrap() };
    let run = |arguments: &[&str]| output(&[&["run", "--end-file", &end], arguments].concat());
    assert_eq!(run(&["--kernel", &missing]).0, 1);
    assert_eq!(
        (&report()["kind"], &report()["code"]),
        (&json!("failed"), &json!(1))
    );
    assert!(report()["text"].as_str().unwrap().contains("missing"));
    assert_eq!(run(&["--config", &missing]).0, 2);
    assert_eq!(report()["code"], 2);
}

/// Starts a process with a line at its gate: returns its exit code, and its report, if there is one.
fn launch(line: &[u8]) -> (i32, Option<Value>) {
    let folder = tempfile::tempdir().unwrap();
    let mut child = process::command()
        .args(["run", "--held", "--id", "web-1", "--api-sock", "s"])
        .args(["--end-file", "end"])
        .current_dir(folder.path())
        .stdin(std::process::Stdio::piped())
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let mut gate = child.stdin.take().unwrap();
    // One that has ended meanwhile takes no more.
    let _ = gate.write_all(line);
    drop(gate);
    let code = child.wait().unwrap().code().unwrap();
    assert!(!folder.path().join("s").exists());
    let report = fs::read(folder.path().join("end")).ok();
    (
        code,
        report.map(|report| serde_json::from_slice(&report).unwrap()),
    )
}

#[test]
fn a_held_process_ends_where_nobody_lets_it_go() {
    for line in ["", "{\"purpose\": \"boot\"}"] {
        assert_eq!(launch(line.as_bytes()), (1, None), "{line}");
    }
}

#[test]
fn a_held_process_refuses_an_invalid_launch_specification() {
    let long = " ".repeat(1 << 20);
    for (line, named) in [
        ("\n", "launch specification"),
        ("{\"purpose\": \"fly\"}\n", "fly"),
        ("{\"purpose\": \"boot\"}\n\n", "more than one"),
        // There is no such file.
        ("{\"purpose\": \"boot\"}\n", "config.json"),
        (&long, "at most"),
    ] {
        let (code, report) = launch(line.as_bytes());
        let report = report.unwrap();
        assert_eq!((code, &report["code"]), (2, &json!(2)));
        let text = report["text"].as_str().unwrap();
        assert!(text.contains(named), "{text}");
    }
}
