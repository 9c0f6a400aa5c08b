//! What guests reach, and who reaches them.

use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr, TcpListener, UdpSocket};
use std::time::Duration;

use super::frames::{Frame, Transport, data, echo, syn, syn_ack, udp};
use super::world::{
    Guest, HOST4, HOST6, ROUTER_MAC, SERVER4, SERVER6, World, attachment, in_namespace, lan,
};
use crate::mac::gateway_mac;
use crate::spec::{Access, Network, Outside};

/// What of a packet of the guest is seen outside.
fn sent(world: &mut World, guest: &mut Guest, packet: &[u8]) -> Option<Frame> {
    guest.send(packet);
    world.outside.received().pop()
}

fn is_let_out(world: &mut World, guest: &mut Guest, packet: &[u8]) -> bool {
    let frame = sent(world, guest, packet);
    assert!(
        frame
            .as_ref()
            .is_none_or(|frame| frame.to_mac == ROUTER_MAC)
    );
    frame.is_some()
}

#[test]
fn a_guest_reaches_a_server_under_the_hosts_address_and_gets_its_answer() {
    in_namespace(|| {
        let lan = lan();
        let mut world = World::with(vec![lan.clone()]);
        let mut guest = world.guest(attachment(&lan, 0, 2));
        for (host, server) in [
            (IpAddr::V4(HOST4), IpAddr::V4(SERVER4)),
            (HOST6.into(), SERVER6.into()),
        ] {
            let own = guest.address_like(server);
            for packet in [
                udp((own, 4000), (server, 53), b"query"),
                syn((own, 4001), (server, 80)),
                echo(own, server, false),
            ] {
                let out = sent(&mut world, &mut guest, &packet).expect("a frame outside");
                assert_eq!(
                    (out.source, out.destination, out.to_mac),
                    (host, server, ROUTER_MAC)
                );
                let (to, from) = (
                    (out.source, out.source_port),
                    (out.destination, out.destination_port),
                );
                world.arrives(&match out.transport {
                    Transport::Udp => udp(from, to, b"answer"),
                    Transport::Tcp { .. } => syn_ack(from, to),
                    _ => echo(from.0, to.0, true),
                });
                let back = guest.end.one();
                assert_eq!((back.source, back.destination), (server, own));
                assert_eq!(back.to_mac, guest.mac());
                assert_eq!(back.bytes[6..12], gateway_mac().bytes());
            }
        }
        // Of what nobody asked for, nothing arrives.
        let stranger = (SERVER4, 9);
        world.arrives(&udp(stranger, (HOST4, 4000), b"x"));
        world.arrives(&udp(stranger, (guest.v4(), 4000), b"x"));
        world.arrives(&syn((SERVER6, 9), (guest.v6(), 4000)));
        assert_eq!(guest.end.received(), []);
    });
}

#[test]
fn addresses_of_a_network_that_no_guest_has_do_not_leave_the_host() {
    in_namespace(|| {
        let mut lan = lan();
        lan.peers = Access::Allow;
        let mut world = World::with(vec![lan.clone()]);
        let mut guest = world.guest(attachment(&lan, 0, 2));
        let own = (guest.v4(), 1);
        assert!(!is_let_out(
            &mut world,
            &mut guest,
            &udp(own, ("10.1.9.9".parse::<IpAddr>().unwrap(), 1), b"x")
        ));
        let own = (guest.v6(), 1);
        assert!(!is_let_out(
            &mut world,
            &mut guest,
            &udp(own, ("fd00:1::9".parse::<IpAddr>().unwrap(), 1), b"x")
        ));
        // From the host itself.
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        assert!(socket.send_to(b"x", "10.1.9.9:1").is_err());
        assert_eq!(world.outside.received(), []);
    });
}

#[test]
fn a_guest_of_an_isolated_network_reaches_nothing_outside() {
    in_namespace(|| {
        let mut lan = lan();
        lan.outside = Outside::Isolated;
        let mut world = World::with(vec![lan.clone()]);
        let mut guest = world.guest(attachment(&lan, 0, 2));
        for server in [IpAddr::V4(SERVER4), SERVER6.into()] {
            let own = guest.address_like(server);
            for packet in [
                udp((own, 4000), (server, 53), b"x"),
                syn((own, 4001), (server, 80)),
                echo(own, server, false),
            ] {
                assert!(!is_let_out(&mut world, &mut guest, &packet));
            }
            // The refusal is told.
            assert_eq!(guest.end.received().len(), 3);
        }
    });
}

