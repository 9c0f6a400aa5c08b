//! This terminal on a guest's serial console.
//!
//! A thread passes on what is typed; this one shows what comes, until the guest ends or the user leaves.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::thread;

use super::RemoteError;
use super::client::Client;
use control::console::{Command, Escape};
use host::terminal::RawMode;

/// The keys.
pub const HELP: &str = "\
Ctrl-A x       leave: the guest goes on
Ctrl-A h       this help
Ctrl-A Ctrl-A  send Ctrl-A to the guest";

/// Passes on what is typed. A pipe that has come to its end leaves the output to be read.
fn pass_on(line: &UnixStream, terminal: bool) {
    let (mut escape, mut typed) = (Escape::default(), [0; 1024]);
    loop {
        let len = match io::stdin().read(&mut typed) {
            Ok(0) | Err(_) => return,
            Ok(len) => len,
        };
        let mut keys = Vec::new();
        let commands = if terminal {
            escape.take(&typed[..len], &mut keys)
        } else {
            keys.extend(&typed[..len]);
            Vec::new()
        };
        let mut line = line;
        if line.write_all(&keys).is_err() {
            return;
        }
        for command in commands {
            match command {
                Command::Quit => {
                    // The other thread sees the end of the line.
                    let _ = line.shutdown(Shutdown::Both);
                    return;
                }
                Command::Help => {
                    let text = format!("\r\n{}\r\n", HELP.replace('\n', "\r\n"));
                    // A help that cannot be shown is no reason to leave.
                    let _ = io::stderr().write_all(text.as_bytes());
                }
            }
        }
    }
}

/// Attaches the terminal.
pub(super) fn attach(client: &Client, id: &str) -> Result<(), RemoteError> {
    let (line, first) = client.console(id)?;
    let raw = RawMode::enter(io::stdin()).map_err(RemoteError::Terminal)?;
    let terminal = raw.is_some();
    if terminal {
        // It is for people: nothing depends on it.
        let _ = io::stderr().write_all(format!("attached to {id}; Ctrl-A x leaves\r\n").as_bytes());
    }
    let typing = line.try_clone().map_err(RemoteError::Host)?;
    // It waits for a key for ever, and ends with the process.
    thread::spawn(move || pass_on(&typing, terminal));
    let mut shown = io::stdout();
    let mut show = |bytes: &[u8]| shown.write_all(bytes).and_then(|()| shown.flush());
    let mut done = show(&first);
    let (mut line, mut chunk) = (line, [0; 4096]);
    while done.is_ok() {
        match line.read(&mut chunk) {
            Ok(0) => break,
            Ok(len) => done = show(&chunk[..len]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // The line is gone, however it went.
            Err(_) => break,
        }
    }
    drop(raw);
    done.map_err(RemoteError::Host)
}
