//! Starts, ends and crashes of the daemon.

use std::net::{IpAddr, Ipv4Addr};

use rustix::thread::{CapabilitySet, CapabilitySets, capabilities, set_capabilities};

use super::frames::udp;
use super::world::{End, HOST4, SERVER4, World, attachment, in_namespace, ip, lan, state};
use crate::host::{HostError, HostNetworks, remove_all};
use crate::spec::{Access, Network, Networks, Outside};
use crate::tap::{self, TapError};

fn networks() -> Networks {
    Networks::new(vec![
        lan(),
        Network::new("b", "10.2.0.0/16".parse().unwrap()),
    ])
    .unwrap()
}

#[test]
fn a_guest_that_runs_goes_on_when_the_daemon_starts_anew() {
    in_namespace(|| {
        let lan = lan();
        let mut world = World::with(vec![lan.clone()]);
        let mut guest = world.guest(attachment(&lan, 0, 2));
        let before = state();
        let World { host, mut outside } = world;
        drop(host);
        let packet = udp((guest.v4(), 1), (SERVER4, 1), b"x");
        guest.send(&packet);
        assert_eq!(outside.one().source, IpAddr::V4(HOST4));
        let networks = Networks::new(vec![lan]).unwrap();
        let host = HostNetworks::rebuild(networks, vec![guest.attachment.clone()]).unwrap();
        guest.send(&packet);
        assert_eq!(outside.one().source, IpAddr::V4(HOST4));
        let without_counters = |text: &str| -> Vec<String> {
            let lines = text.lines().filter(|line| !line.contains("packets"));
            lines.map(str::to_owned).collect()
        };
        assert_eq!(without_counters(&state()), without_counters(&before));
        assert_eq!(host.attachments().count(), 1);
    });
}

#[test]
fn what_no_record_tells_of_is_gone_after_the_next_start() {
    in_namespace(|| {
        let lan = lan();
        let mut world = World::with(vec![
            lan.clone(),
            Network::new("old", "10.9.0.0/16".parse().unwrap()),
        ]);
        let mut guest = world.guest(attachment(&lan, 0, 2));
        let clean = {
            let host = HostNetworks::rebuild(networks(), Vec::new()).unwrap();
            drop(host);
            state()
        };
        assert!(
            !clean.contains("10.9.0.0") && !clean.contains("cop-0a"),
            "{clean}"
        );
        // The process of the guest has a descriptor of a tap that is no more.
        guest.send(&udp((guest.v4(), 1), (SERVER4, 1), b"x"));
        assert_eq!(world.outside.received(), []);
        remove_all().unwrap();
        let _ = HostNetworks::rebuild(networks(), Vec::new()).unwrap();
        assert_eq!(state(), clean);
    });
}

/// Each way in which a daemon that is killed can leave the host: the next start makes it as if it had never run.
#[test]
fn a_daemon_that_is_killed_at_any_step_leaves_nothing_behind() {
    in_namespace(|| {
        let lan = lan();
        let _world = World::with(vec![lan.clone()]);
        let _ = HostNetworks::rebuild(networks(), Vec::new()).unwrap();
        let clean = state();
        let guest = attachment(&lan, 0, 2);
        let tap = || tap::create(guest.tap()).unwrap();
        let rules = || crate::nft::run(&crate::rules::add(std::iter::once(&guest))).unwrap();
        let steps: [(&str, &dyn Fn()); 7] = [
            ("a tap that its process ended with", &|| drop(tap())),
            ("a tap that a process has", &|| std::mem::forget(tap())),
            ("rules without a tap", &|| drop(rules())),
            ("a tap that is up, with a route and no rules", &|| {
                std::mem::forget(tap());
                ip("link set cop-0a010002 up");
                ip("route add 10.1.0.2 dev cop-0a010002 proto 142");
            }),
            ("all of a guest", &|| {
                let mut host = HostNetworks::rebuild(networks(), Vec::new()).unwrap();
                std::mem::forget(host.attach(std::slice::from_ref(&guest)).unwrap());
            }),
            ("no rules, but all the rest", &|| {
                drop(crate::nft::run(crate::rules::REMOVE).unwrap());
            }),
            ("nothing at all", &|| remove_all().unwrap()),
        ];
        for (what, step) in steps {
            step();
            let _ = HostNetworks::rebuild(networks(), Vec::new()).unwrap();
            assert_eq!(state(), clean, "{what}");
        }
    });
}

