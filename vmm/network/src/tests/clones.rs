//! Clones: guests that believe themselves to have the addresses of their template.

use std::net::{IpAddr, Ipv4Addr};

use super::frames::{
    Frame, Transport, data, data_back, echo, echo_reply, ethernet, fill_sum, fragments, syn,
    syn_ack, udp,
};
use super::reach::large_segments;
use super::world::{
    Guest, HOST4, HOST6, SERVER4, SERVER6, World, attachment, in_namespace, lan, state,
};
use crate::host::HostNetworks;
use crate::mac::address_in;
use crate::spec::{Access, Network, Networks};

/// A guest with another's addresses for itself.
fn clone_of(world: &mut World, lan: &Network, template: &Guest, number: u8) -> Guest {
    let mut clone = attachment(lan, 0, number);
    (clone.inner, clone.mac) = (template.attachment.inner, template.attachment.mac);
    world.guest(clone)
}

fn outer_like(guest: &Guest, other: IpAddr) -> IpAddr {
    let outer = guest.attachment.outer;
    if other.is_ipv4() {
        outer.v4.into()
    } else {
        address_in(outer.v6.unwrap(), guest.attachment.mac).into()
    }
}

#[test]
fn a_template_and_its_clones_talk_to_one_server_at_once() {
    in_namespace(|| {
        let lan = lan();
        let mut world = World::with(vec![lan.clone()]);
        let template = world.guest(attachment(&lan, 0, 2));
        let clones = [3, 4].map(|number| clone_of(&mut world, &lan, &template, number));
        let mut guests: Vec<_> = std::iter::once(template).chain(clones).collect();
        for (host, server) in [
            (IpAddr::V4(HOST4), IpAddr::V4(SERVER4)),
            (HOST6.into(), SERVER6.into()),
        ] {
            let own = guests[0].address_like(server);
            for packet in [
                udp((own, 4000), (server, 53), b"query"),
                syn((own, 4001), (server, 80)),
                echo(own, server, false),
            ] {
                // All send the very same packet.
                let out: Vec<_> = guests
                    .iter_mut()
                    .map(|guest| {
                        guest.send(&packet);
                        world.outside.one()
                    })
                    .collect();
                let mut ports: Vec<_> = out.iter().map(|out| out.source_port).collect();
                assert!(
                    out.iter()
                        .all(|out| (out.source, out.destination) == (host, server))
                );
                ports.sort_unstable();
                ports.dedup();
                assert_eq!(ports.len(), guests.len());
                for (at, out) in out.iter().enumerate() {
                    let (to, from) = (
                        (out.source, out.source_port),
                        (out.destination, out.destination_port),
                    );
                    world.arrives(&match out.transport {
                        Transport::Udp => udp(from, to, &[at as u8]),
                        Transport::Tcp { .. } => syn_ack(from, to),
                        _ => echo_reply(from.0, to.0, out.source_port),
                    });
                    for (number, guest) in guests.iter_mut().enumerate() {
                        let back = guest.end.received();
                        assert_eq!(back.len(), usize::from(number == at));
                        assert!(
                            back.iter()
                                .all(|frame| (frame.source, frame.destination) == (server, own))
                        );
                        assert!(back.iter().all(|frame| frame.to_mac == guest.mac()));
                    }
                }
            }
        }
    });
}

#[test]
fn a_clone_is_reached_by_its_own_addresses_and_ports() {
    in_namespace(|| {
        let mut lan = lan();
        lan.peers = Access::Allow;
        let mut world = World::with(vec![lan.clone()]);
        let mut template = world.guest(attachment(&lan, 0, 2));
        let mut attachment = attachment(&lan, 0, 3);
        (attachment.inner, attachment.mac) = (template.attachment.inner, template.attachment.mac);
        attachment.published = vec!["8080:80".parse().unwrap()];
        let mut clone = world.guest(attachment);
        for (host, server) in [
            (IpAddr::V4(HOST4), IpAddr::V4(SERVER4)),
            (HOST6.into(), SERVER6.into()),
        ] {
            let own = clone.address_like(host);
            world.arrives(&syn((server, 7), (host, 8080)));
            let frame = clone.end.one();
            assert_eq!(
                (frame.source, frame.destination, frame.destination_port),
                (server, own, 80)
            );
            assert_eq!(frame.to_mac, template.mac());
            clone.send(&syn_ack((own, 80), (server, 7)));
            let answer = world.outside.one();
            assert_eq!((answer.source, answer.source_port), (host, 8080));
            // The template reaches it by the address that is the clone's alone, and is seen by its own.
            let outer = outer_like(&clone, host);
            for packet in [
                udp((own, 1), (outer, 2), b"x"),
                syn((own, 3), (outer, 4)),
                echo(own, outer, false),
            ] {
                template.send(&packet);
                let frame = clone.end.one();
                assert_eq!((frame.source, frame.destination), (own, own));
            }
            clone.send(&udp((own, 2), (own, 1), b"y"));
            assert_eq!(template.end.one().source, outer);
        }
    });
}

