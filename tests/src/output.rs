//! The output of programs, which one thread reads for all of them: a thread for each would be memory that a guest seems
//! to take.

use std::io::{PipeReader, PipeWriter, Read, Write};
use std::os::fd::OwnedFd;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};

use crate::result::Failure;

/// The text that was read of a program so far.
#[derive(Default)]
pub struct OutputBuffer {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    text: String,
    ended: bool,
}

impl OutputBuffer {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The text that was read so far.
    pub fn text(&self) -> String {
        self.lock().text.clone()
    }

    /// Whether the source has ended.
    pub fn has_ended(&self) -> bool {
        self.lock().ended
    }

    /// Waits until the source has ended, and all of it was read.
    pub fn wait_for_end(&self) {
        let state = self.lock();
        drop(self.changed.wait_while(state, |state| !state.ended));
    }

    /// Waits until the text contains `expected`; `false` where the source ends before that, or `patience` does.
    pub fn wait_for(&self, expected: &str, patience: Duration) -> bool {
        let begun = Instant::now();
        let mut state = self.lock();
        while !state.text.contains(expected) {
            let left = patience.saturating_sub(begun.elapsed());
            if state.ended || left.is_zero() {
                return false;
            }
            state = self
                .changed
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        true
    }

    /// Begins to read a source into the buffer.
    pub fn follow(self: &Arc<Self>, source: OwnedFd) -> Result<(), Failure> {
        static FOLLOWER: Mutex<Option<Follower>> = Mutex::new(None);
        let mut follower = FOLLOWER.lock().unwrap_or_else(PoisonError::into_inner);
        if follower.is_none() {
            *follower = Some(Follower::start()?);
        }
        let source = (source, self.clone());
        follower.as_mut().map_or(Ok(()), |it| it.add(source))
    }

    /// Reads once from a source that is readable; `false` at its end.
    fn read_once(&self, source: &OwnedFd) -> bool {
        let mut bytes = [0; 4096];
        // A source that fails has ended.
        let len = rustix::io::read(source, &mut bytes).unwrap_or(0);
        let mut state = self.lock();
        state.text.push_str(&String::from_utf8_lossy(&bytes[..len]));
        state.ended = len == 0;
        self.changed.notify_all();
        len > 0
    }
}

/// A source, and the buffer that it is read into.
type Source = (OwnedFd, Arc<OutputBuffer>);

/// The thread that reads all sources.
struct Follower {
    added: Sender<Source>,
    /// Wakes the thread up, so that it takes the sources that were added.
    wake: PipeWriter,
}

impl Follower {
    fn start() -> Result<Self, Failure> {
        let (woken, wake) = std::io::pipe().map_err(Failure::io("make a pipe"))?;
        let (added, taken) = channel();
        std::thread::spawn(move || follow_all(&taken, woken));
        Ok(Self { added, wake })
    }

    fn add(&mut self, source: Source) -> Result<(), Failure> {
        let lost = || Failure::Claim("the reader of consoles has ended".to_owned());
        self.added.send(source).map_err(|_| lost())?;
        let woken = self.wake.write_all(&[0]);
        woken.map_err(Failure::io("wake the reader of consoles"))
    }
}

fn follow_all(added: &Receiver<Source>, mut woken: PipeReader) {
    let mut sources: Vec<Source> = Vec::new();
    loop {
        let mut fds = vec![PollFd::new(&woken, PollFlags::IN)];
        let theirs = sources.iter().map(|(fd, _)| PollFd::new(fd, PollFlags::IN));
        fds.extend(theirs);
        // After an interruption no source is ready.
        let _ = poll(&mut fds, None);
        let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        let mut ready = ready.into_iter();
        if ready.next() == Some(true) {
            // There is a byte for each source that was added. If some are left, the next poll returns at once.
            let _ = woken.read(&mut [0; 64]);
        }
        sources.retain(|(fd, text)| ready.next() != Some(true) || text.read_once(fd));
        sources.extend(added.try_iter());
    }
}
