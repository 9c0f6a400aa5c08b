//! `coppice vm` and `coppice console` against a daemon.

#![allow(clippy::unwrap_used, reason = "a test may end where it fails")]

#[allow(dead_code, reason = "a part of it is used")]
mod process;
#[path = "serve/mod.rs"]
mod serve;

use std::io::{Read, Write};
use std::process::Stdio;

use process::Terminal;
use serde_json::{Value, json};
use serve::daemon::{Daemon, coppice};

fn done(daemon: &Daemon, arguments: &[&str]) -> String {
    let (code, out, err) = daemon.cli(arguments);
    assert_eq!((code, err.as_str()), (0, ""), "{arguments:?}");
    out
}

#[test]
fn a_guest_lives_its_life_by_the_command_line() {
    let daemon = Daemon::start(&[]);
    let kernel = daemon.kernel();
    let create = [
        "vm", "create", "--name", "g", "--kernel", &kernel, "--mem", "16M", "--share", "off",
        "--label", "a=b",
    ];
    assert_eq!(done(&daemon, &create), "g\n");
    assert_eq!(done(&daemon, &create), "g\n");
    let list = done(&daemon, &["vm", "list"]);
    assert!(
        list.lines().nth(1).unwrap().starts_with('g') && list.contains("running"),
        "{list}"
    );
    let json =
        |arguments: &[&str]| -> Value { serde_json::from_str(&done(&daemon, arguments)).unwrap() };
    assert_eq!(
        json(&["vm", "--json", "list"])[0]["labels"],
        json!({"a": "b"})
    );
    assert_eq!(
        json(&["vm", "show", "g", "--json"])["config"]["machine-config"]["mem_size_mib"],
        16
    );
    assert!(done(&daemon, &["vm", "show", "g"]).contains("running"));
    assert!(done(&daemon, &["vm", "stats"]).contains("private KiB"));
    assert!(done(&daemon, &["vm", "pause", "g"]).contains("paused"));
    assert_eq!(
        json(&["vm", "resume", "g", "--json"])[0]["state"],
        "running"
    );
    assert!(done(&daemon, &["vm", "stop", "g", "--force"]).contains("stopped"));
    assert!(done(&daemon, &["vm", "start", "g"]).contains("running"));
    assert_eq!(done(&daemon, &["vm", "delete", "g"]), "");
    for (arguments, code, printed) in [
        (&["vm", "show", "g"][..], 1, "there is no guest g"),
        (&["vm", "create", "--kernel", "/nowhere"], 1, "/nowhere"),
        (
            &["vm", "create", "--kernel", &kernel, "--api-sock", "x"],
            2,
            "--api-sock",
        ),
        (&["vm", "--socket", "/nowhere", "list"], 1, "coppice serve"),
    ] {
        let (status, _, err) = daemon.cli(arguments);
        assert!(
            status == code && err.contains(printed),
            "{arguments:?}: {err}"
        );
    }
}

#[test]
fn a_terminal_is_attached_and_left_and_the_guest_goes_on() {
    let daemon = Daemon::start(&[]);
    daemon.create_running("g");
    let terminal = Terminal::open();
    let before = terminal.mode();
    for round in ["first", "second"] {
        let mut child = terminal
            .command()
            .args(["console", "g"])
            .env("COPPICE_SOCKET", daemon.socket())
            .spawn()
            .unwrap();
        terminal.see("attached to g");
        terminal.see("up");
        terminal.type_keys(
            round
                .as_bytes()
                .iter()
                .map(u8::to_ascii_uppercase)
                .collect::<Vec<_>>()
                .as_slice(),
        );
        terminal.see(&round.to_uppercase());
        terminal.type_keys(b"\x01x");
        assert!(child.wait().unwrap().success());
        assert_eq!(terminal.mode(), before);
    }
    assert_eq!(daemon.get("/vms/g")["state"], "running");
}

#[test]
fn a_pipe_reads_the_console_to_the_end_of_the_guest() {
    let daemon = Daemon::start(&[]);
    daemon.create_running("g");
    let start = || {
        coppice()
            .args(["vm", "console", "g"])
            .env("COPPICE_SOCKET", daemon.socket())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap()
    };
    let (mut writer, mut reader) = (start(), start());
    let mut input = writer.stdin.take().unwrap();
    input.write_all(b"HELLO").unwrap();
    let mut shown = [0; 8];
    for child in [&mut writer, &mut reader] {
        child
            .stdout
            .as_mut()
            .unwrap()
            .read_exact(&mut shown)
            .unwrap();
        assert_eq!(&shown, b"up\nHELLO");
    }
    input.write_all(b"q").unwrap();
    for mut child in [writer, reader] {
        assert!(child.wait().unwrap().success());
    }
    assert_eq!(
        daemon.until_state("g", "stopped")["end"]["kind"],
        "power_off"
    );
    let (code, _, err) = daemon.cli(&["console", "g"]);
    assert!(code == 1 && err.contains("stopped"), "{err}");
}
