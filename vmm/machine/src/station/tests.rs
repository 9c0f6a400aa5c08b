use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use proptest::prelude::*;
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{
    DhcpMessageType, DhcpPacket, DhcpRepr, Icmpv6Packet, Icmpv6Repr, IpAddress, IpProtocol,
    Ipv4Packet, Ipv4Repr, Ipv6Packet, NdiscPrefixInfoFlags, NdiscRepr, UdpPacket, UdpRepr,
};

use super::*;

const GUEST: EthernetAddress = EthernetAddress([6, 0, 0, 0, 0, 9]);
const ROUTER: [u8; 6] = [2, 0, 0, 0, 0, 1];

fn lease() -> LeaseConfig {
    LeaseConfig {
        ipv4: Some("10.1.0.9/16".parse().unwrap()),
        gateway: Some(Ipv4Addr::new(10, 1, 0, 1)),
        ipv6: Some("fd00:0:0:9::/64".parse().unwrap()),
        dns: vec![
            IpAddr::V4(Ipv4Addr::new(9, 9, 9, 9)),
            "2620:fe::fe".parse().unwrap(),
        ],
        host_name: Some("web-1".to_owned()),
        gateway_mac: MacAddress::new(ROUTER),
    }
}

fn station() -> GuestStation {
    GuestStation::new(lease(), Some(1400), None)
}

fn frame(protocol: EthernetProtocol, payload: Vec<u8>) -> Vec<u8> {
    let to = EthernetAddress::BROADCAST;
    Answer {
        to,
        protocol,
        payload,
    }
    .frame(GUEST)
}

/// What the station answers, by the way that a device asks it.
fn ask(station: &mut GuestStation, frame: &[u8]) -> Option<Vec<u8>> {
    let now = Instant::now();
    if !station.takes(frame.get(..62).unwrap_or(frame)) {
        return None;
    }
    station.receive(frame, now);
    let mut buffer = [0; 1514];
    let len = station.send(&mut buffer, now)?;
    let answer = buffer[..len].to_vec();
    let ethernet = EthernetFrame::new_checked(&answer).unwrap();
    assert_eq!(
        (ethernet.src_addr(), ethernet.dst_addr()),
        (EthernetAddress(ROUTER), GUEST)
    );
    assert_eq!(station.send(&mut buffer, now), None);
    Some(ethernet.payload().to_vec())
}

fn message(kind: DhcpMessageType) -> DhcpRepr<'static> {
    DhcpRepr {
        message_type: kind,
        transaction_id: 77,
        secs: 3,
        client_hardware_address: GUEST,
        client_ip: Ipv4Addr::UNSPECIFIED,
        your_ip: Ipv4Addr::UNSPECIFIED,
        server_ip: Ipv4Addr::UNSPECIFIED,
        router: None,
        subnet_mask: None,
        relay_agent_ip: Ipv4Addr::UNSPECIFIED,
        broadcast: false,
        requested_ip: None,
        client_identifier: Some(GUEST),
        server_identifier: None,
        parameter_request_list: Some(&[1, 3, 6, 12, 26]),
        dns_servers: None,
        max_size: Some(576),
        lease_duration: None,
        renew_duration: None,
        rebind_duration: None,
        additional_options: &[],
    }
}

fn dhcp(message: &DhcpRepr<'_>) -> Vec<u8> {
    let udp = UdpRepr {
        src_port: 68,
        dst_port: 67,
    };
    let ip = Ipv4Repr {
        src_addr: message.client_ip,
        dst_addr: Ipv4Addr::BROADCAST,
        next_header: IpProtocol::Udp,
        payload_len: udp.header_len() + message.buffer_len(),
        hop_limit: 64,
    };
    let checksums = ChecksumCapabilities::default();
    let mut bytes = vec![0; ip.buffer_len() + ip.payload_len];
    let mut packet = Ipv4Packet::new_unchecked(&mut *bytes);
    ip.emit(&mut packet, &checksums);
    let (from, to) = (IpAddress::Ipv4(ip.src_addr), IpAddress::Ipv4(ip.dst_addr));
    let mut datagram = UdpPacket::new_unchecked(packet.payload_mut());
    udp.emit(
        &mut datagram,
        &from,
        &to,
        message.buffer_len(),
        |payload| {
            message
                .emit(&mut DhcpPacket::new_unchecked(payload))
                .unwrap();
        },
        &checksums,
    );
    frame(EthernetProtocol::Ipv4, bytes)
}

