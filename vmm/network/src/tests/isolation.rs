//! What a hostile guest cannot do.

use std::net::{IpAddr, Ipv4Addr};

use super::frames::{data, echo, ethernet, fragments, syn, udp};
use super::world::{
    Guest, HOST4, HOST6, OUTSIDE_MAC, SERVER4, SERVER6, World, attachment, in_namespace, lan,
};
use crate::mac::gateway_mac;
use crate::spec::{Access, Network};

const BROADCAST: [u8; 6] = [0xff; 6];

/// A frame of every kind of IP packet from one address to another.
fn packets(from: IpAddr, to: IpAddr) -> Vec<Vec<u8>> {
    vec![
        udp((from, 4000), (to, 53), b"x"),
        udp((from, 68), (to, 67), b"x"),
        syn((from, 4001), (to, 80)),
        data((from, 4002), (to, 80), b"x"),
        echo(from, to, false),
        echo(from, to, true),
    ]
}

fn vlan(frame: &[u8], kind: [u8; 2], tag: u16) -> Vec<u8> {
    [&frame[..12], &kind, &tag.to_be_bytes(), &frame[12..]].concat()
}

fn arp(from: [u8; 6], to: [u8; 6], operation: u8, sender: Ipv4Addr, target: Ipv4Addr) -> Vec<u8> {
    let head = [0, 1, 8, 0, 6, 4, 0, operation];
    [
        &to[..],
        &from,
        &[8, 6],
        &head,
        &from,
        &sender.octets(),
        &[0; 6],
        &target.octets(),
        &[0; 18],
    ]
    .concat()
}

/// The addresses that a guest may want to have, of one family: not its own.
fn false_sources(own: IpAddr, other: &Guest) -> Vec<IpAddr> {
    let texts = if own.is_ipv4() {
        [
            "10.1.0.1",
            "10.1.0.0",
            "0.0.0.0",
            "127.0.0.1",
            "10.1.0.77",
            "224.0.0.1",
            "255.255.255.255",
            "192.0.2.1",
            "198.51.100.7",
        ]
    } else {
        [
            "fd00:1::1",
            "fd00:1::77",
            "::",
            "::1",
            "fe80::1",
            "ff02::1",
            "2001:db8::1",
            "2001:db8:7::7",
            "::ffff:10.1.0.2",
        ]
    };
    let others = [other.address_like(own)];
    texts
        .iter()
        .map(|text| text.parse().unwrap())
        .chain(others)
        .collect()
}

/// Every frame of a guest that lies about who it is, or is of another protocol than IP.
fn spoofed(guest: &Guest, other: &Guest, to: &[IpAddr]) -> Vec<Vec<u8>> {
    let mut frames = Vec::new();
    let gateway = gateway_mac().bytes();
    let false_macs = [
        other.mac(),
        gateway,
        OUTSIDE_MAC,
        BROADCAST,
        [0; 6],
        [2, 0, 10, 1, 0, 77],
    ];
    for to in to {
        let own = guest.address_like(*to);
        for to_mac in [gateway, other.mac(), BROADCAST, OUTSIDE_MAC] {
            for source in false_sources(own, other) {
                for packet in packets(source, *to) {
                    frames.push(ethernet(guest.mac(), to_mac, &packet));
                    if source.is_ipv4() {
                        let parts = fragments(&udp((source, 4000), (*to, 53), &[7; 32]));
                        frames.extend(parts.iter().map(|part| ethernet(guest.mac(), to_mac, part)));
                    }
                }
            }
            for mac in false_macs {
                frames.extend(
                    packets(own, *to)
                        .iter()
                        .map(|packet| ethernet(mac, to_mac, packet)),
                );
            }
            for packet in packets(own, *to) {
                let frame = ethernet(guest.mac(), to_mac, &packet);
                for (kind, tag) in [([0x81, 0], 1), ([0x81, 0], 4094), ([0x88, 0xa8], 1)] {
                    frames.push(vlan(&frame, kind, tag));
                    frames.push(vlan(&vlan(&frame, [0x81, 0], 2), kind, tag));
                }
                // MPLS, PPPoE, 802.1X, LLDP, AoE, a length of 802.3, and none that is known, over the same bytes.
                for kind in [
                    [0x88, 0x47],
                    [0x88, 0x64],
                    [0x88, 0x8e],
                    [0x88, 0xcc],
                    [0x88, 0xa2],
                    [0, 60],
                    [0x12, 0x34],
                ] {
                    frames.push([&frame[..12], &kind, &frame[14..]].concat());
                }
                frames.push(frame[..14].to_vec());
                frames.push(frame[..frame.len().min(30)].to_vec());
            }
        }
        if let IpAddr::V4(to) = *to {
            for (operation, sender) in [
                (1, guest.v4()),
                (2, guest.v4()),
                (2, other.v4()),
                (2, Ipv4Addr::new(10, 1, 0, 1)),
                (1, to),
            ] {
                for to_mac in [gateway, BROADCAST, other.mac()] {
                    frames.push(arp(guest.mac(), to_mac, operation, sender, to));
                }
            }
        }
    }
    frames
}

