//! Serves the rings and the sockets, on the device thread.

use virtio_queue::{Error, Queue, QueueOwnedT, QueueT};

use super::super::chain::{self, Chain, Segment};
use super::connection::{Broken, Connection, Peer, Stage};
use super::host::Happened;
use super::packet::{self, HOST_CID, Header, Key, Op, Room, STREAM, TRANSPORT_RESET};
use super::{Active, VirtioVsock};
use crate::GuestMemory;
use crate::metrics::add;

/// Resets that wait for room in the rx ring. With more of them, the tx ring waits too.
const MAX_REPLIES: usize = 64;
/// Bytes that are moved at once: a buffer of Linux's rx ring.
const PIECE: usize = 4096;
/// Longest payload of a packet of the guest (`VIRTIO_VSOCK_MAX_PKT_BUF_SIZE` of Linux).
const MAX_PAYLOAD: u32 = 64 << 10;

/// What a look at a ring has come to.
struct Turn {
    used: bool,
    /// The ring has more for which there was no time.
    more: bool,
}

impl Turn {
    fn begun() -> Self {
        Self {
            used: false,
            more: true,
        }
    }
}

/// The next chain of a ring, or none, and then the driver notifies the next one.
fn pop(queue: &mut Queue, memory: &GuestMemory) -> Result<Option<Popped>, Error> {
    loop {
        if let Some(descriptors) = queue.iter(memory)?.next() {
            return Ok(Some(Popped {
                head: descriptors.head_index(),
                chain: Chain::walk(&descriptors, queue.size()).ok(),
            }));
        }
        if !queue.enable_notification(memory)? {
            return Ok(None);
        }
    }
}

struct Popped {
    head: u16,
    /// `None` where it breaks a rule.
    chain: Option<Chain>,
}

impl VirtioVsock {
    /// Looks at the sockets, also while the guest stands still or has no driver: what has happened is remembered.
    pub(super) fn poll(&mut self) {
        for happened in self.host.poll() {
            match happened {
                Happened::Call { stream, port } => self.call(stream, port),
                Happened::Ready {
                    key,
                    readable,
                    gone,
                } => {
                    let Some(connection) = self.table.get(key) else {
                        continue;
                    };
                    connection.woken(readable, gone);
                    if gone && connection.stage() == Stage::ToRequest {
                        // The guest never hears of it.
                        self.table.close(key);
                    } else if gone && connection.stage() == Stage::Requested {
                        self.sent(key, &Err(Broken));
                    } else {
                        let flushed = connection.flush();
                        self.sent(key, &flushed);
                    }
                }
            }
        }
    }

    /// A program of the host wants to be connected.
    fn call(&mut self, stream: std::os::unix::net::UnixStream, port: u32) {
        // It sees its connection closed, as where nobody listens in the guest.
        if self.active.is_none() || !self.table.has_room() {
            add(&self.metrics.resets, 1);
            return;
        }
        let key = self.table.free_port(port);
        if let Err(error) = self.host.watch(&stream, key) {
            crate::limited!(warn, error = %report::chain(&error), "a vsock client cannot be served");
            return;
        }
        // There is room, as was seen.
        let _ = self.table.open(key, Peer::Stream(stream), Stage::ToRequest);
    }

    /// Serves all queues, as far as there is time.
    pub(super) fn serve(&mut self) {
        if self.paused {
            return;
        }
        let Some(mut active) = self.active.take() else {
            return;
        };
        let served = self.serve_rings(&mut active);
        self.active = Some(active);
        match served {
            Ok(Turn { used, more }) => {
                if used {
                    self.interrupt.signal_used();
                }
                if more {
                    self.kick();
                }
            }
            Err(error) => self.fail(&error),
        }
    }

    fn serve_rings(&mut self, active: &mut Active) -> Result<Turn, Error> {
        let Active {
            memory,
            rx,
            tx,
            event,
        } = active;
        let memory = &*memory;
        let told = match event {
            Some(event) => self.serve_event(event, memory)?,
            None => false,
        };
        // What the guest sends makes answers to it, and these make room for more.
        let sent = self.serve_tx(tx, memory)?;
        let received = self.serve_rx(rx, memory)?;
        Ok(Turn {
            used: told | sent.used | received.used,
            more: received.more || (sent.more && self.replies.len() < MAX_REPLIES),
        })
    }

