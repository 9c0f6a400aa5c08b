use proptest::prelude::*;
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{
    IpAddress, IpProtocol, Ipv4Repr, TcpControl, TcpPacket, TcpRepr, TcpSeqNumber,
};

use super::*;

const ADDRESS: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);
const GUEST: Ipv4Addr = Ipv4Addr::new(10, 1, 0, 9);

/// Answers a line with what was said, many times, and then that is all.
struct Echo;

struct EchoSession {
    line: Vec<u8>,
    left: Option<Vec<u8>>,
}

impl Service for Echo {
    fn open(&self) -> Box<dyn Session> {
        let (line, left) = (Vec::new(), None);
        Box::new(EchoSession { line, left })
    }
}

impl Session for EchoSession {
    fn receive(&mut self, bytes: &[u8]) {
        if self.line.len() < 1000 {
            self.line.extend(bytes);
        }
        if self.left.is_none() && self.line.ends_with(b"\n") {
            self.left = Some(self.line.repeat(1000));
        }
    }

    fn send(&mut self, buffer: &mut [u8]) -> Option<usize> {
        let left = self.left.as_mut()?;
        let len = left.len().min(buffer.len());
        buffer[..len].copy_from_slice(&left[..len]);
        left.drain(..len);
        Some(len)
    }
}

fn metadata() -> Metadata {
    Metadata::new(ADDRESS, Arc::new(Echo))
}

/// A guest's stack, of the same library.
struct Client {
    stack: Stack,
    handle: SocketHandle,
}

impl Client {
    fn new(now: Instant, port: u16) -> Self {
        let mut stack = Stack::new(GUEST, now);
        let buffer = |len| SocketBuffer::new(vec![0; len]);
        let mut socket = Socket::new(buffer(1024), buffer(1024));
        let to = (IpAddress::Ipv4(ADDRESS), PORT);
        socket.connect(stack.interface.context(), to, port).unwrap();
        let handle = stack.sockets.add(socket);
        Self { stack, handle }
    }

    fn socket(&mut self) -> &mut Socket<'static> {
        self.stack.sockets.get_mut(self.handle)
    }

    /// Lets both talk until neither has anything to say.
    fn talk(&mut self, metadata: &mut Metadata, now: Instant) {
        for _ in 0..200 {
            let time = self.stack.time(now);
            let Stack {
                packets,
                interface,
                sockets,
                ..
            } = &mut self.stack;
            interface.poll(time, packets, sockets);
            let mut quiet = true;
            while let Some(packet) = self.stack.packets.sent.pop_front() {
                assert!(metadata.takes(&packet));
                metadata.receive(&packet, now);
                quiet = false;
            }
            if let Some(packet) = metadata.send(now) {
                self.stack.packets.received = Some(packet);
                quiet = false;
            }
            if quiet {
                return;
            }
        }
    }

    /// Says a line, and reads all of the answer.
    fn ask(&mut self, metadata: &mut Metadata, line: &[u8], now: Instant) -> Vec<u8> {
        self.talk(metadata, now);
        self.socket().send_slice(line).unwrap();
        let mut answer = Vec::new();
        for _ in 0..2000 {
            self.talk(metadata, now);
            let read = self.socket().recv(|bytes| {
                answer.extend_from_slice(bytes);
                (bytes.len(), bytes.len())
            });
            if read.is_err() {
                break;
            }
        }
        self.socket().close();
        self.talk(metadata, now);
        answer
    }
}

fn tcp(control: TcpControl, port: u16, payload: &[u8]) -> Vec<u8> {
    let segment = TcpRepr {
        src_port: port,
        dst_port: PORT,
        control,
        seq_number: TcpSeqNumber(7),
        ack_number: None,
        window_len: 1000,
        window_scale: None,
        max_seg_size: Some(1460),
        sack_permitted: true,
        sack_ranges: [None; 3],
        timestamp: None,
        payload,
    };
    let ip = Ipv4Repr {
        src_addr: GUEST,
        dst_addr: ADDRESS,
        next_header: IpProtocol::Tcp,
        payload_len: segment.buffer_len(),
        hop_limit: 64,
    };
    let checksums = ChecksumCapabilities::default();
    let mut bytes = vec![0; ip.buffer_len() + segment.buffer_len()];
    let mut packet = Ipv4Packet::new_unchecked(&mut *bytes);
    ip.emit(&mut packet, &checksums);
    let (from, to) = (GUEST.into(), ADDRESS.into());
    segment.emit(
        &mut TcpPacket::new_unchecked(packet.payload_mut()),
        &from,
        &to,
        &checksums,
    );
    bytes
}