#[test]
fn no_frame_of_a_guest_that_lies_about_its_addresses_leaves_its_tap() {
    in_namespace(|| {
        // All is open but the check of addresses.
        let mut lan = lan();
        (lan.peers, lan.host, lan.metadata) = (Access::Allow, Access::Allow, Access::Allow);
        let mut world = World::with(vec![lan.clone()]);
        let [mut guest, mut other] = [2, 3].map(|number| world.guest(attachment(&lan, 0, number)));
        let before = super::world::ip("neighbour show");
        let to = [
            SERVER4.into(),
            SERVER6.into(),
            other.v4().into(),
            other.v6().into(),
            HOST4.into(),
            HOST6.into(),
        ];
        let frames = spoofed(&guest, &other, &to);
        assert!(frames.len() > 2000, "{}", frames.len());
        for frame in &frames {
            guest.end.send(frame);
            // The tap's own end may be told of a refusal; nobody else hears anything.
            assert_eq!(world.outside.received(), [], "{frame:x?}");
            assert_eq!(other.end.received(), [], "{frame:x?}");
            assert_eq!(guest.end.received(), [], "{frame:x?}");
        }
        assert_eq!(super::world::ip("neighbour show"), before);
        // The same packets with the guest's own addresses get through.
        for to in to {
            for packet in packets(guest.address_like(to), to).iter().take(3) {
                guest.send(packet);
            }
        }
        assert!(!world.outside.received().is_empty() && !other.end.received().is_empty());
    });
}

#[test]
fn guests_of_a_network_do_not_reach_each_other_by_any_frame() {
    in_namespace(|| {
        let lan = lan();
        let elsewhere = Network::new("elsewhere", "10.2.0.0/16".parse().unwrap());
        let mut world = World::with(vec![lan.clone(), elsewhere.clone()]);
        let mut published = attachment(&lan, 0, 3);
        published.published = vec!["53:53/udp".parse().unwrap(), "80:80".parse().unwrap()];
        let mut guest = world.guest(attachment(&lan, 0, 2));
        let mut others = [
            world.guest(published),
            world.guest(attachment(&elsewhere, 0, 2)),
        ];
        let broadcasts: [IpAddr; 3] =
            ["10.1.255.255", "255.255.255.255", "224.0.0.1"].map(|text| text.parse().unwrap());
        let mut to: Vec<IpAddr> = vec![
            others[0].v4().into(),
            others[0].v6().into(),
            others[1].v4().into(),
            HOST4.into(),
            HOST6.into(),
        ];
        to.extend(broadcasts);
        to.push("ff02::1".parse().unwrap());
        let mut frames = spoofed(&guest, &others[0], &to);
        for to in &to {
            for packet in packets(guest.address_like(*to), *to) {
                for to_mac in [
                    gateway_mac().bytes(),
                    others[0].mac(),
                    others[1].mac(),
                    BROADCAST,
                    [0x33, 0x33, 0, 0, 0, 1],
                ] {
                    frames.push(ethernet(guest.mac(), to_mac, &packet));
                }
            }
        }
        for frame in &frames {
            guest.end.send(frame);
            for other in &mut others {
                assert_eq!(other.end.received(), [], "{frame:x?}");
            }
        }
    });
}

