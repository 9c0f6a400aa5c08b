//! The serial console on a Unix socket, for any number of programs that come and go.
//!
//! ```text
//! UART ── pipe ──> history (a ring) ──> each client, as fast as it reads
//!                      └──> the file of --serial, if there is one
//! client ──> Console::feed ──> UART
//! ```
//!
//! The event loop serves all of it. The pipe is emptied whatever the clients do: a client is a place in the history, so
//! that one that reads too slowly loses output, takes no memory for it, and never holds up the guest.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use rustix::io::Errno;
use rustix::net::SendFlags;
use rustix::pipe::{PipeFlags, pipe_with};

use super::Console;
use host::report::chain;

/// How much of the output a client is shown that comes later, in bytes; and how far one may lag behind.
pub const HISTORY: usize = 32 << 10;
/// Clients at the same time. Further ones are turned away.
const MAX_CLIENTS: usize = 16;
const CHUNK: usize = 4096;

/// The last output of the guest. Takes memory as it fills.
#[derive(Default)]
struct History {
    bytes: VecDeque<u8>,
    /// Bytes that have ever been added.
    total: u64,
}

impl History {
    fn push(&mut self, bytes: &[u8]) {
        self.total += bytes.len() as u64;
        let kept = &bytes[bytes.len().saturating_sub(HISTORY)..];
        let excess = (self.bytes.len() + kept.len()).saturating_sub(HISTORY);
        self.bytes.drain(..excess);
        self.bytes.extend(kept);
    }

    /// The place of the oldest byte.
    fn start(&self) -> u64 {
        self.total - self.bytes.len() as u64
    }

    /// Some bytes from `place` on, which is not before the start.
    fn from(&self, place: u64) -> &[u8] {
        // Both are places in memory.
        let skipped = (place - self.start()) as usize;
        let (first, second) = self.bytes.as_slices();
        match first.get(skipped..) {
            Some(rest) if !rest.is_empty() => rest,
            _ => second.get(skipped - first.len()..).unwrap_or_default(),
        }
    }
}

struct Client {
    stream: UnixStream,
    /// What it is sent next, as a place in the history.
    place: u64,
    waits_for_room: bool,
}

/// What has become of a client.
#[derive(PartialEq, Eq)]
enum Fate {
    Stays,
    Gone,
}

impl Client {
    /// Sends what it takes.
    fn send(&mut self, history: &History) -> Fate {
        self.place = self.place.max(history.start());
        self.waits_for_room = false;
        loop {
            let bytes = history.from(self.place);
            if bytes.is_empty() {
                return Fate::Stays;
            }
            match rustix::net::send(&self.stream, bytes, SendFlags::NOSIGNAL) {
                Ok(sent) => self.place += sent as u64,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    self.waits_for_room = true;
                    return Fate::Stays;
                }
                Err(_) => return Fate::Gone,
            }
        }
    }

    fn events(&self) -> Events {
        let room = if self.waits_for_room {
            EventSet::OUT
        } else {
            EventSet::empty()
        };
        Events::new(&self.stream, EventSet::IN | room)
    }
}

/// A console that is listened to. Dropping it leaves the file of the socket to its owner.
pub struct ConsoleSocket {
    listener: UnixListener,
    /// Where the guest's serial port writes.
    guest_end: OwnedFd,
    output: OwnedFd,
    file: Option<File>,
    history: History,
    clients: Vec<Client>,
    console: Arc<Mutex<Console>>,
}

