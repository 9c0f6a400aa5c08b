//! `coppice top` beside guests that wait to be configured: what it prints, and its terminal.

use std::process::Stdio;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::process::{self, Coppice, Terminal};

fn printed(arguments: &[&str]) -> String {
    let output = process::command()
        .arg("top")
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{error}");
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn guests_are_printed_as_json() {
    let guest = Coppice::waiting();
    let shown: Value = serde_json::from_str(&printed(&["--json", "--files"])).unwrap();
    let rows = shown["guests"].as_array().unwrap();
    let row = rows.iter().find(|row| row["pid"] == guest.pid()).unwrap();
    assert_eq!(row["name"], "api");
    assert_eq!(row["ram_mib"], 128);
    assert!(row["private_kib"].as_u64().unwrap() > 0, "{row}");
    assert_eq!(row["ram_private_kib"], Value::Null, "it has not started");
    assert_eq!(row["saved_bytes"], Value::Null);
    assert!(shown["totals"]["private_kib"].as_u64() >= row["private_kib"].as_u64());
    let files = shown["files"].as_array().unwrap();
    let is_program = |path: &Value| path.as_str().unwrap().ends_with("/coppice");
    assert!(
        files.iter().any(|file| is_program(&file["path"])),
        "{files:?}"
    );
}

#[test]
fn without_a_terminal_one_table_is_printed() {
    let guest = Coppice::waiting();
    for arguments in [&["--once"][..], &[]] {
        let text = printed(arguments);
        let row = text
            .lines()
            .find(|line| line.split_whitespace().nth(1) == Some(&guest.pid().to_string()));
        assert!(row.is_some_and(|row| row.starts_with("api ")), "{text}");
        assert!(text.starts_with("GUEST"), "{text}");
        assert!(text.lines().last().unwrap().contains(" guests "), "{text}");
    }
    assert!(printed(&["--files"]).starts_with("FILE"));
}

#[test]
fn it_draws_and_sorts_and_leaves_the_terminal_as_it_was() {
    let _guest = Coppice::waiting();
    let terminal = Terminal::open();
    terminal.resize(40, 140);
    let before = terminal.mode();
    let mut top = terminal.command().arg("top").spawn().unwrap();
    // Reversed: the heading of the column that sorts.
    terminal.see("PRIVATE");
    terminal.see("api");
    assert_ne!(terminal.mode(), before, "keys come one by one");
    terminal.type_keys(b"\x1b[C");
    terminal.see("SHARED");
    terminal.type_keys(b"f");
    // Only what changes is drawn, and that may be some letters of a word; all is drawn where the size is another.
    terminal.resize(41, 141);
    terminal.see("MAPPED");
    terminal.type_keys(b"q");
    // The cursor is shown, and the screen is the old one.
    terminal.see("\x1b[?25h");
    terminal.see("\x1b[?1049l");
    assert!(top.wait().unwrap().success());
    assert_eq!(terminal.mode(), before);
}

#[test]
fn a_signal_leaves_the_terminal_as_it_was_too() {
    for (signal, code) in [(Signal::TERM, 143), (Signal::INT, 130), (Signal::HUP, 129)] {
        let terminal = Terminal::open();
        terminal.resize(10, 80);
        let before = terminal.mode();
        let mut top = terminal.command().arg("top").spawn().unwrap();
        terminal.see("GUEST");
        kill_process(Pid::from_child(&top), signal).unwrap();
        terminal.see("\x1b[?1049l");
        assert_eq!(top.wait().unwrap().code(), Some(code));
        assert_eq!(terminal.mode(), before);
    }
}
