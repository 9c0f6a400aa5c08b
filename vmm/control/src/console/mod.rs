//! The guest's serial console on standard input and output.
//!
//! ```text
//! stdin ── escape ──> pending ──> SerialInput (the UART) ── drained ──> more of pending
//!             └─ quit, help
//! ```
//!
//! The main thread owns all of it, through the event loop. A terminal is read at all times, so that `Ctrl-A x` is heard
//! however little the guest reads, and what is typed beyond [`TYPED_AHEAD`] bytes is lost, as on a real line. Anything
//! else, a pipe or a file, is read only as fast as the guest takes it, from the guest's start on, and nothing of it is
//! lost.

mod escape;
mod socket;

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use rustix::io::Errno;
use rustix::process::getpgrp;
use rustix::termios::{isatty, tcgetpgrp};
use vmm_sys_util::eventfd::EventFd;

use devices::legacy::SerialConsole;
use host::report::chain;

pub use escape::{Command, Escape, HELP};
pub use socket::ConsoleSocket;

/// How many bytes may be typed before the guest reads them.
pub const TYPED_AHEAD: usize = 16 * 1024;
const CHUNK: usize = 1024;

/// Where input goes.
pub trait SerialInput: Send {
    /// Gives bytes to the guest; returns how many it had room for. When it takes fewer than all, its `drained` event
    /// fires as soon as there is room.
    fn input(&mut self, bytes: &[u8]) -> usize;
}

impl SerialInput for SerialConsole {
    fn input(&mut self, bytes: &[u8]) -> usize {
        SerialConsole::input(self, bytes)
    }
}

/// How the input is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    /// When epoll reports it readable.
    Polled,
    /// Whenever the guest takes more: a file, which epoll does not take.
    Ready,
    /// Not at the moment: the guest has to take what was read before.
    Paused,
    /// It has come to its end.
    Ended,
}

/// The input of a serial console, served by the event loop.
pub struct Console {
    input: OwnedFd,
    terminal: bool,
    source: Source,
    escape: Escape,
    pending: Vec<u8>,
    serial: Option<Box<dyn SerialInput>>,
    /// Fires when the serial port has room again, or a serial port has come.
    drained: EventFd,
    on_quit: Arc<dyn Fn() + Send + Sync>,
}

impl Console {
    /// A console that reads `input`. `on_quit` is called for `Ctrl-A x`.
    ///
    /// # Errors
    /// Where the host has no file descriptor left.
    pub fn new(input: OwnedFd, on_quit: Arc<dyn Fn() + Send + Sync>) -> io::Result<Self> {
        let terminal = isatty(&input);
        Ok(Self {
            input,
            terminal,
            source: Source::Paused,
            escape: Escape::default(),
            pending: Vec::new(),
            serial: None,
            drained: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
            on_quit,
        })
    }

    /// The event to fire when the serial port has room.
    ///
    /// # Errors
    /// Where the host has no file descriptor left.
    pub fn drained(&self) -> io::Result<EventFd> {
        self.drained.try_clone()
    }

    /// The guest's serial port is there: input goes to it from now on.
    pub fn connect(&mut self, serial: Box<dyn SerialInput>) {
        self.serial = Some(serial);
        if let Err(error) = self.drained.write(1) {
            tracing::warn!(error = %chain(&error), "console input waits");
        }
    }

    /// Takes input from elsewhere, such as a socket. What is beyond [`TYPED_AHEAD`] bytes, or comes before the guest is
    /// there, is lost.
    pub fn feed(&mut self, typed: &[u8]) {
        if self.serial.is_some() {
            self.pending.extend(typed);
            self.pending.truncate(TYPED_AHEAD);
            self.give();
        }
    }

    /// Reads once. Returns false where there is nothing more to read now.
    fn read(&mut self) -> bool {
        let mut chunk = [0; CHUNK];
        let len = match rustix::io::read(&self.input, &mut chunk) {
            Ok(len) => len,
            Err(Errno::AGAIN | Errno::INTR) => return false,
            Err(error) => {
                tracing::debug!(error = %chain(&error), "console input ends");
                0
            }
        };
        let Some(typed) = chunk.get(..len).filter(|typed| !typed.is_empty()) else {
            self.source = Source::Ended;
            return false;
        };
        for command in self.escape.take(typed, &mut self.pending) {
            match command {
                Command::Quit => (self.on_quit)(),
                Command::Help => show_help(),
            }
        }
        if self.terminal {
            if self.serial.is_none() {
                // Nobody is there to read it.
                self.pending.clear();
            }
            self.pending.truncate(TYPED_AHEAD);
        }
        true
    }