impl ConsoleSocket {
    /// Serves `listener`; what clients write goes to `console`.
    ///
    /// # Errors
    /// Where the host has no file descriptor left.
    pub fn new(listener: UnixListener, console: Arc<Mutex<Console>>) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        let (output, guest_end) = pipe_with(PipeFlags::CLOEXEC)?;
        rustix::io::ioctl_fionbio(&output, true)?;
        Ok(Self {
            listener,
            guest_end,
            output,
            file: None,
            history: History::default(),
            clients: Vec::new(),
            console,
        })
    }

    /// The end that a serial port writes to. Its output is appended to `file` as well, if there is one.
    ///
    /// # Errors
    /// Where the host has no file descriptor left.
    pub fn serial_out(&mut self, file: Option<File>) -> io::Result<OwnedFd> {
        self.file = file;
        self.guest_end.try_clone()
    }

    /// Hands on what the guest has written.
    fn drain(&mut self) {
        let mut chunk = [0; CHUNK];
        loop {
            match rustix::io::read(&self.output, &mut chunk) {
                Ok(len) if len > 0 => {
                    let bytes = &chunk[..len];
                    self.history.push(bytes);
                    if let Some(file) = &mut self.file
                        && let Err(error) = io::Write::write_all(file, bytes)
                    {
                        tracing::debug!(error = %chain(&error), "serial output is lost");
                    }
                }
                Err(Errno::INTR) => {}
                Ok(_) | Err(_) => return,
            }
        }
    }

    /// The last words: what is still on its way goes to those that take it at once.
    pub fn finish(&mut self) {
        self.drain();
        for client in &mut self.clients {
            client.send(&self.history);
        }
    }

    fn accept(&mut self, ops: &mut EventOps) {
        loop {
            let stream = match self.listener.accept() {
                Ok((stream, _)) => stream,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) => {
                    tracing::warn!(error = %chain(&error), "a console client cannot be accepted");
                    return;
                }
            };
            if self.clients.len() >= MAX_CLIENTS {
                tracing::warn!("a console client is turned away: there are {MAX_CLIENTS}");
                continue;
            }
            if let Err(error) = stream.set_nonblocking(true) {
                tracing::warn!(error = %chain(&error), "a console client cannot be served");
                continue;
            }
            let mut client = Client {
                stream,
                place: self.history.start(),
                waits_for_room: false,
            };
            if client.send(&self.history) == Fate::Gone {
                continue;
            }
            match ops.add(client.events()) {
                Ok(()) => self.clients.push(client),
                Err(error) => {
                    tracing::warn!(error = %chain(&error), "a console client cannot be served");
                }
            }
        }
    }

    /// Gives the guest what a client has written.
    fn receive(&mut self, at: usize) -> Fate {
        let mut chunk = [0; CHUNK];
        match rustix::io::read(&self.clients[at].stream, &mut chunk) {
            Ok(0) => Fate::Gone,
            Ok(len) => {
                devices::lock(&self.console).feed(&chunk[..len]);
                Fate::Stays
            }
            Err(Errno::AGAIN | Errno::INTR) => Fate::Stays,
            Err(_) => Fate::Gone,
        }
    }

    fn part(&mut self, at: usize, ops: &mut EventOps) {
        let client = self.clients.swap_remove(at);
        if let Err(error) = ops.remove(Events::empty(&client.stream)) {
            tracing::debug!(error = %chain(&error), "a console client cannot be left alone");
        }
    }

    /// Sends all clients what they take, and waits for room where they take no more.
    fn send(&mut self, ops: &mut EventOps) {
        for at in (0..self.clients.len()).rev() {
            let client = &mut self.clients[at];
            let waited = client.waits_for_room;
            if client.send(&self.history) == Fate::Gone {
                self.part(at, ops);
            } else if waited != client.waits_for_room
                && let Err(error) = ops.modify(client.events())
            {
                tracing::warn!(error = %chain(&error), "a console client cannot be served");
                self.part(at, ops);
            }
        }
    }

    fn client(&self, fd: RawFd) -> Option<usize> {
        let mut clients = self.clients.iter();
        clients.position(|client| client.stream.as_raw_fd() == fd)
    }
}

impl MutEventSubscriber for ConsoleSocket {
    fn process(&mut self, events: Events, ops: &mut EventOps) {
        let fd = events.fd();
        if fd == self.listener.as_raw_fd() {
            self.accept(ops);
        } else if fd == self.output.as_raw_fd() {
            self.drain();
            self.send(ops);
        } else if let Some(at) = self.client(fd) {
            let others = EventSet::IN | EventSet::HANG_UP | EventSet::ERROR;
            if events.event_set().intersects(others) && self.receive(at) == Fate::Gone {
                self.part(at, ops);
            }
            self.send(ops);
        }
    }

