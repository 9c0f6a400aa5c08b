//! Shows guests on the terminal until the user quits.
//!
//! A thread of its own reads, because guests with much memory take long to read. The calling thread draws, and waits
//! for keys, signals and readings.

use std::os::fd::OwnedFd;
use std::sync::mpsc::{self, Receiver};
use std::time::Duration;
use std::{io, thread};

use ratatui::DefaultTerminal;
use ratatui::crossterm::event;
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::{Errno, read, write};

use super::error::TopError;
use super::options::Options;
use super::reading::{Reader, Reading};
use super::screen::{KeyEffect, Screen};
use host::signals::Signals;

type ReadResult = Result<Reading, TopError>;

/// Restores the terminal when it is dropped. A panic restores it as well, before it is reported.
struct TerminalGuard(DefaultTerminal);

impl TerminalGuard {
    fn enter() -> io::Result<Self> {
        match ratatui::try_init() {
            Ok(terminal) => Ok(Self(terminal)),
            Err(error) => {
                // The terminal may be partly set up.
                let _ = ratatui::try_restore();
                Err(error)
            }
        }
    }
}

impl Drop for TerminalGuard {
    fn drop(&mut self) {
        // A terminal that is gone has nothing to restore.
        let _ = self.0.show_cursor();
        let _ = ratatui::try_restore();
    }
}

/// Starts a thread that reads every `delay`, until the receiver is dropped. The event becomes readable with each
/// reading.
fn start_reading(
    mut reader: Reader,
    delay: Duration,
) -> io::Result<(Receiver<ReadResult>, OwnedFd)> {
    let event = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?;
    let (sender, receiver) = mpsc::channel();
    let tell = event.try_clone()?;
    thread::Builder::new().name("read".into()).spawn(move || {
        while sender.send(reader.read()).is_ok() && write(&tell, &1u64.to_ne_bytes()).is_ok() {
            thread::sleep(delay);
        }
    })?;
    Ok((receiver, event))
}

/// Waits for a key, a signal, a reading or a change of the terminal's size. Returns whether the terminal is still
/// there.
fn wait(signals: &Signals, event: &OwnedFd) -> io::Result<bool> {
    let stdin = io::stdin();
    let mut descriptors = [
        PollFd::new(&stdin, PollFlags::IN),
        PollFd::new(signals, PollFlags::IN),
        PollFd::new(event, PollFlags::IN),
    ];
    match poll(&mut descriptors, None) {
        // A signal has interrupted the call, as the size has changed.
        Err(Errno::INTR) | Ok(_) => {}
        Err(error) => return Err(error.into()),
    }
    let gone = PollFlags::HUP | PollFlags::ERR;
    Ok(!descriptors[0].revents().intersects(gone))
}

/// Shows guests until the user quits. Returns the signal that ended it, if one did.
pub(super) fn show(options: &Options) -> Result<Option<u8>, TopError> {
    let signals = Signals::block().map_err(TopError::Terminal)?;
    let mut terminal = TerminalGuard::enter().map_err(TopError::Terminal)?;
    let (readings, event) =
        start_reading(Reader::default(), options.delay).map_err(TopError::Terminal)?;
    let mut screen = Screen::new(options.sort, options.files);
    loop {
        terminal
            .0
            .draw(|frame| screen.draw(frame))
            .map_err(TopError::Terminal)?;
        let is_there = wait(&signals, &event).map_err(TopError::Terminal)?;
        if let Some(signal) = signals.next() {
            return Ok(Some(signal));
        }
        if !is_there {
            return Ok(None);
        }
        while event::poll(Duration::ZERO).map_err(TopError::Terminal)? {
            let event = event::read().map_err(TopError::Terminal)?;
            if screen.handle(&event) == KeyEffect::Quit {
                return Ok(None);
            }
        }
        // The event is not readable where something else has happened, which is no error.
        let _ = read(&event, &mut [0; 8]);
        for reading in readings.try_iter() {
            screen.show(reading?);
        }
    }
}
