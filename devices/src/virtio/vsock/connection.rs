//! One connection: what each side may still send, and what has not got through yet.
//!
//! ```text
//! guest ── packets ──> buffer, for what the host's socket does not take at once ──> socket
//! guest <── packets ── socket: read when the guest has room, and not before
//! ```
//!
//! The buffer is no longer than the room that the guest is told of (`buf_alloc`), and there is none while the socket
//! takes what comes.

use std::collections::VecDeque;
use std::os::unix::net::UnixStream;

use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, Shutdown};

use super::packet::{Header, Op, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};
use crate::service::Session;

/// The host's side of a connection.
pub(super) enum Peer {
    /// A socket, which does not block.
    Stream(UnixStream),
    /// A service of this process.
    Service(Box<dyn Session>),
}

/// The connection is broken: it is closed on both sides.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Broken;

impl Peer {
    /// Gives it bytes; how many it takes now.
    fn offer(&mut self, bytes: &[u8]) -> Result<usize, Broken> {
        let stream = match self {
            Self::Stream(stream) => stream,
            Self::Service(session) => {
                session.receive(bytes);
                return Ok(bytes.len());
            }
        };
        let mut taken = 0;
        while let Some(rest) = bytes.get(taken..).filter(|rest| !rest.is_empty()) {
            match rustix::net::send(&*stream, rest, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
                Ok(len) => taken += len,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                Err(_) => return Err(Broken),
            }
        }
        Ok(taken)
    }
}

/// A packet that is to be sent, but for its ports.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Due {
    pub(super) op: Op,
    pub(super) flags: u32,
    /// Bytes of payload.
    pub(super) len: usize,
}

impl Due {
    fn plain(op: Op) -> Self {
        Self {
            op,
            flags: 0,
            len: 0,
        }
    }
}

/// Where a connection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// The guest is to be asked whether it takes it.
    ToRequest,
    /// It has been asked.
    Requested,
    /// It has asked, and is to be answered.
    ToRespond,
    /// Both sides have it.
    Open,
}

pub(super) struct Connection {
    peer: Peer,
    stage: Stage,
    /// What the host has not taken yet.
    buffer: VecDeque<u8>,
    /// The room that the guest is granted (`buf_alloc`).
    buf_alloc: u32,
    /// Bytes that the host has taken, and how many of them the guest knows of; modulo 2^32.
    fwd_cnt: u32,
    fwd_told: u32,
    /// Room of the guest, bytes that have left it, and bytes that it was sent; the last two modulo 2^32.
    guest_alloc: u32,
    guest_fwd: u32,
    sent: u32,
    /// There may be something to read.
    readable: bool,
    /// The host sends no more, and takes no more.
    host_done: u32,
    /// The value that the guest has been sent.
    told: u32,
    /// What the guest does no more.
    guest_done: u32,
    credit_asked: bool,
    credit_due: bool,
}

impl Connection {
    /// Of a guest that may send `buf_alloc` bytes at first.
    pub(super) fn new(peer: Peer, stage: Stage, buf_alloc: u32) -> Self {
        Self {
            peer,
            stage,
            buffer: VecDeque::new(),
            buf_alloc,
            fwd_cnt: 0,
            fwd_told: 0,
            guest_alloc: 0,
            guest_fwd: 0,
            sent: 0,
            readable: true,
            host_done: 0,
            told: 0,
            guest_done: 0,
            credit_asked: false,
            credit_due: false,
        }
    }

    pub(super) fn stage(&self) -> Stage {
        self.stage
    }

    pub(super) fn is_service(&self) -> bool {
        matches!(self.peer, Peer::Service(_))
    }

    /// The room that was set aside for it.
    pub(super) fn buf_alloc(&self) -> u32 {
        self.buf_alloc
    }

    /// Whether the guest has closed its side, and the host has taken all.
    pub(super) fn is_over(&self) -> bool {
        self.guest_done == SHUTDOWN_RECEIVE | SHUTDOWN_SEND && self.buffer.is_empty()
    }

