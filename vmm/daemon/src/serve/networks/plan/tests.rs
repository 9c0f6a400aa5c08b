//! What guests are given, over many makings, deletions and starts of the daemon.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use network::{Networks, PoolError};
use parking_lot::Mutex;
use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

/// As a daemon has them when it begins, without a host to change.
fn networks(ranges: &[(&str, &str)]) -> GuestNetworks {
    let network = |(name, range): &(&str, &str)| Network::new(*name, range.parse().unwrap());
    GuestNetworks {
        networks: Networks::new(ranges.iter().map(network).collect()).unwrap(),
        pools: Mutex::default(),
        host: None,
        unresolved: Mutex::default(),
        repairs: 0.into(),
        mark: PathBuf::new(),
        lock: None,
    }
}

#[allow(
    clippy::needless_pass_by_value,
    reason = "it is written where it is passed"
)]
fn config(interfaces: Value) -> VmConfig {
    let config = json!({"machine-config": {"vcpu_count": 1, "mem_size_mib": 16}, "network-interfaces": interfaces});
    serde_json::from_value(config).unwrap()
}

#[allow(
    clippy::needless_pass_by_value,
    reason = "it is written where it is passed"
)]
fn in_lan(fields: Value) -> VmConfig {
    let mut interface = json!({"iface_id": "eth0", "network": "lan"});
    let all = interface.as_object_mut().unwrap();
    all.extend(fields.as_object().unwrap().clone());
    config(json!([interface]))
}

fn none() -> Interfaces {
    Interfaces::new()
}

/// The guests of a daemon, by name.
type Guests = BTreeMap<String, Interfaces>;

fn others(guests: &Guests, id: &str) -> Others {
    let others = guests.iter().filter(|(other, _)| *other != id);
    others
        .map(|(other, interfaces)| (other.clone(), interfaces.clone()))
        .collect()
}

fn make(
    networks: &GuestNetworks,
    guests: &mut Guests,
    id: &str,
    config: &VmConfig,
) -> Result<Interfaces, NetworkFault> {
    let planned = networks.plan(id, config, (&none(), &none()), &others(guests, id))?;
    guests.insert(id.to_owned(), planned.clone());
    Ok(planned)
}

#[test]
fn a_guest_gets_what_it_is_told() {
    let (networks, mut guests) = (networks(&[("lan", "10.1.0.0/16")]), Guests::new());
    let mut config = in_lan(json!({"publish": ["8080:80"], "mtu": 1400}));
    let given = make(&networks, &mut guests, "web", &config).unwrap();
    let attachment = &given["eth0"].attachment;
    assert_eq!(attachment.outer, attachment.inner);
    assert_eq!(attachment.tap().to_string(), "cop-0a010002");
    networks.complete("web", &mut config, &given).unwrap();
    let interface = &config.network_interfaces[0];
    assert_eq!(interface.guest_mac, Some(mac_of(attachment.outer.v4)));
    assert_eq!(interface.mtu, Some(1400));
    let lease = interface.lease.as_ref().unwrap();
    assert_eq!(lease.ipv4.unwrap().to_string(), "10.1.0.2/16");
    assert_eq!(lease.gateway.unwrap().to_string(), "10.1.0.1");
    assert_eq!(lease.host_name.as_deref(), Some("web"));
    assert_eq!(lease.gateway_mac, Some(gateway_mac()));
    config.validate().unwrap();
}

#[test]
fn what_cannot_be_is_refused_and_takes_no_address() {
    let (networks, mut guests) = (networks(&[("lan", "10.1.0.0/29")]), Guests::new());
    let first = in_lan(json!({"guest_mac": "06:00:00:00:00:01", "publish": ["8080:80"]}));
    make(&networks, &mut guests, "a", &first).unwrap();
    let two = |second: Value| config(json!([{"iface_id": "eth0", "network": "lan"}, second]));
    for (wrong, named) in [
        (in_lan(json!({"network": "other"})), "no network \"other\""),
        (
            in_lan(json!({"guest_mac": "06:00:00:00:00:01"})),
            "guest a has 06:00",
        ),
        (
            in_lan(json!({"publish": ["192.0.2.1:8080:81"]})),
            "to guest a already",
        ),
        (
            in_lan(json!({"publish": ["81:81", "81:82"]})),
            "to guest b already",
        ),
        (
            in_lan(json!({"publish": ["[2001:db8::1]:81:81"]})),
            "is of IPv6",
        ),
        (in_lan(json!({"mtu": 1501})), "1500 bytes"),
        (
            in_lan(json!({"lease": {"ipv4": "10.1.0.3/29"}})),
            "leave it out",
        ),
        (
            two(json!({"iface_id": "eth1", "network": "other"})),
            "no network",
        ),
        (
            two(json!({"iface_id": "eth1", "network": "lan", "publish": ["8080:1"]})),
            "to guest a",
        ),
    ] {
        let fault = make(&networks, &mut guests, "b", &wrong)
            .unwrap_err()
            .to_string();
        assert!(fault.contains(named), "{fault}");
    }
    make(
        &networks,
        &mut guests,
        "b",
        &in_lan(json!({"publish": ["8080:80/udp"]})),
    )
    .unwrap();
    for id in ["c", "d", "e"] {
        make(&networks, &mut guests, id, &in_lan(json!({}))).unwrap();
    }
    let full = make(&networks, &mut guests, "f", &in_lan(json!({}))).unwrap_err();
    assert!(
        matches!(
            full,
            NetworkFault::Full {
                source: PoolError::Full { .. },
                ..
            }
        ),
        "{full}"
    );
}