#[test]
fn an_allow_list_lets_out_what_it_names_alone() {
    in_namespace(|| {
        let mut lan = lan();
        lan.allow = [
            "198.51.100.0/24:8000-8999",
            "203.0.113.9",
            "[2001:db8:7::]/48:443",
            "a.example:443",
            "b.example",
        ]
        .map(|entry| entry.parse().unwrap())
        .to_vec();
        lan.dns = vec!["203.0.113.53".parse().unwrap()];
        let mut world = World::with(vec![lan.clone()]);
        let mut guest = world.guest(attachment(&lan, 0, 2));
        let to = |address: &str| -> SocketAddr { address.parse().unwrap() };
        let mut port = 1000;
        let mut is_open = |world: &mut World, destination: SocketAddr| {
            let own = guest.address_like(destination.ip());
            port += 1;
            let destination = (destination.ip(), destination.port());
            let tcp = is_let_out(world, &mut guest, &syn((own, port), destination));
            assert_eq!(
                is_let_out(world, &mut guest, &udp((own, port), destination, b"x")),
                tcp
            );
            tcp
        };
        for open in [
            "198.51.100.7:8000",
            "198.51.100.7:8999",
            "203.0.113.9:1",
            "[2001:db8:7::7]:443",
            "203.0.113.53:53",
        ] {
            assert!(is_open(&mut world, to(open)), "{open}");
        }
        let closed = [
            "198.51.100.7:7999",
            "198.51.100.7:9000",
            "203.0.113.8:1",
            "[2001:db8:7::7]:80",
            "203.0.113.53:54",
            "203.0.113.80:443",
        ];
        for closed in closed {
            assert!(!is_open(&mut world, to(closed)), "{closed}");
        }
        // A name is open at the addresses that it has now.
        let names: Vec<_> = world.host.names().cloned().collect();
        assert_eq!(
            names
                .iter()
                .map(crate::DomainName::as_str)
                .collect::<Vec<_>>(),
            ["a.example", "b.example"]
        );
        world
            .host
            .set_name(
                &names[0],
                &[
                    "203.0.113.80".parse().unwrap(),
                    "2001:db8:9::1".parse().unwrap(),
                ],
            )
            .unwrap();
        assert!(
            is_open(&mut world, to("203.0.113.80:443"))
                && is_open(&mut world, to("[2001:db8:9::1]:443"))
        );
        assert!(!is_open(&mut world, to("203.0.113.80:80")));
        world
            .host
            .set_name(&names[0], &["203.0.113.81".parse().unwrap()])
            .unwrap();
        assert!(
            !is_open(&mut world, to("203.0.113.80:443"))
                && is_open(&mut world, to("203.0.113.81:443"))
        );
        let ping = echo(guest.v4(), "203.0.113.9".parse::<IpAddr>().unwrap(), false);
        assert!(is_let_out(&mut world, &mut guest, &ping));
    });
}

#[test]
fn a_published_port_leads_to_the_guest() {
    in_namespace(|| {
        let lan = lan();
        let mut world = World::with(vec![lan.clone()]);
        let mut with_ports = attachment(&lan, 0, 2);
        with_ports.published = [
            "8080:80",
            "8080:80/udp",
            "192.0.2.1:9090:90/tcp",
            "[2001:db8::1]:9090:90/udp",
        ]
        .map(|port| port.parse().unwrap())
        .to_vec();
        let mut guest = world.guest(with_ports);
        for (host, server) in [
            (IpAddr::V4(HOST4), IpAddr::V4(SERVER4)),
            (HOST6.into(), SERVER6.into()),
        ] {
            let own = guest.address_like(host);
            world.arrives(&syn((server, 7), (host, 8080)));
            let frame = guest.end.one();
            assert_eq!(
                (frame.source, frame.destination, frame.destination_port),
                (server, own, 80)
            );
            let answer =
                sent(&mut world, &mut guest, &syn_ack((own, 80), (server, 7))).expect("an answer");
            assert_eq!(
                (answer.source, answer.source_port, answer.destination),
                (host, 8080, server)
            );
            world.arrives(&udp((server, 7), (host, 8080), b"x"));
            let frame = guest.end.one();
            assert_eq!(
                (
                    frame.destination,
                    frame.destination_port,
                    &frame.payload[..]
                ),
                (own, 80, &b"x"[..])
            );
            let answer = sent(&mut world, &mut guest, &udp((own, 80), (server, 7), b"y"))
                .expect("an answer");
            assert_eq!((answer.source, answer.source_port), (host, 8080));
        }
        // Ports of one address and protocol.
        world.arrives(&syn((SERVER4, 8), (HOST4, 9090)));
        assert_eq!(guest.end.one().destination_port, 90);
        world.arrives(&udp((SERVER6, 8), (HOST6, 9090), b"x"));
        assert_eq!(guest.end.one().destination_port, 90);
        world.arrives(&udp((SERVER4, 8), (HOST4, 9090), b"x"));
        world.arrives(&syn((SERVER6, 8), (HOST6, 9090)));
        world.arrives(&syn((SERVER4, 8), (HOST4, 80)));
        assert_eq!(guest.end.received(), []);
        // A port is free again when its guest is gone.
        world.host.detach(&[guest.attachment.outer.v4]).unwrap();
        let mut other = attachment(&lan, 0, 3);
        other.published = guest.attachment.published.clone();
        let mut other = world.guest(other);
        world.arrives(&syn((SERVER4, 70), (HOST4, 8080)));
        assert_eq!(other.end.one().destination, IpAddr::V4(other.v4()));
    });
}