#[test]
fn a_request_is_answered_and_nothing_is_kept_afterwards() {
    let (mut metadata, now) = (metadata(), Instant::now());
    for port in 0..20 {
        let mut client = Client::new(now, 5000 + port);
        let answer = client.ask(&mut metadata, b"hello\n", now);
        assert_eq!(answer.len(), 6000, "{port}");
        assert!(answer.starts_with(b"hello\nhello\n"));
    }
    assert!(metadata.is_idle());
    assert_eq!(metadata.wait(now), None);
}

#[test]
fn connections_that_are_opened_and_left_keep_nobody_from_being_answered() {
    let (mut metadata, now) = (metadata(), Instant::now());
    for port in 0..50 {
        metadata.receive(&tcp(TcpControl::Syn, 1000 + port, &[]), now);
    }
    let mut idle: Vec<_> = (0..10).map(|port| Client::new(now, 2000 + port)).collect();
    for client in &mut idle {
        client.talk(&mut metadata, now);
    }
    let answer = Client::new(now, 5000).ask(&mut metadata, b"hello\n", now);
    assert_eq!(answer.len(), 6000);
    let stack = metadata.stack.as_ref().unwrap();
    assert!(stack.packets.sent.len() <= MAX_PACKETS);
    assert_eq!(stack.connections.len(), CONNECTIONS);
}

#[test]
fn a_connection_that_stands_still_ends_and_its_memory_goes() {
    let (mut metadata, now) = (metadata(), Instant::now());
    let mut client = Client::new(now, 5000);
    client.talk(&mut metadata, now);
    // It asks for much, and reads none of it.
    client.socket().send_slice(b"hello\n").unwrap();
    client.talk(&mut metadata, now);
    metadata.receive(&tcp(TcpControl::Syn, 1000, &[]), now);
    let mut at = now;
    let mut looks = 0;
    while let Some(wait) = metadata.wait(at) {
        at += wait.max(Duration::from_millis(1));
        while metadata.send(at).is_some() {}
        looks += 1;
        assert!(looks < 100, "it is woken again and again");
        assert!(at < now + 3 * PATIENCE, "it never ends");
    }
    assert!(metadata.is_idle());
}

#[test]
fn a_segment_as_long_as_the_window_is_taken_whole() {
    let (mut metadata, now) = (metadata(), Instant::now());
    let mut client = Client::new(now, 5000);
    let mut line = vec![b'x'; 900];
    line.push(b'\n');
    assert_eq!(client.ask(&mut metadata, &line, now).len(), 901_000);
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// Segments that are right but for a few bytes, such as options of odd lengths, and cut anywhere.
    #[test]
    fn no_packet_makes_it_panic_or_keep_more(
        packets in prop::collection::vec((
            0usize..4,
            0u16..6,
            prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
            prop::option::of(any::<prop::sample::Index>()),
            prop::collection::vec(any::<u8>(), 0..40),
        ), 1..30),
    ) {
        let (mut metadata, now) = (metadata(), Instant::now());
        for (at, (control, port, changes, cut, payload)) in packets.into_iter().enumerate() {
            let control = [TcpControl::Syn, TcpControl::None, TcpControl::Fin, TcpControl::Rst][control];
            let mut bytes = tcp(control, 1000 + port, &payload);
            for (at, byte) in changes {
                let at = at.index(bytes.len());
                bytes[at] = byte;
            }
            if let Some(cut) = cut {
                bytes.truncate(cut.index(bytes.len() + 1));
            }
            let now = now + Duration::from_millis(100 * at as u64);
            metadata.takes(&bytes);
            metadata.receive(&bytes, now);
            metadata.wait(now);
            if at % 3 == 0 {
                while metadata.send(now).is_some() {}
            }
            if let Some(stack) = &metadata.stack {
                prop_assert!(stack.packets.sent.len() <= MAX_PACKETS);
            }
        }
        let later = now + Duration::from_mins(1);
        while metadata.send(later).is_some() {}
        let mut client = Client::new(later, 5000);
        prop_assert_eq!(client.ask(&mut metadata, b"hello\n", later).len(), 6000);
    }
}
