//! Frames, made and taken apart.

use std::net::IpAddr;

use etherparse::{
    Icmpv4Type, Icmpv6Type, IpNumber, NetSlice, PacketBuilder, SlicedPacket, TransportSlice,
};

/// What a test looks at of a frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Frame {
    pub(super) bytes: Vec<u8>,
    pub(super) to_mac: [u8; 6],
    pub(super) source: IpAddr,
    pub(super) destination: IpAddr,
    /// Those of TCP and UDP, or the identifier of an echo twice.
    pub(super) source_port: u16,
    pub(super) destination_port: u16,
    pub(super) payload: Vec<u8>,
    pub(super) transport: Transport,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Transport {
    Tcp { reset: bool },
    Udp,
    Echo,
    EchoReply,
    Icmp,
    Fragment,
}

impl Frame {
    /// Takes an IP packet apart, and checks all of its checksums.
    pub(super) fn parse(bytes: &[u8]) -> Self {
        let sliced = SlicedPacket::from_ethernet(bytes)
            .unwrap_or_else(|error| panic!("{error}: {bytes:x?}"));
        let (source, destination, whole): (IpAddr, IpAddr, _) =
            match sliced.net.as_ref().expect("an IP packet") {
                NetSlice::Ipv4(ip) => {
                    let header = ip.header().to_header();
                    assert_eq!(
                        header.calc_header_checksum(),
                        header.header_checksum,
                        "IPv4 header"
                    );
                    let header = ip.header();
                    (
                        header.source_addr().into(),
                        header.destination_addr().into(),
                        ip.payload().clone(),
                    )
                }
                NetSlice::Ipv6(ip) => {
                    let header = ip.header();
                    (
                        header.source_addr().into(),
                        header.destination_addr().into(),
                        ip.payload().clone(),
                    )
                }
                NetSlice::Arp(_) => panic!("ARP: {bytes:x?}"),
            };
        let mut frame = Self {
            bytes: bytes.to_vec(),
            to_mac: bytes[..6].try_into().unwrap(),
            source,
            destination,
            source_port: 0,
            destination_port: 0,
            payload: whole.payload.to_vec(),
            transport: Transport::Fragment,
        };
        if whole.fragmented {
            return frame;
        }
        assert!(
            checksum_is_right(source, destination, whole.ip_number, whole.payload),
            "{bytes:x?}"
        );
        let echo = |id| (id, id);
        let (transport, (from, to), payload) = match sliced.transport.expect("a transport") {
            TransportSlice::Tcp(tcp) => {
                let ports = (tcp.source_port(), tcp.destination_port());
                (Transport::Tcp { reset: tcp.rst() }, ports, tcp.payload())
            }
            TransportSlice::Udp(udp) => (
                Transport::Udp,
                (udp.source_port(), udp.destination_port()),
                udp.payload(),
            ),
            TransportSlice::Igmp(_) => panic!("IGMP: {bytes:x?}"),
            TransportSlice::Icmpv4(icmp) => match icmp.icmp_type() {
                Icmpv4Type::EchoRequest(header) => {
                    (Transport::Echo, echo(header.id), icmp.payload())
                }
                Icmpv4Type::EchoReply(header) => {
                    (Transport::EchoReply, echo(header.id), icmp.payload())
                }
                _ => (Transport::Icmp, (0, 0), icmp.payload()),
            },
            TransportSlice::Icmpv6(icmp) => match icmp.icmp_type() {
                Icmpv6Type::EchoRequest(header) => {
                    (Transport::Echo, echo(header.id), icmp.payload())
                }
                Icmpv6Type::EchoReply(header) => {
                    (Transport::EchoReply, echo(header.id), icmp.payload())
                }
                _ => (Transport::Icmp, (0, 0), icmp.payload()),
            },
        };
        frame.payload = payload.to_vec();
        (frame.transport, frame.source_port, frame.destination_port) = (transport, from, to);
        frame
    }
}

/// Whether a frame is of the kernel's own kind: neighbour discovery, router solicitation, multicast reports.
pub(super) fn is_chatter(frame: &[u8]) -> bool {
    let is_ipv6 = frame.get(12..14) == Some(&[0x86, 0xdd]);
    let is_multicast = frame.get(38) == Some(&0xff);
    let is_arp = frame.get(12..14) == Some(&[8, 6]);
    (is_ipv6 && is_multicast) || (is_arp && frame[..6] == [0xff; 6])
}

/// RFC 1071, over the pseudo-header of RFC 9293 or RFC 8200, 8.1.
fn checksum_is_right(
    source: IpAddr,
    destination: IpAddr,
    protocol: IpNumber,
    payload: &[u8],
) -> bool {
    let mut bytes = Vec::new();
    let has_pseudo_header = protocol != IpNumber::ICMP;
    if has_pseudo_header {
        for address in [source, destination] {
            match address {
                IpAddr::V4(address) => bytes.extend(address.octets()),
                IpAddr::V6(address) => bytes.extend(address.octets()),
            }
        }
        bytes.extend([0, protocol.0]);
        bytes.extend((payload.len() as u32).to_be_bytes());
    }
    bytes.extend(payload);
    if bytes.len() % 2 == 1 {
        bytes.push(0);
    }
    let mut sum: u32 = bytes
        .chunks(2)
        .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])))
        .sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    // UDP over IPv4 may have none.
    sum == 0xffff || (protocol == IpNumber::UDP && payload.get(6..8) == Some(&[0, 0]))
}