#[test]
fn the_host_reaches_guests_and_their_published_ports_by_each_of_its_addresses() {
    in_namespace(|| {
        let lan = lan();
        let mut world = World::with(vec![lan.clone()]);
        let mut attachment = attachment(&lan, 0, 2);
        attachment.published = vec!["8080:80/udp".parse().unwrap()];
        let mut guest = world.guest(attachment);
        for (bound, to) in [
            ("127.0.0.1:0", "127.0.0.1:8080"),
            ("0.0.0.0:0", "192.0.2.1:8080"),
            ("0.0.0.0:0", "10.1.0.1:8080"),
            ("0.0.0.0:0", "10.1.0.2:80"),
            ("[::]:0", "[2001:db8::1]:8080"),
            ("[::]:0", "[fd00:1:0:2:0:aff:fe01:2]:80"),
        ] {
            let socket = UdpSocket::bind(bound).unwrap();
            socket
                .set_read_timeout(Some(Duration::from_secs(5)))
                .unwrap();
            socket.connect(to).expect(to);
            socket.send(b"query").expect(to);
            let frame = guest.end.one();
            assert_eq!(
                (frame.destination, frame.destination_port),
                (guest.address_like(frame.source), 80),
                "{to}"
            );
            assert!(!frame.source.is_loopback(), "{to}");
            guest.send(&udp(
                (frame.destination, 80),
                (frame.source, frame.source_port),
                b"answer",
            ));
            let mut answer = [0; 16];
            let length = socket
                .recv(&mut answer)
                .unwrap_or_else(|error| panic!("{to}: {error}"));
            assert_eq!(&answer[..length], b"answer");
        }
    });
}

/// What a guest sends to an address of the host: whether a socket there gets it.
fn reaches_host(network: impl FnOnce(&mut Network), to: &str) -> bool {
    let mut lan = lan();
    network(&mut lan);
    let mut world = World::with(vec![lan.clone()]);
    let mut guest = world.guest(attachment(&lan, 0, 2));
    let to: IpAddr = to.parse().unwrap();
    let socket = UdpSocket::bind("[::]:53").unwrap();
    socket.set_nonblocking(true).unwrap();
    let listener = TcpListener::bind("[::]:53").unwrap();
    listener.set_nonblocking(true).unwrap();
    let own = guest.address_like(to);
    guest.send(&udp((own, 4000), (to, 53), b"x"));
    guest.send(&syn((own, 4000), (to, 53)));
    guest.send(&data((own, 4001), (to, 53), b"x"));
    let by_udp = match socket.recv(&mut [0; 4]) {
        Ok(_) => true,
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::WouldBlock);
            false
        }
    };
    let is_accepted = |frame: &Frame| frame.transport == Transport::Tcp { reset: false };
    let frames = guest.end.received();
    assert_eq!(frames.iter().any(is_accepted), by_udp, "{to}: {frames:?}");
    assert_eq!(world.outside.received(), []);
    by_udp
}

#[test]
fn a_guest_reaches_no_address_of_the_host_unless_its_network_says_so() {
    for to in ["10.1.0.1", "192.0.2.1", "fd00:1::1", "2001:db8::1"] {
        in_namespace(move || assert!(!reaches_host(|_| (), to), "{to}"));
        in_namespace(move || assert!(reaches_host(|lan| lan.host = Access::Allow, to), "{to}"));
        // A DNS server of the host.
        in_namespace(move || {
            assert!(
                reaches_host(|lan| lan.dns = vec![to.parse().unwrap()], to),
                "{to}"
            );
        });
    }
    for to in ["10.1.255.255", "255.255.255.255", "224.0.0.1"] {
        in_namespace(move || assert!(!reaches_host(|_| (), to), "{to}"));
    }
    for to in ["127.0.0.1", "127.255.255.254", "::1"] {
        in_namespace(move || assert!(!reaches_host(|lan| lan.host = Access::Allow, to), "{to}"));
    }
}