    /// Tells the driver that its connections are gone, once it has a buffer for that.
    fn serve_event(&mut self, queue: &mut Queue, memory: &GuestMemory) -> Result<bool, Error> {
        while self.owes_reset {
            let Some(Popped { head, chain }) = pop(queue, memory)? else {
                return Ok(false);
            };
            let written = chain.and_then(|chain| {
                let len = chain::write(memory, &chain.writable, &TRANSPORT_RESET).ok()?;
                (len as usize == TRANSPORT_RESET.len()).then_some(len)
            });
            match written {
                Some(_) => self.owes_reset = false,
                None => add(&self.metrics.failures, 1),
            }
            queue.add_used(memory, head, written.unwrap_or(0))?;
            if !self.owes_reset {
                return queue.needs_notification(memory);
            }
        }
        Ok(false)
    }

    fn serve_tx(&mut self, queue: &mut Queue, memory: &GuestMemory) -> Result<Turn, Error> {
        let mut turn = Turn::begun();
        for _ in 0..queue.size() {
            if self.replies.len() >= MAX_REPLIES {
                break;
            }
            let Some(Popped { head, chain }) = pop(queue, memory)? else {
                turn.more = false;
                break;
            };
            turn.used = true;
            let packet = chain.and_then(|chain| packet::read(memory, chain.readable).ok());
            match packet {
                Some((header, payload)) => self.receive(memory, &header, &payload),
                None => add(&self.metrics.failures, 1),
            }
            queue.add_used(memory, head, 0)?;
        }
        turn.used = turn.used && queue.needs_notification(memory)?;
        Ok(turn)
    }

    /// A packet of the guest.
    fn receive(&mut self, memory: &GuestMemory, header: &Header, payload: &[Segment]) {
        add(&self.metrics.sent_packets, 1);
        if header.src_cid.get() != self.guest_cid {
            // The packet belongs to no connection, or the guest sent it before it had this identifier.
            add(&self.metrics.failures, 1);
            return;
        }
        let (key, op) = (header.key(), header.op());
        let is_ours = header.dst_cid.get() == HOST_CID
            && header.kind.get() == STREAM
            && key.guest != u32::MAX
            && header.len.get() <= MAX_PAYLOAD;
        let Some(op) = op.filter(|_| is_ours) else {
            if op != Some(Op::Reset) {
                self.refuse(header);
            }
            return;
        };
        if op == Op::Request {
            // One that is there already is not asked for by a sound driver.
            if self.table.close(key) || self.open(key, header).is_err() {
                self.refuse(header);
            }
            return;
        }
        let Some(connection) = self.table.get(key) else {
            if op != Op::Reset {
                self.refuse(header);
            }
            return;
        };
        connection.note_credit(header);
        let is_open = connection.stage() == Stage::Open;
        let went = match op {
            Op::Reset => {
                self.table.close(key);
                return;
            }
            Op::Response if connection.stage() == Stage::Requested => {
                connection.accepted(key.host).map(|()| 0)
            }
            Op::CreditRequest => {
                connection.tell_credit();
                Ok(0)
            }
            Op::CreditUpdate => Ok(0),
            Op::Shutdown if is_open => {
                connection.guest_shuts(header.flags.get());
                Ok(0)
            }
            Op::ReadWrite if is_open && connection.has_room(header.len.get()) => {
                take(connection, memory, payload)
            }
            Op::Shutdown | Op::ReadWrite | Op::Response | Op::Request => Err(Broken),
        };
        self.sent(key, &went);
    }

    /// A guest wants to be connected to the host.
    fn open(&mut self, key: Key, header: &Header) -> Result<(), ()> {
        let service = self.service.as_ref().filter(|(port, _)| *port == key.host);
        let peer = if let Some((_, service)) = service {
            Peer::Service(service.open())
        } else {
            if !self.table.has_room() {
                return Err(());
            }
            let stream = self.host.connect(key.host).map_err(|error| {
                tracing::debug!(error = %report::chain(&error), port = key.host, "a guest connects to where nobody listens");
            })?;
            self.host.watch(&stream, key).map_err(drop)?;
            Peer::Stream(stream)
        };
        self.table.open(key, peer, Stage::ToRespond).map_err(drop)?;
        if let Some(connection) = self.table.get(key) {
            connection.note_credit(header);
        }
        Ok(())
    }

