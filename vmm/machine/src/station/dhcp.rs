//! A server of DHCP with one client and one address (RFC 2131, 2132).

use std::net::{IpAddr, Ipv4Addr};

use config::LeaseConfig;
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{
    DhcpMessageType, DhcpOption, DhcpPacket, DhcpRepr, IpAddress, IpProtocol, Ipv4Packet, Ipv4Repr,
    UdpPacket, UdpRepr,
};

/// Ports of the server and of the client.
const SERVER: u16 = 67;
const CLIENT: u16 = 68;
/// Seconds of a lease that does not end (RFC 2131, 3.3): a guest at rest has nothing to do for it.
const FOR_EVER: u32 = u32::MAX;
/// Options that the library does not know: the name of the client, and the MTU of its interface (RFC 2132, 3.14, 5.1).
const HOST_NAME: u8 = 12;
const INTERFACE_MTU: u8 = 26;
/// The server's address where the guest has no router: one of its link alone (RFC 3927).
const LINK_LOCAL: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 253);
const HOPS: u8 = 64;

/// Whether a packet of IPv4, of which all headers are there, is for the server.
pub(super) fn is_for_server(packet: &[u8]) -> bool {
    // Only the head of a packet is looked at, so its length cannot be checked.
    let packet = Ipv4Packet::new_unchecked(packet);
    if packet.clone().into_inner().len() < 20 || packet.version() != 4 {
        return false;
    }
    let header = usize::from(packet.header_len());
    let is_first = packet.frag_offset() == 0 && packet.next_header() == IpProtocol::Udp;
    let ports = packet.into_inner().get(header + 2..header + 4);
    is_first && header >= 20 && ports == Some(&SERVER.to_be_bytes())
}

/// The answer to a message of the client, a packet of IPv4.
pub(super) fn answer(packet: &[u8], lease: &LeaseConfig, mtu: Option<u16>) -> Option<Vec<u8>> {
    let own = lease.ipv4?;
    let packet = Ipv4Packet::new_checked(packet).ok()?;
    if packet.next_header() != IpProtocol::Udp || packet.frag_offset() != 0 || packet.more_frags() {
        return None;
    }
    let datagram = UdpPacket::new_checked(packet.payload()).ok()?;
    if datagram.dst_port() != SERVER {
        return None;
    }
    let message = DhcpPacket::new_checked(datagram.payload()).ok()?;
    let asked = DhcpRepr::parse(&message).ok()?;
    let server = lease.gateway.unwrap_or(LINK_LOCAL);
    // What is said to another server is not for this one (RFC 2131, 4.3.2).
    if asked
        .server_identifier
        .is_some_and(|identifier| identifier != server)
    {
        return None;
    }
    let address = own.addr();
    let kind = match asked.message_type {
        DhcpMessageType::Discover => DhcpMessageType::Offer,
        DhcpMessageType::Request => {
            let wanted = asked.requested_ip.unwrap_or(asked.client_ip);
            if wanted == address {
                DhcpMessageType::Ack
            } else {
                DhcpMessageType::Nak
            }
        }
        DhcpMessageType::Inform => DhcpMessageType::Ack,
        _ => return None,
    };
    let informs = asked.message_type == DhcpMessageType::Inform;
    let refuses = kind == DhcpMessageType::Nak;
    let gives = !refuses && !informs;
    let mtu = mtu.map(u16::to_be_bytes);
    let mut more = Vec::new();
    if !refuses {
        more.extend(lease.host_name.as_ref().map(|name| DhcpOption {
            kind: HOST_NAME,
            data: name.as_bytes(),
        }));
        more.extend(mtu.as_ref().map(|mtu| DhcpOption {
            kind: INTERFACE_MTU,
            data: mtu,
        }));
    }
    let dns = lease.dns.iter().filter_map(|server| match server {
        IpAddr::V4(server) => Some(*server),
        IpAddr::V6(_) => None,
    });
    let reply = DhcpRepr {
        message_type: kind,
        transaction_id: asked.transaction_id,
        secs: 0,
        client_hardware_address: asked.client_hardware_address,
        client_ip: if refuses {
            Ipv4Addr::UNSPECIFIED
        } else {
            asked.client_ip
        },
        your_ip: if gives {
            address
        } else {
            Ipv4Addr::UNSPECIFIED
        },
        server_ip: Ipv4Addr::UNSPECIFIED,
        router: lease.gateway.filter(|_| !refuses),
        subnet_mask: (!refuses).then_some(own.netmask()),
        relay_agent_ip: Ipv4Addr::UNSPECIFIED,
        broadcast: asked.broadcast,
        requested_ip: None,
        client_identifier: None,
        server_identifier: Some(server),
        parameter_request_list: None,
        dns_servers: (!refuses).then(|| dns.collect()),
        max_size: None,
        lease_duration: gives.then_some(FOR_EVER),
        renew_duration: None,
        rebind_duration: None,
        additional_options: &more,
    };
    // A client without an address hears what is sent to all; its frame is addressed to it all the same.
    let to = if asked.client_ip.is_unspecified() || refuses {
        Ipv4Addr::BROADCAST
    } else {
        asked.client_ip
    };
    Some(wrap(&reply, server, to))
}

/// A message in a datagram in a packet.
fn wrap(reply: &DhcpRepr<'_>, from: Ipv4Addr, to: Ipv4Addr) -> Vec<u8> {
    let udp = UdpRepr {
        src_port: SERVER,
        dst_port: CLIENT,
    };
    let ip = Ipv4Repr {
        src_addr: from,
        dst_addr: to,
        next_header: IpProtocol::Udp,
        payload_len: udp.header_len() + reply.buffer_len(),
        hop_limit: HOPS,
    };
    let checksums = ChecksumCapabilities::default();
    let mut bytes = vec![0; ip.buffer_len() + ip.payload_len];
    let mut packet = Ipv4Packet::new_unchecked(&mut *bytes);
    ip.emit(&mut packet, &checksums);
    let mut datagram = UdpPacket::new_unchecked(packet.payload_mut());
    udp.emit(
        &mut datagram,
        &IpAddress::Ipv4(from),
        &IpAddress::Ipv4(to),
        reply.buffer_len(),
        |payload| {
            // The room is what the message takes, and its servers and names are within their limits.
            let _ = reply.emit(&mut DhcpPacket::new_unchecked(payload));
        },
        &checksums,
    );
    bytes
}