#[test]
fn nothing_is_left_of_networks_that_are_removed() {
    in_namespace(|| {
        let world = World::with(Vec::new());
        remove_all().unwrap();
        let before = state();
        let mut host = HostNetworks::rebuild(networks(), Vec::new()).unwrap();
        let _tap = host.attach(&[attachment(&lan(), 0, 2)]).unwrap();
        assert_ne!(state(), before);
        remove_all().unwrap();
        assert_eq!(state(), before);
        remove_all().unwrap();
        drop(world);
    });
}

#[test]
fn a_guest_that_cannot_be_attached_leaves_nothing() {
    in_namespace(|| {
        let lan = lan();
        let mut world = World::with(vec![lan.clone()]);
        let [mut first, second, third] = [2, 3, 4].map(|number| attachment(&lan, 0, number));
        first.published = vec!["8080:80".parse().unwrap()];
        let _guest = world.guest(first.clone());
        let before = state();
        let mut refused = |guests: &[crate::Attachment]| world.host.attach(guests).unwrap_err();
        assert!(matches!(
            refused(&[second.clone(), first.clone()]),
            HostError::AddressInUse(_)
        ));
        let mut port = second.clone();
        port.published = vec!["192.0.2.1:8080:81".parse().unwrap()];
        assert!(matches!(
            refused(&[third.clone(), port]),
            HostError::PortInUse { .. }
        ));
        let mut elsewhere = second.clone();
        elsewhere.outer.v4 = Ipv4Addr::new(10, 7, 0, 1);
        assert!(matches!(
            refused(&[elsewhere]),
            HostError::OtherRange { .. }
        ));
        let mut nowhere = second.clone();
        nowhere.network = "none".to_owned();
        assert!(matches!(refused(&[nowhere]), HostError::NoNetwork(_)));
        let taken = tap::create(third.tap()).unwrap();
        assert!(matches!(
            refused(&[second, third.clone()]),
            HostError::Tap(TapError::InUse(_))
        ));
        drop(taken);
        assert_eq!(state(), before);
        let mut third = world.guest(third);
        third.send(&udp((third.v4(), 1), (SERVER4, 1), b"x"));
        world.outside.one();
    });
}

#[test]
fn rules_that_somebody_else_removed_are_set_with_the_next_change() {
    in_namespace(|| {
        let lan = lan();
        let mut world = World::with(vec![lan.clone()]);
        let mut guest = world.guest(attachment(&lan, 0, 2));
        assert!(world.host.has_rules().unwrap());
        crate::nft::run("flush ruleset\n").unwrap();
        assert!(!world.host.has_rules().unwrap());
        let _other = world.guest(attachment(&lan, 0, 3));
        assert!(world.host.has_rules().unwrap());
        guest.send(&udp((guest.v4(), 1), (SERVER4, 1), b"x"));
        assert_eq!(world.outside.one().source, IpAddr::V4(HOST4));
    });
}

#[test]
fn a_range_that_holds_an_address_of_the_host_is_refused() {
    in_namespace(|| {
        let _world = World::with(Vec::new());
        let networks =
            Networks::new(vec![Network::new("lan", "192.0.2.0/24".parse().unwrap())]).unwrap();
        let refused = HostNetworks::rebuild(networks, Vec::new()).unwrap_err();
        assert_eq!(
            refused.to_string(),
            "network lan: 192.0.2.0/24 holds 192.0.2.1, which is an address of this host"
        );
    });
}

#[test]
fn a_tap_is_of_one_queue_with_a_header_and_goes_with_its_descriptor() {
    in_namespace(|| {
        let lan = lan();
        let mut world = World::with(vec![lan.clone()]);
        let guest = world.guest(attachment(&lan, 0, 2));
        let shown = ip("-d link show cop-0a010002");
        for word in [
            "pi off",
            "vnet_hdr on",
            "persist off",
            "NOARP",
            "qlen 32",
            "02:00:00:00:00:01",
            "mtu 1500",
        ] {
            assert!(shown.contains(word), "{word}: {shown}");
        }
        assert!(!shown.contains("multi_queue"), "{shown}");
        let counters = world.host.counters().unwrap();
        assert_eq!(counters.keys().copied().collect::<Vec<_>>(), [guest.v4()]);
        drop(guest);
        assert!(world.host.counters().unwrap().is_empty());
        assert!(!ip("route").contains("10.1.0.2"));
    });
}