#[test]
fn an_interface_that_is_configured_again_keeps_its_addresses_and_one_of_another_network_has_others()
{
    let ranges = [("lan", "10.1.0.0/16"), ("b", "10.2.0.0/16")];
    let (networks, mut guests) = (networks(&ranges), Guests::new());
    let first = make(&networks, &mut guests, "a", &in_lan(json!({}))).unwrap();
    let later = in_lan(json!({"publish": ["80:80"], "guest_mac": "06:00:00:00:00:01"}));
    let again = networks
        .plan("a", &later, (&first, &none()), &Others::new())
        .unwrap();
    let (was, is) = (&first["eth0"].attachment, &again["eth0"].attachment);
    assert_eq!((was.outer, is.published.len()), (is.outer, 1));
    assert_eq!(is.mac.to_string(), "06:00:00:00:00:01");
    let moved = networks
        .plan(
            "a",
            &in_lan(json!({"network": "b"})),
            (&first, &none()),
            &Others::new(),
        )
        .unwrap();
    assert_eq!(moved["eth0"].attachment.outer.v4.to_string(), "10.2.0.2");
}

#[test]
fn a_clone_has_its_templates_addresses_for_itself_and_none_of_its_ports() {
    let (networks, mut guests) = (networks(&[("lan", "10.1.0.0/16")]), Guests::new());
    let template = make(
        &networks,
        &mut guests,
        "a",
        &in_lan(json!({"publish": ["80:80"]})),
    )
    .unwrap();
    let mut config = in_lan(json!({}));
    let clone = networks
        .plan("b", &config, (&none(), &template), &Others::new())
        .unwrap();
    let (was, is) = (&template["eth0"].attachment, &clone["eth0"].attachment);
    assert_eq!((was.inner, was.mac), (is.inner, is.mac));
    assert_ne!((was.outer, was.tap()), (is.outer, is.tap()));
    assert!(is.published.is_empty());
    // Also when it boots anew, but under its own name.
    networks.complete("b", &mut config, &clone).unwrap();
    let lease = config.network_interfaces[0].lease.clone().unwrap();
    assert_eq!(lease.ipv4.unwrap().addr(), was.inner.v4);
    assert_eq!(lease.host_name.as_deref(), Some("b"));
}

#[test]
fn a_guest_of_a_network_that_is_another_one_now_is_refused() {
    let (before, mut guests) = (networks(&[("lan", "10.1.0.0/16")]), Guests::new());
    let given = make(&before, &mut guests, "a", &in_lan(json!({}))).unwrap();
    for now in [
        networks(&[]),
        networks(&[("lan", "10.7.0.0/16")]),
        networks(&[("b", "10.1.0.0/16")]),
    ] {
        assert!(now.take_again(&given).is_empty());
        let refused = now
            .complete("a", &mut in_lan(json!({})), &given)
            .unwrap_err();
        assert!(
            matches!(refused, NetworkFault::Elsewhere { .. }),
            "{refused}"
        );
    }
    let same = networks(&[("lan", "10.1.0.0/16")]);
    assert_eq!(same.take_again(&given).len(), 1);
    assert_eq!(
        same.take_again(&given).len(),
        0,
        "no two guests have an address"
    );
}

proptest! {
    /// Against the records: no two guests have an address, none is lost, whenever the daemon is started anew.
    #[test]
    fn no_address_is_given_twice_and_none_is_lost_over_starts_of_the_daemon(
        steps in prop::collection::vec((0_u8..4, 0_u8..20), 1..120)
    ) {
        let ranges = [("lan", "10.1.0.0/28"), ("b", "10.2.0.0/28")];
        let (mut networks, mut guests) = (networks(&ranges), Guests::new());
        for (step, number) in steps {
            let id = format!("g{number}");
            let config = in_lan(json!({"network": if number % 2 == 0 { "lan" } else { "b" }}));
            match step {
                0 | 1 if !guests.contains_key(&id) => {
                    let used = guests.keys().filter(|id| id[1..].parse::<u8>().unwrap() % 2 == number % 2).count();
                    let made = make(&networks, &mut guests, &id, &config);
                    prop_assert_eq!(made.is_ok(), used < 13);
                }
                2 => if let Some(interfaces) = guests.remove(&id) {
                    networks.give_back(&interfaces, &none());
                }
                3 => {
                    networks = self::networks(&ranges);
                    for interfaces in guests.values() {
                        let taken = networks.take_again(interfaces).len();
                        prop_assert_eq!(taken, 1);
                    }
                }
                _ => {}
            }
            let addresses = guests.values().map(|interfaces| interfaces["eth0"].attachment.outer.v4);
            prop_assert_eq!(addresses.collect::<BTreeSet<_>>().len(), guests.len());
        }
    }
}
