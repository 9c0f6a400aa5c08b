//! The addresses of Ethernet that belong to those of IPv4 (RFC 826): all lead to the router.

use std::net::Ipv4Addr;

use smoltcp::wire::{ArpOperation, ArpPacket, ArpRepr, EthernetAddress};

/// Which address a packet asks for, or is about.
pub(super) fn target(payload: &[u8]) -> Option<Ipv4Addr> {
    let target: [u8; 4] = payload.get(24..28)?.try_into().ok()?;
    Some(target.into())
}

/// The reply to a request for any address but the guest's `own`, which it asks for to find whether another has it (RFC
/// 5227). All other addresses of its network are behind the router.
pub(super) fn answer(
    payload: &[u8],
    own: Option<Ipv4Addr>,
    mac: EthernetAddress,
) -> Option<Vec<u8>> {
    let request = ArpRepr::parse(&ArpPacket::new_checked(payload).ok()?).ok()?;
    let ArpRepr::EthernetIpv4 {
        operation: ArpOperation::Request,
        source_hardware_addr,
        source_protocol_addr,
        target_protocol_addr,
        ..
    } = request
    else {
        return None;
    };
    // A probe has no sender, and an announcement asks for its sender.
    if Some(target_protocol_addr) == own
        || source_protocol_addr.is_unspecified()
        || source_protocol_addr == target_protocol_addr
    {
        return None;
    }
    let reply = ArpRepr::EthernetIpv4 {
        operation: ArpOperation::Reply,
        source_hardware_addr: mac,
        source_protocol_addr: target_protocol_addr,
        target_hardware_addr: source_hardware_addr,
        target_protocol_addr: source_protocol_addr,
    };
    let mut payload = vec![0; reply.buffer_len()];
    reply.emit(&mut ArpPacket::new_unchecked(&mut *payload));
    Some(payload)
}
