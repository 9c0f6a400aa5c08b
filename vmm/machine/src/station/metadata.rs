//! The metadata service at its address of IPv4: a few connections of TCP to a [`Service`], in the guest's own process.
//!
//! There is nothing while nobody asks. A guest that opens connections and leaves them, or never reads, loses the oldest
//! for a new one, and each that stands still for [`PATIENCE`]: so none keeps others from being answered, and what is
//! kept is bounded.

use std::collections::VecDeque;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use devices::service::{Service, Session};
use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{Checksum, Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::tcp::{Socket, SocketBuffer, State};
use smoltcp::wire::{HardwareAddress, IpCidr, Ipv4Packet};

/// The port of HTTP.
const PORT: u16 = 80;
/// Connections at once.
const CONNECTIONS: usize = 4;
/// Bytes that a connection keeps each way.
const RECEIVED: usize = 2048;
const SENT: usize = 4096;
/// How long a connection may stand still.
const PATIENCE: Duration = Duration::from_secs(20);
/// The MTU of the link; the guest says what its own is.
const MTU: usize = 1500;
/// Packets that wait for buffers of the guest. What is more is sent again later, as TCP does.
const MAX_PACKETS: usize = 16;
/// How often the connections are looked at for one packet: each look makes progress, or is the last.
const MAX_LOOKS: usize = 16;

/// Packets to and from the stack.
#[derive(Default)]
struct Packets {
    received: Option<Vec<u8>>,
    sent: VecDeque<Vec<u8>>,
}

struct Received(Vec<u8>);

impl RxToken for Received {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, read: F) -> R {
        read(&self.0)
    }
}

struct Sent<'p>(&'p mut VecDeque<Vec<u8>>);

impl TxToken for Sent<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, write: F) -> R {
        let mut packet = vec![0; len];
        let result = write(&mut packet);
        self.0.push_back(packet);
        result
    }
}

impl Device for Packets {
    type RxToken<'p> = Received;
    type TxToken<'p> = Sent<'p>;

    fn receive(&mut self, _: smoltcp::time::Instant) -> Option<(Received, Sent<'_>)> {
        if self.sent.len() >= MAX_PACKETS {
            return None;
        }
        let packet = self.received.take()?;
        Some((Received(packet), Sent(&mut self.sent)))
    }

    fn transmit(&mut self, _: smoltcp::time::Instant) -> Option<Sent<'_>> {
        (self.sent.len() < MAX_PACKETS).then_some(Sent(&mut self.sent))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ip;
        capabilities.max_transmission_unit = MTU;
        // The guest may leave checksums to its device.
        capabilities.checksum.tcp = Checksum::Tx;
        capabilities.checksum.ipv4 = Checksum::Tx;
        capabilities
    }
}

/// A connection, or the place of one.
struct Connection {
    handle: SocketHandle,
    session: Option<Box<dyn Session>>,
    /// When something last happened; `None` where nothing has yet.
    active: Option<Instant>,
}

/// The stack while somebody asks.
struct Stack {
    begun: Instant,
    packets: Packets,
    interface: Interface,
    sockets: SocketSet<'static>,
    connections: Vec<Connection>,
}

/// The metadata service at its address.
pub(super) struct Metadata {
    address: Ipv4Addr,
    service: Arc<dyn Service>,
    stack: Option<Stack>,
}

/// A place for a connection, which listens.
fn listening() -> Socket<'static> {
    let buffer = |len| SocketBuffer::new(vec![0; len]);
    let mut socket = Socket::new(buffer(RECEIVED), buffer(SENT));
    // It is new and the port is none of 0, so it can.
    let _ = socket.listen(PORT);
    socket
}

impl Stack {
    fn new(address: Ipv4Addr, now: Instant) -> Self {
        let mut packets = Packets::default();
        let mut config = Config::new(HardwareAddress::Ip);
        let mut seed = [0; 8];
        // Sequence numbers guard against others on the link, of whom there are none.
        let _ = rustix::rand::getrandom(&mut seed, rustix::rand::GetRandomFlags::empty());
        config.random_seed = u64::from_ne_bytes(seed);
        let mut interface = Interface::new(config, &mut packets, smoltcp::time::Instant::ZERO);
        interface.update_ip_addrs(|addresses| {
            // There is room for the first.
            let _ = addresses.push(IpCidr::new(address.into(), 32));
        });
        // Everybody is on the other side of the link.
        let _ = interface.routes_mut().add_default_ipv4_route(address);
        let mut sockets = SocketSet::new(Vec::new());
        let connections = (0..CONNECTIONS).map(|_| Connection {
            handle: sockets.add(listening()),
            session: None,
            active: None,
        });
        Self {
            begun: now,
            connections: connections.collect(),
            packets,
            interface,
            sockets,
        }
    }

    fn time(&self, now: Instant) -> smoltcp::time::Instant {
        let since = now.saturating_duration_since(self.begun);
        smoltcp::time::Instant::from_micros(i64::try_from(since.as_micros()).unwrap_or(i64::MAX))
    }

    /// Has a place listen again, whatever was there.
    fn free(&mut self, index: usize) {
        if let Some(connection) = self.connections.get_mut(index) {
            self.sockets.remove(connection.handle);
            connection.handle = self.sockets.add(listening());
            connection.session = None;
            connection.active = None;
        }
    }