#[test]
fn a_thousand_guests_come_and_go_in_one_step_each() {
    in_namespace(|| {
        let lan = lan();
        let mut world = World::with(vec![lan.clone()]);
        let guests: Vec<_> = (0..1000_u32)
            .map(|n| attachment(&lan, (n / 250) as u8, (n % 250 + 2) as u8))
            .collect();
        let taps = world.host.attach(&guests).unwrap();
        assert_eq!(world.host.counters().unwrap().len(), 1000);
        let mut taps: Vec<_> = taps.into_iter().map(End::new).collect();
        let last = taps.last_mut().unwrap();
        let frame = udp((guests[999].inner.v4, 1), (SERVER4, 1), b"x");
        last.send(&super::frames::ethernet(
            guests[999].mac.bytes(),
            crate::gateway_mac().bytes(),
            &frame,
        ));
        assert_eq!(world.outside.one().source, IpAddr::V4(HOST4));
        let addresses: Vec<_> = guests.iter().map(|guest| guest.outer.v4).collect();
        world.host.detach(&addresses).unwrap();
        assert!(world.host.counters().unwrap().is_empty());
    });
}

#[test]
fn every_network_that_passes_the_checks_is_one_that_the_kernel_takes() {
    in_namespace(|| {
        let allow = [
            "0.0.0.0/0:443",
            "::/0",
            "[::/0]:1",
            "10.0.0.0/8",
            "10.1.2.3:1-65535",
            "[2001:db8::1]:53",
        ];
        let allow: Vec<_> = allow
            .iter()
            .filter_map(|entry| entry.parse().ok())
            .collect();
        let dns =
            ["9.9.9.9", "169.254.169.253", "2620:fe::fe"].map(|address| address.parse().unwrap());
        let access = |is_open| if is_open { Access::Allow } else { Access::Deny };
        let network = |number: u8| {
            let is = |bit: u8| number >> bit & 1 == 1;
            let mut network = Network::new(
                format!("n-{number}"),
                format!("10.{number}.0.0/16").parse().unwrap(),
            );
            network.prefix = is(0).then(|| format!("fd00:{number}::/48").parse().unwrap());
            (network.peers, network.host, network.metadata) =
                (access(is(1)), access(is(2)), access(is(3)));
            network.outside = if is(4) {
                Outside::Isolated
            } else {
                Outside::Nat
            };
            network.dns = if is(5) { dns.to_vec() } else { Vec::new() };
            network.allow = if is(6) && !is(4) {
                allow.clone()
            } else {
                Vec::new()
            };
            network
        };
        let _world = World::with((0..128).map(network).collect());
    });
}

#[test]
fn who_may_not_change_the_hosts_network_is_told_so() {
    in_namespace(|| {
        let without = |mut sets: CapabilitySets| {
            sets.effective.remove(CapabilitySet::NET_ADMIN);
            sets
        };
        let all = capabilities(None).unwrap();
        set_capabilities(None, without(all)).unwrap();
        let refused = HostNetworks::rebuild(networks(), Vec::new());
        let removed = remove_all();
        set_capabilities(None, all).unwrap();
        assert!(matches!(refused, Err(HostError::Privilege)));
        assert!(matches!(removed, Err(HostError::Privilege)));
    });
}

#[test]
fn the_host_becomes_a_router_of_guests_and_of_nobody_else() {
    in_namespace(|| {
        let setting = |name: &str| {
            let text = std::fs::read_to_string(format!("/proc/sys/net/{name}")).unwrap();
            text.trim().to_owned()
        };
        let mut v4 = Network::new("v4", "10.3.0.0/16".parse().unwrap());
        v4.mtu = 1400;
        let mut world = World::with(vec![v4.clone()]);
        ip("tuntap add other0 mode tap");
        let _guest = world.guest(attachment(&v4, 0, 2));
        assert_eq!(setting("ipv4/ip_forward"), "0");
        assert_eq!(setting("ipv4/conf/out0/forwarding"), "1");
        assert_eq!(setting("ipv4/conf/cop-0a030002/forwarding"), "1");
        assert_eq!(setting("ipv4/conf/other0/forwarding"), "0");
        // Another way out, which came later.
        ip("link set other0 up");
        ip("route add default dev other0 metric 7");
        world.host.follow_default_routes().unwrap();
        assert_eq!(setting("ipv4/conf/other0/forwarding"), "1");
        // IPv6 can be forwarded by all or none; router advertisements go on to be taken.
        assert_eq!(setting("ipv6/conf/all/forwarding"), "0");
        assert_eq!(setting("ipv6/conf/cop-0a030002/disable_ipv6"), "1");
        assert!(ip("link show cop-0a030002").contains("mtu 1400"));
        let _ = HostNetworks::rebuild(networks(), Vec::new()).unwrap();
        assert_eq!(setting("ipv6/conf/all/forwarding"), "1");
        assert_eq!(setting("ipv6/conf/out0/accept_ra"), "2");
    });
}