/// The answer of DHCP in a packet: where it goes, its kind, the address that it gives, and all of it.
fn read(packet: &[u8]) -> (Ipv4Addr, DhcpMessageType, Ipv4Addr, Vec<u8>) {
    let packet = Ipv4Packet::new_checked(packet).unwrap();
    assert!(packet.verify_checksum());
    let datagram = UdpPacket::new_checked(packet.payload()).unwrap();
    let (from, to) = (packet.src_addr().into(), packet.dst_addr().into());
    assert!(datagram.verify_checksum(&from, &to));
    assert_eq!((datagram.src_port(), datagram.dst_port()), (67, 68));
    let message = DhcpPacket::new_checked(datagram.payload()).unwrap();
    let reply = DhcpRepr::parse(&message).unwrap();
    assert_eq!(reply.transaction_id, 77);
    (
        packet.dst_addr(),
        reply.message_type,
        reply.your_ip,
        datagram.payload().to_vec(),
    )
}

#[test]
fn a_client_that_asks_is_offered_and_given_its_address_and_all_of_the_lease() {
    let mut station = station();
    let offer = ask(&mut station, &dhcp(&message(DhcpMessageType::Discover))).unwrap();
    let own = Ipv4Addr::new(10, 1, 0, 9);
    let (to, kind, address, bytes) = read(&offer);
    assert_eq!(
        (to, kind, address),
        (Ipv4Addr::BROADCAST, DhcpMessageType::Offer, own)
    );
    let packet = DhcpPacket::new_checked(&*bytes).unwrap();
    let offered = DhcpRepr::parse(&packet).unwrap();
    let server = Ipv4Addr::new(10, 1, 0, 1);
    assert_eq!(
        (offered.router, offered.server_identifier),
        (Some(server), Some(server))
    );
    assert_eq!(offered.subnet_mask, Some(Ipv4Addr::new(255, 255, 0, 0)));
    assert_eq!(
        offered.dns_servers.unwrap().as_slice(),
        [Ipv4Addr::new(9, 9, 9, 9)]
    );
    assert_eq!(offered.lease_duration, Some(u32::MAX));
    let options: Vec<_> = packet
        .options()
        .map(|option| (option.kind, option.data.to_vec()))
        .collect();
    assert!(options.contains(&(12, b"web-1".to_vec())));
    assert!(options.contains(&(26, 1400u16.to_be_bytes().to_vec())));
    let request = DhcpRepr {
        requested_ip: Some(own),
        server_identifier: Some(server),
        ..message(DhcpMessageType::Request)
    };
    let (_, kind, address, _) = read(&ask(&mut station, &dhcp(&request)).unwrap());
    assert_eq!((kind, address), (DhcpMessageType::Ack, own));
    // A client that renews has an address, and hears what is sent to it.
    let renewal = DhcpRepr {
        client_ip: own,
        ..message(DhcpMessageType::Request)
    };
    let (to, kind, _, _) = read(&ask(&mut station, &dhcp(&renewal)).unwrap());
    assert_eq!((to, kind), (own, DhcpMessageType::Ack));
}

#[test]
fn a_client_that_wants_another_address_is_refused_and_one_of_another_server_ignored() {
    let mut station = station();
    let other = Ipv4Addr::new(10, 1, 0, 8);
    let request = DhcpRepr {
        requested_ip: Some(other),
        ..message(DhcpMessageType::Request)
    };
    let (_, kind, address, _) = read(&ask(&mut station, &dhcp(&request)).unwrap());
    assert_eq!(
        (kind, address),
        (DhcpMessageType::Nak, Ipv4Addr::UNSPECIFIED)
    );
    let elsewhere = DhcpRepr {
        server_identifier: Some(other),
        ..request
    };
    assert_eq!(ask(&mut station, &dhcp(&elsewhere)), None);
    for kind in [
        DhcpMessageType::Release,
        DhcpMessageType::Decline,
        DhcpMessageType::Offer,
    ] {
        assert_eq!(ask(&mut station, &dhcp(&message(kind))), None);
    }
}