#[test]
fn guests_of_a_network_reach_each_other_where_it_says_so_and_none_of_another() {
    in_namespace(|| {
        let mut lan = lan();
        lan.peers = Access::Allow;
        let mut elsewhere = Network::new("elsewhere", "10.2.0.0/16".parse().unwrap());
        elsewhere.peers = Access::Allow;
        let mut world = World::with(vec![lan.clone(), elsewhere.clone()]);
        let [mut guest, mut other] = [2, 3].map(|number| world.guest(attachment(&lan, 0, number)));
        let mut stranger = world.guest(attachment(&elsewhere, 0, 2));
        for to in [IpAddr::V4(other.v4()), other.v6().into()] {
            guest.send(&echo(guest.address_like(to), to, false));
            let frame = other.end.one();
            assert_eq!(
                (frame.source, frame.to_mac),
                (guest.address_like(to), other.mac())
            );
            other.send(&echo(to, frame.source, true));
            assert_eq!(guest.end.one().source, to);
        }
        guest.send(&udp((guest.v4(), 1), (stranger.v4(), 1), b"x"));
        assert_eq!(stranger.end.received(), []);
    });
}

#[test]
fn a_fragment_of_another_guest_becomes_no_part_of_a_packet() {
    in_namespace(|| {
        let lan = lan();
        let mut world = World::with(vec![lan.clone()]);
        let [mut guest, mut hostile] =
            [2, 3].map(|number| world.guest(attachment(&lan, 0, number)));
        let packet = udp((guest.v4(), 4000), (SERVER4, 53), &[1; 32]);
        let forged = udp((guest.v4(), 4000), (SERVER4, 53), &[2; 32]);
        guest.send(&fragments(&packet)[0]);
        hostile.end.send(&ethernet(
            hostile.mac(),
            gateway_mac().bytes(),
            &fragments(&forged)[1],
        ));
        assert_eq!(world.outside.received(), []);
        guest.send(&fragments(&packet)[1]);
        let frames = world.outside.received();
        assert!(!frames.is_empty());
        assert!(frames.iter().all(|frame| !frame.payload.contains(&2)));
    });
}

#[test]
fn a_tap_that_the_rules_do_not_know_can_neither_send_nor_receive() {
    in_namespace(|| {
        let lan = lan();
        let mut world = World::with(vec![lan.clone()]);
        let mut guest = world.guest(attachment(&lan, 0, 2));
        let addresses = guest.attachment.clone();
        crate::nft::run(&crate::rules::delete(std::iter::once(&addresses))).unwrap();
        guest.send(&udp((guest.v4(), 1), (SERVER4, 1), b"x"));
        assert_eq!(world.outside.received(), []);
        let socket = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
        let _ = socket.send_to(b"x", (guest.v4(), 1));
        assert_eq!(guest.end.received(), []);
    });
}

#[test]
fn a_guest_takes_any_address_of_its_own_ipv6_network_and_none_of_others() {
    in_namespace(|| {
        let lan = lan();
        let mut world = World::with(vec![lan.clone()]);
        let mut guest = world.guest(attachment(&lan, 0, 2));
        for (address, is_own) in [
            ("fd00:1:0:2::1", true),
            ("fd00:1:0:2:ffff:ffff:ffff:ffff", true),
            ("fd00:1:0:3::1", false),
            ("fd00:1:0:1:ffff:ffff:ffff:ffff", false),
            ("fd00:1:1:2::1", false),
        ] {
            let address: IpAddr = address.parse().unwrap();
            guest.send(&udp((address, 1), (SERVER6, 1), b"x"));
            let out = world.outside.received();
            assert_eq!(out.len(), usize::from(is_own), "{address}");
            for out in out {
                world.arrives(&udp((SERVER6, 1), (out.source, out.source_port), b"y"));
                let back = guest.end.one();
                assert_eq!((back.destination, back.to_mac), (address, guest.mac()));
            }
        }
    });
}
