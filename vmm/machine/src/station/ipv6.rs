//! Neighbour discovery for IPv6 (RFC 4861): the guest is given a network of its own, of which it takes its addresses
//! (RFC 8273), and all else is behind the router.

use std::net::{IpAddr, Ipv6Addr};

use config::LeaseConfig;
use smoltcp::wire::{EthernetAddress, Icmpv6Packet, IpProtocol, Ipv6Packet, Ipv6Repr};

/// Types of messages (RFC 4861, 4).
pub(super) const ROUTER_SOLICITATION: u8 = 133;
const ROUTER_ADVERTISEMENT: u8 = 134;
const NEIGHBOUR_SOLICITATION: u8 = 135;
const NEIGHBOUR_ADVERTISEMENT: u8 = 136;
const REDIRECT: u8 = 137;

/// Options of messages (RFC 4861, 4.6; RFC 8106, 5.1).
const SOURCE_LINK_LAYER_ADDRESS: u8 = 1;
const TARGET_LINK_LAYER_ADDRESS: u8 = 2;
const PREFIX_INFORMATION: u8 = 3;
const MTU: u8 = 5;
const RECURSIVE_DNS_SERVER: u8 = 25;

/// The router's own address on the link.
const ROUTER: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
/// What a message has come through no router with (RFC 4861, 6.1.1).
const HOPS: u8 = 255;
const HEADER: usize = 40;
/// The longest that a router may be one (RFC 4861, 6.2.1), in seconds.
const ROUTER_LIFETIME: u16 = 9000;
/// The guest is at rest for hours: nothing of what it is given ends (RFC 4861, 4.6.2).
const FOR_EVER: u32 = u32::MAX;
/// The prefix is for addresses of its own (`A`), and says nothing of who is on the link.
const AUTONOMOUS: u8 = 0x40;
/// The neighbour is a router, answers, and knows better than a cache (RFC 4861, 4.4).
const ROUTER_SOLICITED_OVERRIDE: u8 = 0xe0;

/// The type of a message of neighbour discovery, in a packet of which all headers are there.
pub(super) fn neighbour_discovery(packet: &[u8]) -> Option<u8> {
    let [next_header, kind] = [packet.get(6)?, packet.get(HEADER)?];
    let is_discovery = *next_header == 58 && (ROUTER_SOLICITATION..=REDIRECT).contains(kind);
    is_discovery.then_some(*kind)
}

/// The answer to a message, a packet of IPv6.
pub(super) fn answer(
    packet: &[u8],
    lease: &LeaseConfig,
    mtu: Option<u16>,
    mac: EthernetAddress,
) -> Option<Vec<u8>> {
    let packet = Ipv6Packet::new_checked(packet).ok()?;
    if packet.next_header() != IpProtocol::Icmpv6 || packet.hop_limit() != HOPS {
        return None;
    }
    let message = packet.payload();
    let sender = packet.src_addr();
    match *message.first()? {
        ROUTER_SOLICITATION => {
            let to = if sender.is_unspecified() {
                ALL_NODES
            } else {
                sender
            };
            Some(wrap(ROUTER, to, advertisement(lease, mtu, mac)?))
        }
        NEIGHBOUR_SOLICITATION => {
            let target: [u8; 16] = message.get(8..24)?.try_into().ok()?;
            let target = Ipv6Addr::from(target);
            let is_own = lease.ipv6.is_some_and(|net| net.contains(&target));
            // One without a sender asks whether another has the address (RFC 4862, 5.4).
            if sender.is_unspecified() || sender == target || is_own || target.is_multicast() {
                return None;
            }
            Some(wrap(target, sender, neighbour(target, mac)))
        }
        _ => None,
    }
}

/// A router advertisement (RFC 4861, 4.2), without its checksum.
fn advertisement(lease: &LeaseConfig, mtu: Option<u16>, mac: EthernetAddress) -> Option<Vec<u8>> {
    let net = lease.ipv6?;
    let lifetime = if lease.gateway_mac.is_some() {
        ROUTER_LIFETIME
    } else {
        0
    };
    let mut message = vec![ROUTER_ADVERTISEMENT, 0, 0, 0, 64, 0];
    message.extend(lifetime.to_be_bytes());
    message.extend([0; 8]);
    message.extend([SOURCE_LINK_LAYER_ADDRESS, 1]);
    message.extend(mac.as_bytes());
    if let Some(mtu) = mtu.filter(|mtu| *mtu >= 1280) {
        message.extend([MTU, 1, 0, 0]);
        message.extend(u32::from(mtu).to_be_bytes());
    }
    message.extend([PREFIX_INFORMATION, 4, net.prefix_len(), AUTONOMOUS]);
    message.extend(FOR_EVER.to_be_bytes());
    message.extend(FOR_EVER.to_be_bytes());
    message.extend([0; 4]);
    message.extend(net.network().octets());
    let servers: Vec<Ipv6Addr> = lease
        .dns
        .iter()
        .filter_map(|server| match server {
            IpAddr::V6(server) => Some(*server),
            IpAddr::V4(_) => None,
        })
        .collect();
    if !servers.is_empty() {
        message.extend([RECURSIVE_DNS_SERVER, 1 + 2 * servers.len() as u8, 0, 0]);
        message.extend(FOR_EVER.to_be_bytes());
        message.extend(servers.iter().flat_map(Ipv6Addr::octets));
    }
    Some(message)
}

/// A neighbour advertisement (RFC 4861, 4.4), without its checksum.
fn neighbour(target: Ipv6Addr, mac: EthernetAddress) -> Vec<u8> {
    let mut message = vec![
        NEIGHBOUR_ADVERTISEMENT,
        0,
        0,
        0,
        ROUTER_SOLICITED_OVERRIDE,
        0,
        0,
        0,
    ];
    message.extend(target.octets());
    message.extend([TARGET_LINK_LAYER_ADDRESS, 1]);
    message.extend(mac.as_bytes());
    message
}

/// A message in a packet, with its checksum.
fn wrap(from: Ipv6Addr, to: Ipv6Addr, mut message: Vec<u8>) -> Vec<u8> {
    Icmpv6Packet::new_unchecked(&mut *message).fill_checksum(&from, &to);
    let ip = Ipv6Repr {
        src_addr: from,
        dst_addr: to,
        next_header: IpProtocol::Icmpv6,
        payload_len: message.len(),
        hop_limit: HOPS,
    };
    let mut bytes = vec![0; ip.buffer_len() + message.len()];
    let mut packet = Ipv6Packet::new_unchecked(&mut *bytes);
    ip.emit(&mut packet);
    packet.payload_mut().copy_from_slice(&message);
    bytes
}