fn arp_request(sender: Ipv4Addr, target: Ipv4Addr) -> Vec<u8> {
    use smoltcp::wire::{ArpOperation, ArpPacket, ArpRepr};
    let request = ArpRepr::EthernetIpv4 {
        operation: ArpOperation::Request,
        source_hardware_addr: GUEST,
        source_protocol_addr: sender,
        target_hardware_addr: EthernetAddress([0; 6]),
        target_protocol_addr: target,
    };
    let mut payload = vec![0; request.buffer_len()];
    request.emit(&mut ArpPacket::new_unchecked(&mut *payload));
    frame(EthernetProtocol::Arp, payload)
}

#[test]
fn every_address_but_the_guests_own_leads_to_the_router() {
    let mut station = station();
    let own = Ipv4Addr::new(10, 1, 0, 9);
    for target in [[10, 1, 0, 1], [10, 1, 77, 3], [169, 254, 169, 254]].map(Ipv4Addr::from) {
        let answer = ask(&mut station, &arp_request(own, target)).unwrap();
        assert_eq!(answer[8..14], ROUTER);
        assert_eq!(answer[14..18], target.octets());
    }
    // A probe for its own address, an announcement, and a probe for any.
    let none = Ipv4Addr::UNSPECIFIED;
    for (sender, target) in [(own, own), (none, own), (none, Ipv4Addr::new(10, 1, 0, 1))] {
        assert_eq!(ask(&mut station, &arp_request(sender, target)), None);
    }
    // Without a router of its own, the host answers.
    let lease = LeaseConfig {
        gateway_mac: None,
        ..lease()
    };
    let station = GuestStation::new(lease, None, None);
    assert!(!station.takes(&arp_request(own, Ipv4Addr::new(10, 1, 0, 1))));
}

fn solicitation(sender: Ipv6Addr, target: Option<Ipv6Addr>) -> Vec<u8> {
    let mut bytes = match target {
        None => vec![133, 0, 0, 0, 0, 0, 0, 0],
        Some(target) => [vec![135, 0, 0, 0, 0, 0, 0, 0], target.octets().to_vec()].concat(),
    };
    let to = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 2);
    Icmpv6Packet::new_unchecked(&mut *bytes).fill_checksum(&sender, &to);
    let ip = smoltcp::wire::Ipv6Repr {
        src_addr: sender,
        dst_addr: to,
        next_header: IpProtocol::Icmpv6,
        payload_len: bytes.len(),
        hop_limit: 255,
    };
    let mut all = vec![0; ip.buffer_len() + bytes.len()];
    let mut packet = Ipv6Packet::new_unchecked(&mut *all);
    ip.emit(&mut packet);
    packet.payload_mut().copy_from_slice(&bytes);
    frame(EthernetProtocol::Ipv6, all)
}

fn discovery(packet: &[u8]) -> (Ipv6Addr, Vec<u8>) {
    let packet = Ipv6Packet::new_checked(packet).unwrap();
    assert_eq!(packet.hop_limit(), 255);
    let message = Icmpv6Packet::new_checked(packet.payload()).unwrap();
    // Parsing compares the checksum.
    Icmpv6Repr::parse(
        &packet.src_addr(),
        &packet.dst_addr(),
        &message,
        &ChecksumCapabilities::default(),
    )
    .unwrap();
    (packet.dst_addr(), packet.payload().to_vec())
}