    /// The guest takes the connection: so the host's client is told, with the port that the connection has on this
    /// side.
    pub(super) fn accepted(&mut self, port: u32) -> Result<(), Broken> {
        self.stage = Stage::Open;
        let told = format!("OK {port}\n");
        // A socket that nothing was written to takes a line.
        match self.peer.offer(told.as_bytes()) {
            Ok(len) if len == told.len() => Ok(()),
            Ok(_) | Err(Broken) => Err(Broken),
        }
    }

    /// Something has happened to the socket.
    pub(super) fn woken(&mut self, readable: bool, gone: bool) {
        self.readable |= readable || gone;
        if gone {
            self.host_done |= SHUTDOWN_RECEIVE;
        }
    }

    /// Takes over the room that a packet of the guest grants.
    pub(super) fn note_credit(&mut self, header: &Header) {
        self.guest_alloc = header.buf_alloc.get();
        self.guest_fwd = header.fwd_cnt.get();
        if self.credit() > 0 {
            self.credit_asked = false;
        }
    }

    /// Bytes that the guest has room for. A guest that says what cannot be has none.
    fn credit(&self) -> u32 {
        let under_way = self.sent.wrapping_sub(self.guest_fwd);
        self.guest_alloc.saturating_sub(under_way)
    }

    /// Whether the guest may send so many bytes.
    pub(super) fn has_room(&self, len: u32) -> bool {
        let free = self.buf_alloc as usize - self.buffer.len().min(self.buf_alloc as usize);
        len as usize <= free && self.guest_done & SHUTDOWN_SEND == 0
    }

    /// Takes bytes that there is room for; how many of them the host has at once.
    pub(super) fn take(&mut self, bytes: &[u8]) -> Result<usize, Broken> {
        let taken = if self.buffer.is_empty() {
            self.peer.offer(bytes)?
        } else {
            0
        };
        let rest = bytes.get(taken..).unwrap_or_default();
        if !rest.is_empty() && self.buffer.capacity() == 0 {
            self.buffer.reserve_exact(self.buf_alloc as usize);
        }
        self.buffer.extend(rest);
        // A service may have an answer now.
        self.readable |= self.is_service();
        self.forwarded(taken);
        Ok(taken)
    }

    /// Writes what the socket takes now of what it did not before; how much that is.
    pub(super) fn flush(&mut self) -> Result<usize, Broken> {
        let mut total = 0;
        while !self.buffer.is_empty() {
            let piece = self.buffer.as_slices().0;
            let len = piece.len();
            let taken = self.peer.offer(piece)?;
            self.buffer.drain(..taken);
            self.forwarded(taken);
            total += taken;
            if taken < len {
                return Ok(total);
            }
        }
        self.buffer = VecDeque::new();
        self.pass_on_shutdown();
        Ok(total)
    }

    fn forwarded(&mut self, len: usize) {
        // No more than the buffer has.
        self.fwd_cnt = self.fwd_cnt.wrapping_add(len as u32);
        // What the guest knows to be free goes down by what it sends: it is told before it has to wait.
        if self.fwd_cnt.wrapping_sub(self.fwd_told) >= self.buf_alloc / 2 {
            self.credit_due = true;
        }
    }

    /// The guest asks how much room there is.
    pub(super) fn tell_credit(&mut self) {
        self.credit_due = true;
    }

    /// The guest has shut down the directions in `flags`.
    pub(super) fn guest_shuts(&mut self, flags: u32) {
        self.guest_done |= flags & (SHUTDOWN_RECEIVE | SHUTDOWN_SEND);
        self.pass_on_shutdown();
    }

    fn pass_on_shutdown(&self) {
        let Peer::Stream(stream) = &self.peer else {
            return;
        };
        // The other end may be gone already.
        if self.guest_done & SHUTDOWN_SEND != 0 && self.buffer.is_empty() {
            let _ = rustix::net::shutdown(stream, Shutdown::Write);
        }
        if self.guest_done & SHUTDOWN_RECEIVE != 0 {
            let _ = rustix::net::shutdown(stream, Shutdown::Read);
        }
    }