    fn init(&mut self, ops: &mut EventOps) {
        for fd in [self.listener.as_raw_fd(), self.output.as_raw_fd()] {
            if let Err(error) = ops.add(Events::new_raw(fd, EventSet::IN)) {
                tracing::warn!(error = %chain(&error), "the console socket cannot be served");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use event_manager::{EventManager, SubscriberOps};

    use super::*;
    use crate::console::SerialInput;

    #[derive(Clone, Default)]
    struct Port(Arc<Mutex<Vec<u8>>>);

    impl SerialInput for Port {
        fn input(&mut self, bytes: &[u8]) -> usize {
            self.0.lock().unwrap().extend(bytes);
            bytes.len()
        }
    }

    struct Bench {
        manager: EventManager<Arc<Mutex<dyn MutEventSubscriber>>>,
        serial: File,
        port: Port,
        path: std::path::PathBuf,
        _folder: tempfile::TempDir,
    }

    impl Bench {
        fn new() -> Self {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("s");
            let listener = UnixListener::bind(&path).unwrap();
            let input = File::open("/dev/null").unwrap().into();
            let console = Console::new(input, Arc::new(|| {})).unwrap();
            let console = Arc::new(Mutex::new(console));
            let port = Port::default();
            console.lock().unwrap().connect(Box::new(port.clone()));
            let mut socket = ConsoleSocket::new(listener, console).unwrap();
            let serial = File::from(socket.serial_out(None).unwrap());
            let mut manager = EventManager::<Arc<Mutex<dyn MutEventSubscriber>>>::new().unwrap();
            manager.add_subscriber(Arc::new(Mutex::new(socket)));
            Self {
                manager,
                serial,
                port,
                path,
                _folder: folder,
            }
        }

        fn run_until_idle(&mut self) {
            while self.manager.run_with_timeout(0).unwrap() > 0 {}
        }

        fn client(&mut self) -> UnixStream {
            let client = UnixStream::connect(&self.path).unwrap();
            self.run_until_idle();
            client
        }

        fn print(&mut self, bytes: &[u8]) {
            for chunk in bytes.chunks(CHUNK) {
                self.serial.write_all(chunk).unwrap();
                self.run_until_idle();
            }
        }
    }

    #[test]
    fn a_late_client_gets_the_last_output_and_then_the_rest() {
        let mut bench = Bench::new();
        bench.print(b"boot\n");
        let mut clients = [bench.client(), bench.client()];
        bench.print(b"login: ");
        for client in &mut clients {
            let mut shown = [0; 12];
            client.read_exact(&mut shown).unwrap();
            assert_eq!(&shown, b"boot\nlogin: ");
        }
        clients[1].write_all(b"root\n").unwrap();
        bench.run_until_idle();
        assert_eq!(*bench.port.0.lock().unwrap(), b"root\n");
        drop(clients);
        bench.run_until_idle();
        bench.print(b"nobody is there");
    }

    #[test]
    fn a_client_that_does_not_read_loses_output_and_holds_up_nobody() {
        let mut bench = Bench::new();
        let mut slow = bench.client();
        let text: Vec<u8> = (0..2_000_000_u32).map(|n| b'a' + (n % 23) as u8).collect();
        bench.print(&text);
        bench.print(b"the end");
        slow.set_nonblocking(true).unwrap();
        let mut shown = Vec::new();
        while !shown.ends_with(b"the end") {
            let mut chunk = [0; 10_000];
            match slow.read(&mut chunk) {
                Ok(len) => shown.extend(&chunk[..len]),
                Err(error) => assert_eq!(error.kind(), io::ErrorKind::WouldBlock),
            }
            bench.run_until_idle();
        }
        assert!(shown.len() < text.len());
        let mut late = bench.client();
        let mut shown = vec![0; HISTORY];
        late.read_exact(&mut shown).unwrap();
        assert!(shown.ends_with(b"the end"));
    }

    #[test]
    fn too_many_clients_are_turned_away() {
        let mut bench = Bench::new();
        let clients: Vec<_> = (0..MAX_CLIENTS).map(|_| bench.client()).collect();
        assert_eq!(bench.client().read(&mut [0]).unwrap(), 0);
        drop(clients);
        bench.run_until_idle();
        let mut client = bench.client();
        bench.print(b"x");
        client.read_exact(&mut [0]).unwrap();
    }
}
