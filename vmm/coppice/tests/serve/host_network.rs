//! A network namespace for a test: what its daemon does to the host's network is done to that one alone.

use std::path::Path;
use std::process::Command;

use rustix::thread::{UnshareFlags, unshare_unsafe};

/// Runs a test, with its daemons, in a network namespace of its own with one way out, where the machine allows that.
pub fn in_namespace(test: impl FnOnce() + Send + 'static) {
    if !skip::unless_root() {
        return;
    }
    if !Path::new("/dev/net/tun").exists() {
        return skip::because("there is no /dev/net/tun");
    }
    for program in ["nft", "ip"] {
        if Command::new(program).arg("-V").output().is_err() {
            return skip::because(&format!("there is no program {program}"));
        }
    }
    let name = std::thread::current().name().unwrap_or_default().to_owned();
    let in_thread = std::thread::Builder::new().name(name).spawn(|| {
        // SAFETY: only the network namespace of this thread changes, and no descriptor of the old one is used in it.
        unsafe { unshare_unsafe(UnshareFlags::NEWNET) }.unwrap();
        for line in [
            "link set lo up",
            "tuntap add out0 mode tap",
            "link set out0 up",
            "address add 192.0.2.1/24 dev out0",
            "route add default via 192.0.2.2",
        ] {
            ip(line);
        }
        test();
    });
    if let Err(panic) = in_thread.unwrap().join() {
        std::panic::resume_unwind(panic);
    }
}

fn run(program: &str, arguments: &str) -> String {
    let output = Command::new(program)
        .args(arguments.split(' '))
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments}: {said}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Runs ip(8). Gives what it prints.
pub fn ip(arguments: &str) -> String {
    run("ip", arguments)
}

/// Runs nft(8). Gives what it prints.
pub fn nft(arguments: &str) -> String {
    run("nft", arguments)
}

/// What the host has of networks: interfaces, addresses, routes, neighbours and rules, without their counters.
pub fn state() -> String {
    let listed = [
        "-br address",
        "-4 route",
        "-6 route",
        "-6 route show type unreachable",
        "neighbour show nud permanent",
    ];
    let all = listed.map(ip).join("\n") + &nft("list ruleset");
    let lines = all.lines().filter(|line| !line.contains("packets"));
    lines.fold(String::new(), |text, line| text + line + "\n")
}

/// The taps that a process has open.
pub fn taps_of(pid: u32) -> Vec<String> {
    let descriptors = std::fs::read_dir(format!("/proc/{pid}/fdinfo")).unwrap();
    let texts = descriptors
        .flatten()
        .filter_map(|entry| std::fs::read_to_string(entry.path()).ok());
    let name = |text: String| {
        let line = text.lines().find_map(|line| line.strip_prefix("iff:"))?;
        Some(line.trim().to_owned())
    };
    texts.filter_map(name).collect()
}