    /// Gives the guest what it takes; returns whether nothing is left.
    fn give(&mut self) -> bool {
        if let Some(serial) = &mut self.serial
            && !self.pending.is_empty()
        {
            let accepted = serial.input(&self.pending).min(self.pending.len());
            self.pending.drain(..accepted);
        }
        self.pending.is_empty()
    }

    /// Starts and stops to poll the input, as the guest takes it.
    fn balance(&mut self, ops: &mut EventOps) {
        let mut empty = self.give();
        while empty && self.source == Source::Ready && self.serial.is_some() && self.read() {
            empty = self.give();
        }
        let wanted = self.terminal || (empty && self.serial.is_some());
        match (self.source, wanted) {
            (Source::Paused, true) => match ops.add(Events::new(&self.input, EventSet::IN)) {
                Ok(()) => self.source = Source::Polled,
                // A regular file and /dev/null are always ready, so epoll does not take them.
                Err(event_manager::Error::Epoll(error)) if error.errno() == libc::EPERM => {
                    self.source = Source::Ready;
                    self.balance(ops);
                }
                Err(error) => {
                    tracing::warn!(error = %chain(&error), "console input cannot be read");
                }
            },
            (Source::Polled, false) => {
                self.stop_polling(ops);
                self.source = Source::Paused;
            }
            (Source::Paused | Source::Ready | Source::Ended, false)
            | (Source::Polled | Source::Ready | Source::Ended, true) => {}
        }
    }

    fn stop_polling(&self, ops: &mut EventOps) {
        if let Err(error) = ops.remove(Events::empty(&self.input)) {
            tracing::warn!(error = %chain(&error), "console input cannot be left alone");
        }
    }
}

/// Shows the keys on standard error, which is the user's even where standard output is a file.
fn show_help() {
    let text = format!("\r\n{}\r\n", HELP.replace('\n', "\r\n"));
    if let Err(error) = io::stderr().write_all(text.as_bytes()) {
        tracing::debug!(error = %chain(&error), "the help cannot be shown");
    }
}

impl MutEventSubscriber for Console {
    fn process(&mut self, events: Events, ops: &mut EventOps) {
        if events.fd() == self.drained.as_raw_fd() {
            // Only read to wait for the next; it may be there for no reason.
            let _ = self.drained.read();
        } else {
            self.read();
            if self.source == Source::Ended {
                self.stop_polling(ops);
            }
        }
        self.balance(ops);
    }

    fn init(&mut self, ops: &mut EventOps) {
        if let Err(error) = ops.add(Events::new(&self.drained, EventSet::IN)) {
            tracing::warn!(error = %chain(&error), "console input cannot be given to the guest");
        }
        self.balance(ops);
    }
}

/// Standard input as a descriptor of its own. A process in the background (`coppice run ... &`) gets `/dev/null` for
/// its terminal: that is somebody else's then, and reading it, or making it raw, would stop the one or upset the other.
///
/// # Errors
/// Where the host has no file descriptor left.
pub fn stdin() -> io::Result<OwnedFd> {
    let input = io::stdin();
    // An error says that it is no terminal, or not the one that controls this process.
    if tcgetpgrp(&input).is_ok_and(|foreground| foreground != getpgrp()) {
        tracing::info!("in the background: the console has no input");
        return Ok(File::open("/dev/null")?.into());
    }
    Ok(rustix::io::fcntl_dupfd_cloexec(input.as_fd(), 0)?)
}

/// Standard output as a descriptor of its own.
///
/// # Errors
/// Where the host has no file descriptor left.
pub fn stdout() -> io::Result<OwnedFd> {
    Ok(rustix::io::fcntl_dupfd_cloexec(io::stdout().as_fd(), 0)?)
}

#[cfg(test)]
mod tests;