    fn may_read(&self) -> bool {
        self.readable
            && self.host_done & SHUTDOWN_SEND == 0
            && self.guest_done & SHUTDOWN_RECEIVE == 0
    }

    /// The shutdown flags that the guest has yet to be sent.
    fn shutdown_due(&self) -> Option<u32> {
        // The guest learns that the host takes no more only after it has read all that the host sent: it would not read
        // on.
        let done = if self.host_done & SHUTDOWN_SEND == 0 {
            0
        } else {
            self.host_done
        };
        (done & !self.told != 0).then_some(done)
    }

    /// Whether there may be a packet for the guest.
    pub(super) fn wants(&self) -> bool {
        match self.stage {
            Stage::ToRequest | Stage::ToRespond => true,
            Stage::Requested => false,
            Stage::Open => {
                self.credit_due
                    || self.shutdown_due().is_some()
                    || (self.may_read() && (self.credit() > 0 || !self.credit_asked))
            }
        }
    }

    /// The next packet for the guest; its payload in `payload`, which is no longer than there is room for.
    pub(super) fn next(&mut self, payload: &mut [u8]) -> Result<Option<Due>, Broken> {
        match self.stage {
            Stage::ToRequest => {
                self.stage = Stage::Requested;
                return Ok(Some(Due::plain(Op::Request)));
            }
            Stage::ToRespond => {
                self.stage = Stage::Open;
                return Ok(Some(Due::plain(Op::Response)));
            }
            Stage::Requested => return Ok(None),
            Stage::Open => {}
        }
        let credit = self.credit();
        if self.may_read() && credit > 0 && !payload.is_empty() {
            let len = payload.len().min(credit as usize);
            if let Some(len) = self.read(&mut payload[..len])? {
                self.sent = self.sent.wrapping_add(len as u32);
                return Ok(Some(Due {
                    op: Op::ReadWrite,
                    flags: 0,
                    len,
                }));
            }
        }
        if let Some(flags) = self.shutdown_due() {
            self.told = flags;
            return Ok(Some(Due {
                op: Op::Shutdown,
                flags,
                len: 0,
            }));
        }
        if std::mem::take(&mut self.credit_due) {
            return Ok(Some(Due::plain(Op::CreditUpdate)));
        }
        if self.may_read() && credit == 0 && !self.credit_asked {
            self.credit_asked = true;
            return Ok(Some(Due::plain(Op::CreditRequest)));
        }
        Ok(None)
    }

    /// Reads what there is; `None` where that is nothing, now or for ever.
    fn read(&mut self, buffer: &mut [u8]) -> Result<Option<usize>, Broken> {
        let read = match &mut self.peer {
            Peer::Service(session) => session.send(buffer),
            Peer::Stream(stream) => loop {
                match rustix::net::recv(&*stream, &mut *buffer, RecvFlags::DONTWAIT) {
                    Ok((len, _)) => break Some(len),
                    Err(Errno::INTR) => {}
                    Err(Errno::AGAIN) => break None,
                    Err(_) => return Err(Broken),
                }
            },
        };
        match read {
            Some(0) => {
                self.host_done |= SHUTDOWN_SEND;
                if self.is_service() {
                    self.host_done |= SHUTDOWN_RECEIVE;
                }
                Ok(None)
            }
            // A service that reports more bytes than there is room for has filled the room.
            Some(len) => Ok(Some(len.min(buffer.len()))),
            None => {
                self.readable = false;
                Ok(None)
            }
        }
    }

    /// Puts into a header what the guest is to know of the room here.
    pub(super) fn tell_room(&mut self, header: &mut Header) {
        self.fwd_told = self.fwd_cnt;
        self.credit_due = false;
        header.buf_alloc = self.buf_alloc.into();
        header.fwd_cnt = self.fwd_cnt.into();
    }
}