#[test]
fn a_connection_of_the_template_is_none_of_its_clone() {
    in_namespace(|| {
        let lan = lan();
        let mut world = World::with(vec![lan.clone()]);
        let mut template = world.guest(attachment(&lan, 0, 2));
        let own = (template.v4(), 4000);
        template.send(&syn(own, (SERVER4, 80)));
        let first = world.outside.one();
        world.arrives(&syn_ack((SERVER4, 80), (HOST4, first.source_port)));
        template.end.one();
        let mut clone = clone_of(&mut world, &lan, &template, 3);
        clone.send(&data(own, (SERVER4, 80), b"as if it were mine"));
        let stray = world.outside.one();
        assert_ne!(stray.source_port, first.source_port);
        // What the server sends on that connection goes to the template only.
        world.arrives(&data_back(
            (SERVER4, 80),
            (HOST4, first.source_port),
            b"secret",
        ));
        assert_eq!(clone.end.received(), []);
        assert_eq!(template.end.one().payload, b"secret");
    });
}

#[test]
fn large_segments_of_a_clone_have_right_sums() {
    in_namespace(|| {
        let lan = lan();
        let mut world = World::with(vec![lan.clone()]);
        let template = world.guest(attachment(&lan, 0, 2));
        let mut clone = clone_of(&mut world, &lan, &template, 3);
        let payload: Vec<u8> = (0..20_000_u32).map(|at| (at * 7) as u8).collect();
        large_segments(
            &mut world,
            &mut clone,
            HOST4.into(),
            SERVER4.into(),
            &payload,
        );
        large_segments(
            &mut world,
            &mut clone,
            HOST6.into(),
            SERVER6.into(),
            &payload,
        );
    });
}

#[test]
fn fragments_of_a_clone_are_translated_both_ways() {
    in_namespace(|| {
        let lan = lan();
        let mut world = World::with(vec![lan.clone()]);
        let mut template = world.guest(attachment(&lan, 0, 2));
        let mut clone = clone_of(&mut world, &lan, &template, 3);
        let own = (template.v4(), 4000);
        // Of one packet of each, with one identifier, as a template and its clone may well send.
        let [ours, others] = [1, 2].map(|byte| fragments(&udp(own, (SERVER4, 53), &[byte; 64])));
        for (mine, other) in ours.iter().zip(&others) {
            template.send(mine);
            clone.send(other);
        }
        let out = world.outside.received();
        assert_eq!(out.len(), 4);
        let (first, second) = (whole(&out[..2], HOST4), whole(&out[2..], HOST4));
        assert_eq!(
            (&first.payload[..], &second.payload[..]),
            (&[1; 64][..], &[2; 64][..])
        );
        assert_ne!(first.source_port, second.source_port);
        for part in fragments(&udp((SERVER4, 53), (HOST4, second.source_port), &[3; 64])) {
            world.arrives(&part);
        }
        let back = whole(&clone.end.received(), SERVER4);
        assert_eq!(
            (back.destination, &back.payload[..]),
            (own.0.into(), &[3; 64][..])
        );
        assert_eq!(template.end.received(), []);
    });
}

/// Puts the two fragments of a packet together, and checks its sum.
fn whole(parts: &[Frame], source: Ipv4Addr) -> Frame {
    let payload: Vec<u8> = parts.iter().flat_map(|part| part.payload.clone()).collect();
    let mut packet = parts[0].bytes[14..34].to_vec();
    packet[2..4].copy_from_slice(&(20 + payload.len() as u16).to_be_bytes());
    packet[6..8].fill(0);
    packet.extend(payload);
    fill_sum(&mut packet);
    let frame = Frame::parse(&ethernet([2; 6], [4; 6], &packet));
    assert_eq!(frame.source, IpAddr::V4(source));
    frame
}

#[test]
fn a_clone_comes_goes_and_outlives_the_daemon_as_any_guest() {
    in_namespace(|| {
        let lan = lan();
        let mut world = World::with(vec![lan.clone()]);
        let template = world.guest(attachment(&lan, 0, 2));
        let before = state();
        let mut clone = clone_of(&mut world, &lan, &template, 3);
        let with_clone = state();
        let guests = [&template, &clone]
            .map(|guest| guest.attachment.clone())
            .to_vec();
        world.host =
            HostNetworks::rebuild(Networks::new(vec![lan.clone()]).unwrap(), guests).unwrap();
        assert_eq!(sorted(&state()), sorted(&with_clone));
        clone.send(&udp((clone.v6(), 1), (SERVER6, 1), b"x"));
        let out = world.outside.one();
        world.arrives(&udp((SERVER6, 1), (HOST6, out.source_port), b"y"));
        assert_eq!(clone.end.one().destination, IpAddr::V6(clone.v6()));
        world.host.detach(&[clone.attachment.outer.v4]).unwrap();
        assert_eq!(sorted(&state()), sorted(&before));
    });
}

/// The lines of a listing without their order, by which alone the chains of clones differ.
fn sorted(state: &str) -> Vec<&str> {
    let mut lines: Vec<_> = state.lines().collect();
    lines.sort_unstable();
    lines
}
