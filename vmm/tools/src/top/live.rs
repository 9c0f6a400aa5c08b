//! The terminal, from the first look until the user quits.
//!
//! A thread reads, as guests with much memory take their time; the calling thread draws, and waits for keys, signals
//! and readings.

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
use super::screen::{Outcome, Screen};
use host::signals::Signals;

type Told = Result<Reading, TopError>;

/// The terminal is as it was once this is dropped; a panic restores it as well, before it is reported.
struct Restored(DefaultTerminal);

impl Restored {
    fn enter() -> io::Result<Self> {
        match ratatui::try_init() {
            Ok(terminal) => Ok(Self(terminal)),
            Err(error) => {
                // It may be half done.
                let _ = ratatui::try_restore();
                Err(error)
            }
        }
    }
}

impl Drop for Restored {
    fn drop(&mut self) {
        // A terminal that is gone has nothing to restore.
        let _ = self.0.show_cursor();
        let _ = ratatui::try_restore();
    }
}

/// Reads every `delay` until nobody listens. The event tells of each reading.
fn start_reading(mut reader: Reader, delay: Duration) -> io::Result<(Receiver<Told>, OwnedFd)> {
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

/// Waits for the first of keys, a signal and a reading, or a change of the terminal's size. Whether the terminal is
/// still there.
fn wait(signals: &Signals, event: &OwnedFd) -> io::Result<bool> {
    let stdin = io::stdin();
    let mut descriptors = [
        PollFd::new(&stdin, PollFlags::IN),
        PollFd::new(signals, PollFlags::IN),
        PollFd::new(event, PollFlags::IN),
    ];
    match poll(&mut descriptors, None) {
        // The size has changed.
        Err(Errno::INTR) | Ok(_) => {}
        Err(error) => return Err(error.into()),
    }
    let gone = PollFlags::HUP | PollFlags::ERR;
    Ok(!descriptors[0].revents().intersects(gone))
}

/// Shows guests until the user quits; the signal that ended it, if one did.
pub(super) fn show(options: &Options) -> Result<Option<u8>, TopError> {
    let signals = Signals::block().map_err(TopError::Terminal)?;
    let mut terminal = Restored::enter().map_err(TopError::Terminal)?;
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
            if screen.take(&event) == Outcome::Quit {
                return Ok(None);
            }
        }
        // There is nothing in it where something else has happened.
        let _ = read(&event, &mut [0; 8]);
        for reading in readings.try_iter() {
            screen.show(reading?);
        }
    }
}