#[test]
fn a_host_that_looks_for_a_router_is_given_a_network_of_its_own() {
    let mut station = station();
    let link: Ipv6Addr = "fe80::400:ff:fe00:9".parse().unwrap();
    let answer = ask(&mut station, &solicitation(link, None)).unwrap();
    let (to, bytes) = discovery(&answer);
    assert_eq!(to, link);
    let packet = Icmpv6Packet::new_checked(&*bytes).unwrap();
    let NdiscRepr::RouterAdvert {
        router_lifetime,
        mtu,
        prefix_info,
        lladdr,
        ..
    } = NdiscRepr::parse(&packet).unwrap()
    else {
        panic!("no advertisement");
    };
    let prefix = prefix_info.unwrap();
    assert_eq!(
        (prefix.prefix_len, prefix.prefix),
        (64, "fd00:0:0:9::".parse().unwrap())
    );
    assert_eq!(prefix.flags, NdiscPrefixInfoFlags::ADDRCONF);
    assert!(router_lifetime.secs() > 0);
    assert_eq!((mtu, lladdr.unwrap().as_bytes()), (Some(1400), &ROUTER[..]));
    let server: Ipv6Addr = "2620:fe::fe".parse().unwrap();
    assert!(bytes.windows(16).any(|part| part == server.octets()));
    let (to, _) =
        discovery(&ask(&mut station, &solicitation(Ipv6Addr::UNSPECIFIED, None)).unwrap());
    assert_eq!(to, Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1));
}

#[test]
fn neighbours_of_ipv6_are_the_router_but_for_the_guests_own_network() {
    let mut station = station();
    let own: Ipv6Addr = "fd00:0:0:9::7".parse().unwrap();
    for target in ["fe80::1", "fd00:0:0:8::7", "2001:db8::1"] {
        let target: Ipv6Addr = target.parse().unwrap();
        let (to, bytes) = discovery(&ask(&mut station, &solicitation(own, Some(target))).unwrap());
        assert_eq!(
            (to, bytes[0], &bytes[8..24]),
            (own, 136, &target.octets()[..])
        );
    }
    // It looks whether another has its address, or asks for one of its own network.
    let none = Ipv6Addr::UNSPECIFIED;
    for (sender, target) in [
        (none, own),
        (none, "fe80::1".parse().unwrap()),
        (own, "fd00:0:0:9::8".parse().unwrap()),
    ] {
        assert_eq!(ask(&mut station, &solicitation(sender, Some(target))), None);
    }
}

#[test]
fn what_is_for_nobody_here_goes_to_the_network() {
    let station = station();
    for other in [
        frame(EthernetProtocol::Ipv4, vec![0x45; 60]),
        frame(EthernetProtocol::Ipv6, vec![0x60; 60]),
        frame(EthernetProtocol::Unknown(0x88cc), vec![0; 60]),
        vec![0; 13],
        Vec::new(),
    ] {
        assert!(
            !station.takes(other.get(..62).unwrap_or(&other)),
            "{other:?}"
        );
    }
}

#[test]
fn a_guest_that_reads_no_answer_makes_none_pile_up() {
    let mut station = station();
    for _ in 0..1000 {
        station.receive(&dhcp(&message(DhcpMessageType::Discover)), Instant::now());
    }
    assert_eq!(station.answers.len(), MAX_ANSWERS);
    station.reset();
    assert!(station.answers.is_empty());
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// Frames that are right but for a few bytes, and cut anywhere.
    #[test]
    fn no_frame_makes_it_panic_or_answer_with_more_than_a_frame(
        which in 0usize..5,
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
        cut in any::<prop::sample::Index>(),
        is_cut: bool,
    ) {
        let mut bytes = match which {
            0 => dhcp(&message(DhcpMessageType::Discover)),
            1 => dhcp(&message(DhcpMessageType::Request)),
            2 => arp_request(Ipv4Addr::new(10, 1, 0, 9), Ipv4Addr::new(10, 1, 0, 1)),
            3 => solicitation("fe80::2".parse().unwrap(), None),
            _ => solicitation("fe80::2".parse().unwrap(), Some("fe80::1".parse().unwrap())),
        };
        for (at, byte) in changes {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        if is_cut {
            bytes.truncate(cut.index(bytes.len() + 1));
        }
        let mut station = station();
        station.takes(bytes.get(..62).unwrap_or(&bytes));
        station.receive(&bytes, Instant::now());
        let mut buffer = [0; 1514];
        while let Some(len) = station.send(&mut buffer, Instant::now()) {
            prop_assert!((14..=1514).contains(&len));
        }
    }
}