#[test]
fn the_metadata_of_a_cloud_is_reached_only_where_the_network_says_so() {
    in_namespace(|| {
        let (closed, mut open) = (lan(), Network::new("open", "10.2.0.0/16".parse().unwrap()));
        open.metadata = Access::Allow;
        let mut world = World::with(vec![closed.clone(), open.clone()]);
        let mut guests = [
            world.guest(attachment(&closed, 0, 2)),
            world.guest(attachment(&open, 0, 2)),
        ];
        for address in [
            "169.254.169.254",
            "169.254.0.1",
            "168.63.129.16",
            "100.100.100.200",
        ] {
            let to: IpAddr = address.parse().unwrap();
            let is_open = guests.each_mut().map(|guest| {
                let packet = syn((guest.v4(), 1), (to, 80));
                is_let_out(&mut world, guest, &packet)
            });
            assert_eq!(is_open, [false, true], "{address}");
        }
        let to: IpAddr = "fd00:ec2::254".parse().unwrap();
        let packet = syn((guests[0].v6(), 1), (to, 80));
        assert!(!is_let_out(&mut world, &mut guests[0], &packet));
    });
}

/// Wi-Fi, Ethernet and loopback alike: a frame of the largest size that a driver hands over, with a checksum that the
/// hardware would fill in (VIRTIO 1.2, 5.1.6.2).
#[test]
fn segments_that_the_host_has_to_cut_and_sum_are_right_outside() {
    in_namespace(|| {
        let lan = lan();
        let mut world = World::with(vec![lan.clone()]);
        let mut guest = world.guest(attachment(&lan, 0, 2));
        let payload: Vec<u8> = (0..20_000_u32).map(|at| at as u8).collect();
        large_segments(
            &mut world,
            &mut guest,
            HOST4.into(),
            SERVER4.into(),
            &payload,
        );
        large_segments(
            &mut world,
            &mut guest,
            HOST6.into(),
            SERVER6.into(),
            &payload,
        );
    });
}

/// Sends one large TCP segment of the guest, and checks what arrives outside of it.
pub(super) fn large_segments(
    world: &mut World,
    guest: &mut Guest,
    source: IpAddr,
    server: IpAddr,
    payload: &[u8],
) {
    let own = guest.address_like(server);
    guest.send(&syn((own, 4000), (server, 80)));
    let first = world.outside.one();
    world.arrives(&syn_ack((server, 80), (source, first.source_port)));
    guest.end.one();
    let mut packet = data((own, 4000), (server, 80), payload);
    let (start, kind) = if own.is_ipv4() { (20, 1) } else { (40, 4) };
    // The sum of the pseudo-header alone: what the hardware goes on from.
    let sum = pseudo_header_sum(own, server, packet.len() - start);
    packet[start + 16..start + 18].copy_from_slice(&sum.to_be_bytes());
    let (header_length, size, checksum_start) =
        ((14 + start + 20) as u16, 1400_u16, (14 + start) as u16);
    let mut header = [0; 12];
    header[..2].copy_from_slice(&[1, kind]);
    for (at, value) in [(2, header_length), (4, size), (6, checksum_start), (8, 16)] {
        header[at..at + 2].copy_from_slice(&value.to_le_bytes());
    }
    let frame = super::frames::ethernet(guest.mac(), gateway_mac().bytes(), &packet);
    guest.end.send_with(header, &frame);
    let segments = world.outside.received();
    assert_eq!(segments.len(), payload.len().div_ceil(1400));
    let mut arrived = Vec::new();
    for segment in segments {
        assert_eq!(
            (segment.source, segment.source_port),
            (source, first.source_port)
        );
        arrived.extend(segment.payload);
    }
    assert_eq!(arrived, payload);
}

fn pseudo_header_sum(source: IpAddr, destination: IpAddr, length: usize) -> u16 {
    let mut words: u32 = 6 + length as u32;
    for address in [source, destination] {
        let bytes = match address {
            IpAddr::V4(address) => address.octets().to_vec(),
            IpAddr::V6(address) => address.octets().to_vec(),
        };
        words += bytes
            .chunks(2)
            .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])))
            .sum::<u32>();
    }
    while words > 0xffff {
        words = (words & 0xffff) + (words >> 16);
    }
    words as u16
}