pub(super) fn ethernet(from: [u8; 6], to: [u8; 6], packet: &[u8]) -> Vec<u8> {
    let kind: [u8; 2] = if packet[0] >> 4 == 4 {
        [8, 0]
    } else {
        [0x86, 0xdd]
    };
    [&to[..], &from, &kind, packet].concat()
}

macro_rules! ip {
    ($from:expr, $to:expr) => {
        match ($from, $to) {
            (IpAddr::V4(from), IpAddr::V4(to)) => {
                PacketBuilder::ipv4(from.octets(), to.octets(), 64)
            }
            (IpAddr::V6(from), IpAddr::V6(to)) => {
                PacketBuilder::ipv6(from.octets(), to.octets(), 64)
            }
            _ => panic!("two families"),
        }
    };
}

pub(super) fn udp(
    from: (impl Into<IpAddr>, u16),
    to: (impl Into<IpAddr>, u16),
    payload: &[u8],
) -> Vec<u8> {
    let builder = ip!(from.0.into(), to.0.into()).udp(from.1, to.1);
    let mut packet = Vec::new();
    builder.write(&mut packet, payload).unwrap();
    packet
}

/// The first segment of a connection.
pub(super) fn syn(from: (impl Into<IpAddr>, u16), to: (impl Into<IpAddr>, u16)) -> Vec<u8> {
    let builder = ip!(from.0.into(), to.0.into())
        .tcp(from.1, to.1, 1000, 64000)
        .syn();
    let mut packet = Vec::new();
    builder.write(&mut packet, &[]).unwrap();
    packet
}

/// The answer to the first segment of a connection.
pub(super) fn syn_ack(from: (impl Into<IpAddr>, u16), to: (impl Into<IpAddr>, u16)) -> Vec<u8> {
    let builder = ip!(from.0.into(), to.0.into())
        .tcp(from.1, to.1, 7000, 64000)
        .syn()
        .ack(1001);
    let mut packet = Vec::new();
    builder.write(&mut packet, &[]).unwrap();
    packet
}

/// A segment in the midst of a connection.
pub(super) fn data(
    from: (impl Into<IpAddr>, u16),
    to: (impl Into<IpAddr>, u16),
    payload: &[u8],
) -> Vec<u8> {
    let builder = ip!(from.0.into(), to.0.into())
        .tcp(from.1, to.1, 1001, 64000)
        .ack(7001);
    let mut packet = Vec::new();
    builder.write(&mut packet, payload).unwrap();
    packet
}

/// What a server sends in the midst of a connection.
pub(super) fn data_back(
    from: (impl Into<IpAddr>, u16),
    to: (impl Into<IpAddr>, u16),
    payload: &[u8],
) -> Vec<u8> {
    let builder = ip!(from.0.into(), to.0.into())
        .tcp(from.1, to.1, 7001, 64000)
        .ack(1001);
    let mut packet = Vec::new();
    builder.write(&mut packet, payload).unwrap();
    packet
}

/// A ping, or an answer to the one with the same identifier.
pub(super) fn echo(from: impl Into<IpAddr>, to: impl Into<IpAddr>, is_reply: bool) -> Vec<u8> {
    ping(from.into(), to.into(), 5, is_reply)
}

pub(super) fn echo_reply(from: impl Into<IpAddr>, to: impl Into<IpAddr>, id: u16) -> Vec<u8> {
    ping(from.into(), to.into(), id, true)
}

fn ping(from: IpAddr, to: IpAddr, id: u16, is_reply: bool) -> Vec<u8> {
    let mut packet = Vec::new();
    let builder = ip!(from, to);
    let written = match (from.is_ipv4(), is_reply) {
        (true, false) => builder
            .icmpv4_echo_request(id, 1)
            .write(&mut packet, b"ping"),
        (true, true) => builder.icmpv4_echo_reply(id, 1).write(&mut packet, b"ping"),
        (false, false) => builder
            .icmpv6_echo_request(id, 1)
            .write(&mut packet, b"ping"),
        (false, true) => builder.icmpv6_echo_reply(id, 1).write(&mut packet, b"ping"),
    };
    written.unwrap();
    packet
}

/// An IPv4 packet as two fragments, of which the second has no ports.
pub(super) fn fragments(packet: &[u8]) -> Vec<Vec<u8>> {
    let make = |offset: u16, is_last: bool, payload: &[u8]| {
        let more = if is_last { 0 } else { 0x2000 };
        let mut fragment = packet[..20].to_vec();
        fragment[2..4].copy_from_slice(&(20 + payload.len() as u16).to_be_bytes());
        fragment[6..8].copy_from_slice(&((offset / 8) | more).to_be_bytes());
        fragment.extend_from_slice(payload);
        fill_sum(&mut fragment);
        fragment
    };
    let (first, second) = packet[20..].split_at(16);
    vec![make(0, false, first), make(16, true, second)]
}

/// Sets the checksum of an IPv4 header without options.
pub(super) fn fill_sum(packet: &mut [u8]) {
    packet[10..12].fill(0);
    let words = packet[..20]
        .chunks(2)
        .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])));
    let sum: u32 = words.sum();
    let sum = (sum & 0xffff) + (sum >> 16);
    packet[10..12].copy_from_slice(&(!(sum as u16)).to_be_bytes());
}