    /// Makes room for a packet that opens a connection.
    fn make_room(&mut self) {
        let is_free = |connection: &Connection| {
            self.sockets.get::<Socket<'_>>(connection.handle).state() == State::Listen
        };
        if self.connections.iter().any(is_free) {
            return;
        }
        let oldest = self.connections.iter().enumerate();
        if let Some((index, _)) = oldest.min_by_key(|(_, connection)| connection.active) {
            self.free(index);
        }
    }

    /// Lets the stack and the sessions do all that there is to do now.
    fn run(&mut self, service: &dyn Service, now: Instant) {
        let time = self.time(now);
        for _ in 0..MAX_LOOKS {
            self.interface
                .poll(time, &mut self.packets, &mut self.sockets);
            let mut progress = false;
            for index in 0..self.connections.len() {
                progress |= self.serve(index, service, now);
            }
            if !progress {
                break;
            }
        }
    }

    /// Moves bytes between a connection and its session. Whether anything happened.
    fn serve(&mut self, index: usize, service: &dyn Service, now: Instant) -> bool {
        let Some(connection) = self.connections.get_mut(index) else {
            return false;
        };
        let socket = self.sockets.get_mut::<Socket<'_>>(connection.handle);
        match socket.state() {
            State::Listen => return false,
            State::Closed | State::TimeWait => {
                self.free(index);
                return true;
            }
            _ => {}
        }
        let active = *connection.active.get_or_insert(now);
        if now.saturating_duration_since(active) >= PATIENCE {
            // It forgets the connection, and what comes of it later is refused.
            self.free(index);
            return true;
        }
        if connection.session.is_none() && socket.may_recv() {
            connection.session = Some(service.open());
        }
        let Some(session) = &mut connection.session else {
            return false;
        };
        let mut moved = 0;
        while socket.can_recv() {
            let read = socket.recv(|bytes| {
                session.receive(bytes);
                (bytes.len(), bytes.len())
            });
            moved += read.unwrap_or_default();
        }
        let mut is_over = false;
        while socket.can_send() && !is_over {
            let sent = socket.send(|room| match session.send(room) {
                Some(0) => (0, None),
                Some(len) => (len.min(room.len()), Some(len)),
                None => (0, Some(0)),
            });
            match sent {
                Ok(Some(0)) => break,
                Ok(Some(len)) => moved += len,
                Ok(None) | Err(_) => is_over = true,
            }
        }
        // A client that has said all, and gets no answer for it, has said too little.
        let is_mute = !socket.may_recv() && moved == 0;
        if (is_over || is_mute) && socket.may_send() {
            socket.close();
            moved += 1;
        }
        if moved > 0 {
            connection.active = Some(now);
        }
        moved > 0
    }

    /// Whether nobody asks.
    fn is_idle(&self) -> bool {
        self.packets.sent.is_empty()
            && self.connections.iter().all(|connection| {
                self.sockets.get::<Socket<'_>>(connection.handle).state() == State::Listen
            })
    }
}

/// Whether a packet of IPv4 opens a connection of TCP.
fn opens(packet: &[u8]) -> bool {
    let header = packet.first().map_or(0, |byte| usize::from(byte & 15) * 4);
    let flags = packet.get(header + 13).copied().unwrap_or_default();
    packet.get(9) == Some(&6) && flags & 0x12 == 0x02
}

impl Metadata {
    pub(super) fn new(address: Ipv4Addr, service: Arc<dyn Service>) -> Self {
        Self {
            address,
            service,
            stack: None,
        }
    }

    pub(super) fn address(&self) -> Ipv4Addr {
        self.address
    }

    /// Whether a packet of IPv4, of which all of the header is there, is for the service.
    pub(super) fn takes(&self, packet: &[u8]) -> bool {
        packet.get(16..20) == Some(&self.address.octets()[..])
    }

    /// A packet that it takes.
    pub(super) fn receive(&mut self, packet: &[u8], now: Instant) {
        // The frame may be longer than the packet.
        let Ok(checked) = Ipv4Packet::new_checked(packet) else {
            return;
        };
        let len = usize::from(checked.total_len());
        let Some(packet) = packet.get(..len) else {
            return;
        };
        let stack = self
            .stack
            .get_or_insert_with(|| Stack::new(self.address, now));
        if opens(packet) {
            stack.make_room();
        }
        stack.packets.received = Some(packet.to_vec());
        stack.run(&*self.service, now);
        // Where too many wait, it is lost, and sent again.
        stack.packets.received = None;
    }

    /// The next packet for the guest.
    pub(super) fn send(&mut self, now: Instant) -> Option<Vec<u8>> {
        let stack = self.stack.as_mut()?;
        if stack.packets.sent.is_empty() {
            stack.run(&*self.service, now);
        }
        let packet = stack.packets.sent.pop_front();
        if stack.is_idle() {
            self.stack = None;
        }
        packet
    }

    /// In how long it has something to do though nothing came.
    pub(super) fn wait(&mut self, now: Instant) -> Option<Duration> {
        let stack = self.stack.as_mut()?;
        let time = stack.time(now);
        let own = stack.interface.poll_delay(time, &stack.sockets);
        let own = own.map(|delay| Duration::from_micros(delay.total_micros()));
        let active = stack
            .connections
            .iter()
            .filter_map(|connection| connection.active);
        let ends = active
            .min()
            .map(|active| (active + PATIENCE).saturating_duration_since(now));
        [own, ends].into_iter().flatten().min()
    }

    /// Forgets all connections.
    pub(super) fn reset(&mut self) {
        self.stack = None;
    }

    #[cfg(test)]
    pub(super) fn is_idle(&self) -> bool {
        self.stack.is_none()
    }
}

#[cfg(test)]
mod tests;