    /// Goes on with a connection that the host has taken bytes of, or ends it.
    fn sent(&mut self, key: Key, went: &Result<usize, Broken>) {
        let over = match went {
            Ok(len) => {
                add(&self.metrics.sent_bytes, *len as u64);
                self.table.get(key).is_some_and(|c| c.is_over())
            }
            Err(Broken) => true,
        };
        if over && self.table.close(key) {
            // It says as well that a connection is closed in good order (5.10.6.5).
            self.reply(Header::to_guest(self.guest_cid, key, Op::Reset));
        }
        if went.is_err() {
            add(&self.metrics.resets, 1);
        }
    }

    fn refuse(&mut self, header: &Header) {
        add(&self.metrics.resets, 1);
        self.reply(Header::refuse(header));
    }

    /// Sends a packet that belongs to no connection. There are no more of them than packets taken since there was room,
    /// and connections.
    fn reply(&mut self, header: Header) {
        self.replies.push_back(header);
    }

    fn serve_rx(&mut self, queue: &mut Queue, memory: &GuestMemory) -> Result<Turn, Error> {
        let mut turn = Turn::begun();
        for _ in 0..queue.size() {
            let next = if self.replies.is_empty() {
                self.table.next()
            } else {
                None
            };
            if next.is_none() && self.replies.is_empty() {
                turn.more = false;
                break;
            }
            let Some(Popped { head, chain }) = pop(queue, memory)? else {
                turn.more = false;
                break;
            };
            let Some(room) = chain.and_then(|chain| Room::new(chain.writable)) else {
                add(&self.metrics.failures, 1);
                queue.add_used(memory, head, 0)?;
                turn.used = true;
                continue;
            };
            let mut payload = [0; PIECE];
            let packet = match next {
                Some(key) => {
                    let len = room.payload().min(PIECE);
                    self.next_packet(key, &mut payload[..len])
                }
                None => self.replies.pop_front().map(|header| (header, 0)),
            };
            let Some((header, len)) = packet else {
                // There was nothing to read after all: the buffer is for the next packet.
                queue.go_to_previous_position();
                continue;
            };
            let written = room.write(memory, &header, &payload[..len]);
            add(&self.metrics.received_packets, 1);
            add(&self.metrics.received_bytes, len as u64);
            queue.add_used(memory, head, written.unwrap_or(0))?;
            turn.used = true;
        }
        turn.used = turn.used && queue.needs_notification(memory)?;
        Ok(turn)
    }

    /// The next packet of a connection, and the bytes of its payload.
    fn next_packet(&mut self, key: Key, payload: &mut [u8]) -> Option<(Header, usize)> {
        let connection = self.table.get(key)?;
        match connection.next(payload) {
            Ok(Some(due)) => {
                let mut header = Header::to_guest(self.guest_cid, key, due.op);
                header.len = (due.len as u32).into();
                header.flags = due.flags.into();
                connection.tell_room(&mut header);
                Some((header, due.len))
            }
            Ok(None) => None,
            Err(broken) => {
                self.sent(key, &Err(broken));
                self.replies.pop_back().map(|header| (header, 0))
            }
        }
    }
}

/// Hands the payload of a packet to the host.
fn take(
    connection: &mut Connection,
    memory: &GuestMemory,
    payload: &[Segment],
) -> Result<usize, Broken> {
    let (mut bytes, mut taken) = ([0; PIECE], 0);
    for piece in packet::pieces(payload, PIECE as u32) {
        let bytes = &mut bytes[..piece.len as usize];
        // The segments were checked, and guest memory does not shrink.
        chain::read(memory, &[piece], bytes).map_err(|_| Broken)?;
        taken += connection.take(bytes)?;
    }
    Ok(taken)
}
