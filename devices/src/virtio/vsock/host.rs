//! The host's sockets: the one that programs of the host connect to, those that they are reached at, and what wakes the
//! device for them.
//!
//! ```text
//! program ── connect(PATH), "CONNECT port\n" ──> Caller ── the guest accepts ──> "OK port\n"
//! guest ── connects to port N of the host ──> connect(PATH_N)
//! ```
//!
//! The protocol is that of Firecracker's vsock device. All sockets are watched by an epoll instance of the device's
//! own, so that they can go at any time and on any thread; of each the device is told once when it becomes ready
//! (`EPOLLET`), and remembers it.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SocketAddrUnix, SocketFlags, SocketType, connect, recv, socket_with,
};

use super::packet::Key;

/// Programs of the host that have connected and not said yet to which port, at the same time. Further ones are turned
/// away.
const MAX_CALLERS: usize = 8;
/// Longest line of a caller: `CONNECT 4294967295\r\n`.
const LONGEST_CALL: usize = 20;
/// No port (`VMADDR_PORT_ANY`): it stands for what is no connection.
const ANY: u32 = u32::MAX;
const LISTENER: Key = Key {
    guest: ANY,
    host: ANY,
};

/// A client of the host that has connected and has not sent the port that it wants.
struct Caller {
    number: u32,
    stream: UnixStream,
}

/// What has happened to a socket of the host.
pub(super) enum Happened {
    /// A program wants to be connected to a port of the guest.
    Call { stream: UnixStream, port: u32 },
    /// A connection may be read, or written, or its other end is gone.
    Ready {
        key: Key,
        readable: bool,
        gone: bool,
    },
}

pub(super) struct Host {
    epoll: OwnedFd,
    listener: UnixListener,
    path: PathBuf,
    callers: Vec<Caller>,
    next_caller: u32,
}

fn word(key: Key) -> EventData {
    EventData::new_u64(u64::from(key.guest) << 32 | u64::from(key.host))
}

fn key(data: EventData) -> Key {
    let word = data.u64();
    Key {
        guest: (word >> 32) as u32,
        host: word as u32,
    }
}

/// What a caller has said.
enum Call {
    Port(u32),
    Unfinished,
    Wrong,
}

/// Reads the line of a caller, and nothing of what comes behind it, which is the guest's.
fn hear(stream: &UnixStream) -> Call {
    let mut line = [0; LONGEST_CALL];
    let flags = RecvFlags::DONTWAIT | RecvFlags::PEEK;
    let len = match recv(stream, &mut line, flags) {
        Ok((len, _)) if len > 0 => len,
        Err(Errno::AGAIN | Errno::INTR) => return Call::Unfinished,
        Ok(_) | Err(_) => return Call::Wrong,
    };
    let said = &line[..len];
    let Some(end) = said.iter().position(|byte| *byte == b'\n') else {
        return if len < LONGEST_CALL {
            Call::Unfinished
        } else {
            Call::Wrong
        };
    };
    let text = std::str::from_utf8(&said[..end]).unwrap_or_default();
    let (command, port) = text.trim_end().split_once(' ').unwrap_or_default();
    let port = port.trim().parse().ok().filter(|port| *port != ANY);
    let Some(port) = port.filter(|_| command.eq_ignore_ascii_case("connect")) else {
        return Call::Wrong;
    };
    let mut taken = [0; LONGEST_CALL];
    match recv(stream, &mut taken[..=end], RecvFlags::DONTWAIT) {
        Ok((len, _)) if len == end + 1 => Call::Port(port),
        Ok(_) | Err(_) => Call::Wrong,
    }
}

impl Host {
    /// Programs connect to `listener`, which is at `path`.
    pub(super) fn new(listener: UnixListener, path: &Path) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        epoll::add(&epoll, &listener, word(LISTENER), EventFlags::IN)?;
        Ok(Self {
            epoll,
            listener,
            path: path.to_owned(),
            callers: Vec::new(),
            next_caller: 0,
        })
    }

    /// Readable when [`Host::poll`] has an event.
    pub(super) fn as_raw_fd(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }

    /// Watches a connection; an event that is pending already is reported too.
    pub(super) fn watch(&self, stream: &UnixStream, key: Key) -> io::Result<()> {
        let flags = EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET;
        Ok(epoll::add(&self.epoll, stream, word(key), flags)?)
    }

    /// No longer.
    pub(super) fn unwatch(&self, stream: &UnixStream) {
        // It goes with its last file descriptor all the same.
        let _ = epoll::delete(&self.epoll, stream);
    }

    /// What has happened: some of it, and the rest at the next call.
    pub(super) fn poll(&mut self) -> Vec<Happened> {
        let mut events = [MaybeUninit::<epoll::Event>::uninit(); 16];
        let Ok((events, _)) = epoll::wait(
            &self.epoll,
            events.as_mut_slice(),
            Some(&Timespec::default()),
        ) else {
            return Vec::new();
        };
        let mut happened = Vec::new();
        for event in &*events {
            let (flags, key) = (event.flags, key(event.data));
            if key == LISTENER {
                self.accept();
            } else if key.guest == ANY {
                let ends = EventFlags::RDHUP | EventFlags::HUP | EventFlags::ERR;
                happened.extend(self.listen_to(key.host, flags.intersects(ends)));
            } else {
                let read = EventFlags::IN | EventFlags::RDHUP;
                let gone = EventFlags::HUP | EventFlags::ERR;
                happened.push(Happened::Ready {
                    key,
                    readable: flags.intersects(read),
                    gone: flags.intersects(gone),
                });
            }
        }
        happened
    }

    fn accept(&mut self) {
        let stream = match self.listener.accept() {
            Ok((stream, _)) => stream,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
            Err(error) => {
                crate::limited!(warn, error = %report::chain(&error), "a vsock client cannot be accepted");
                return;
            }
        };
        if self.callers.len() >= MAX_CALLERS {
            crate::limited!(
                warn,
                "a vsock client is turned away: {MAX_CALLERS} have not said CONNECT"
            );
            return;
        }
        let number = self.next_caller;
        // One that is still there has gone by long before the number comes again.
        self.next_caller = (number + 1) % ANY;
        let key = Key {
            guest: ANY,
            host: number,
        };
        let flags = EventFlags::IN | EventFlags::RDHUP | EventFlags::ET;
        let watched = stream
            .set_nonblocking(true)
            .and_then(|()| Ok(epoll::add(&self.epoll, &stream, word(key), flags)?));
        match watched {
            Ok(()) => self.callers.push(Caller { number, stream }),
            Err(error) => {
                crate::limited!(warn, error = %report::chain(&error), "a vsock client cannot be served");
            }
        }
    }

    fn listen_to(&mut self, number: u32, ends: bool) -> Option<Happened> {
        let mut callers = self.callers.iter();
        let at = callers.position(|caller| caller.number == number)?;
        match hear(&self.callers[at].stream) {
            Call::Unfinished if !ends => None,
            Call::Unfinished | Call::Wrong => {
                self.callers.swap_remove(at);
                None
            }
            Call::Port(port) => {
                let stream = self.callers.swap_remove(at).stream;
                self.unwatch(&stream);
                Some(Happened::Call { stream, port })
            }
        }
    }

    /// Connects to the program of the host that listens for `port`. Does not wait.
    pub(super) fn connect(&self, port: u32) -> io::Result<UnixStream> {
        let mut path = self.path.clone().into_os_string();
        path.push(format!("_{port}"));
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        connect(&socket, &SocketAddrUnix::new(path)?)?;
        Ok(socket.into())
    }
}
