//! The nftables table `inet coppice`, as text for nft(8).
//!
//! What is the same for all stands in `table.nft`; a network adds two chains, a guest elements of maps. Every word that
//! is put into the text is the `Display` of a checked type, none is outside text.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::net::IpAddr;

use config::Published;
use ipnet::{IpNet, Ipv6Net};

use crate::attachment::Attachment;
use crate::egress::{Destination, DomainName, Egress};
use crate::mac::address_in;
use crate::spec::{Access, METADATA, Network, Networks, Outside, ranges};

/// The addresses of the names in allow-lists, by name.
pub(crate) type Names = BTreeMap<DomainName, Vec<IpAddr>>;

const TABLE: &str = include_str!("table.nft");

/// Takes the whole table away, whether it is there or not.
pub(crate) const REMOVE: &str = "add table inet coppice\ndelete table inet coppice\n";

/// The whole table, which takes the place of one that is there in one step.
pub(crate) fn table<'a>(
    networks: &Networks,
    names: &Names,
    attachments: impl Iterator<Item = &'a Attachment> + Clone,
) -> String {
    // nft 1.0 makes the chains of a block before the elements behind it only where the block is the first.
    let fixed = TABLE.trim_end().strip_suffix('}').unwrap_or(TABLE);
    let mut text = format!("{REMOVE}{fixed}");
    for number in 0..names.len() {
        for (family, kind) in [(4, "ipv4_addr"), (6, "ipv6_addr")] {
            line(
                &mut text,
                format_args!("    set name_{number}_{family} {{ type {kind}; }}"),
            );
        }
    }
    for (number, network) in networks.iter().enumerate() {
        network_chains(&mut text, number, network, names);
    }
    text.extend(attachments.clone().filter_map(clone_chains));
    line(&mut text, format_args!("}}"));
    for range in METADATA {
        let family = if range.contains(':') { 6 } else { 4 };
        add_element(&mut text, &format!("metadata{family}"), range);
    }
    for (number, addresses) in names.values().enumerate() {
        add_addresses(&mut text, number, addresses);
    }
    for (number, network) in networks.iter().enumerate() {
        network_elements(&mut text, number, network);
    }
    text.push_str(&elements("add", attachments));
    text
}

fn line(text: &mut String, line: std::fmt::Arguments) {
    // Writing to a String cannot fail.
    let _ = writeln!(text, "{line}");
}

fn add_element(text: &mut String, set: &str, element: &str) {
    line(
        text,
        format_args!("add element inet coppice {set} {{ {element} }}"),
    );
}

fn network_chains(text: &mut String, number: usize, network: &Network, names: &Names) {
    let (mut outward, mut to_host) = (Vec::new(), Vec::new());
    for server in &network.dns {
        let (ip, server) = matched(&IpNet::from(*server));
        let rule = format!("{ip} daddr {server} meta l4proto {{ tcp, udp }} th dport 53 accept");
        outward.push(rule.clone());
        to_host.push(rule);
    }
    if network.peers == Access::Allow {
        for (ip, range) in ranges(network).map(|range| matched(&range)) {
            outward.push(format!("oifname \"cop-*\" {ip} daddr {range} accept"));
        }
    }
    for (ip, family) in [("ip", 4), ("ip6", 6)] {
        outward.push(format!("{ip} daddr @networks{family} goto refuse"));
        if network.metadata == Access::Deny {
            let rule = format!("{ip} daddr @metadata{family} goto refuse");
            outward.push(rule.clone());
            to_host.push(rule);
        }
    }
    if network.outside == Outside::Nat {
        let allowed = network.allow.iter().flat_map(|entry| egress(entry, names));
        outward.extend(allowed.map(|matches| format!("{matches} accept")));
    }
    let end = |is_open: bool| if is_open { "accept" } else { "goto refuse" }.to_owned();
    let is_open = network.outside == Outside::Nat && network.allow.is_empty();
    outward.push(end(is_open));
    to_host.push(end(network.host == Access::Allow));
    line(text, format_args!("    # {}", network.name));
    for (chain, rules) in [("network", outward), ("host", to_host)] {
        let rules = rules.join("\n        ");
        line(
            text,
            format_args!("    chain {chain}_{number} {{\n        {rules}\n    }}"),
        );
    }
}

fn network_elements(text: &mut String, number: usize, network: &Network) {
    for range in ranges(network) {
        let (family, (_, range)) = (version(&range), matched(&range));
        add_element(text, &format!("networks{family}"), &range);
        add_element(
            text,
            &format!("outward{family}"),
            &format!("{range} : goto network_{number}"),
        );
        add_element(
            text,
            &format!("to_host{family}"),
            &format!("{range} : goto host_{number}"),
        );
        if network.outside == Outside::Nat && is_private(network, family) {
            add_element(text, &format!("masqueraded{family}"), &range);
        }
    }
}

/// Whether the addresses of a family mean nothing outside. A global IPv6 prefix is the operator's to route.
fn is_private(network: &Network, family: u8) -> bool {
    family == 4
        || network
            .prefix
            .is_some_and(|prefix| prefix.network().is_unique_local())
}

/// What a packet for an entry of an allow-list looks like: once for each family that the entry has.
fn egress(entry: &Egress, names: &Names) -> Vec<String> {
    let ports = match &entry.ports {
        None => String::new(),
        Some(ports) => format!(
            " meta l4proto {{ tcp, udp }} th dport {}-{}",
            ports.start(),
            ports.end()
        ),
    };
    match &entry.destination {
        Destination::Range(range) => {
            let (ip, range) = matched(range);
            vec![format!("{ip} daddr {range}{ports}")]
        }
        Destination::Name(name) => match number(names, name) {
            None => Vec::new(),
            Some(number) => {
                let of = |(ip, family)| format!("{ip} daddr @name_{number}_{family}{ports}");
                [("ip", "4"), ("ip6", "6")].map(of).to_vec()
            }
        },
    }
}

fn number(names: &Names, name: &DomainName) -> Option<usize> {
    names.keys().position(|known| known == name)
}

/// The words for a range: `ip` or `ip6`, and the range; nft knows no range of all addresses.
fn matched(range: &IpNet) -> (&'static str, String) {
    match range {
        IpNet::V4(range) if range.prefix_len() == 0 => ("ip", "0.0.0.0-255.255.255.255".to_owned()),
        IpNet::V6(range) if range.prefix_len() == 0 => (
            "ip6",
            "::-ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff".to_owned(),
        ),
        IpNet::V4(range) => ("ip", range.to_string()),
        IpNet::V6(range) => ("ip6", range.to_string()),
    }
}

fn version(range: &IpNet) -> u8 {
    match range {
        IpNet::V4(_) => 4,
        IpNet::V6(_) => 6,
    }
}

fn add_addresses(text: &mut String, number: usize, addresses: &[IpAddr]) {
    for (family, is_of) in [
        (4, IpAddr::is_ipv4 as fn(&IpAddr) -> bool),
        (6, IpAddr::is_ipv6),
    ] {
        let list: Vec<_> = addresses
            .iter()
            .filter(|address| is_of(address))
            .map(IpAddr::to_string)
            .collect();
        if !list.is_empty() {
            let list = list.join(", ");
            line(
                text,
                format_args!("add element inet coppice name_{number}_{family} {{ {list} }}"),
            );
        }
    }
}

/// Gives a name other addresses, in one step.
pub(crate) fn set_name(names: &Names, name: &DomainName, addresses: &[IpAddr]) -> Option<String> {
    let number = number(names, name)?;
    let mut text =
        format!("flush set inet coppice name_{number}_4\nflush set inet coppice name_{number}_6\n");
    add_addresses(&mut text, number, addresses);
    Some(text)
}

/// Lets guests send and receive.
pub(crate) fn add<'a>(attachments: impl Iterator<Item = &'a Attachment> + Clone) -> String {
    let mut text = String::new();
    let mut chains = attachments.clone().filter_map(clone_chains).peekable();
    if chains.peek().is_some() {
        line(&mut text, format_args!("table inet coppice {{"));
        text.extend(chains);
        line(&mut text, format_args!("}}"));
    }
    text + &elements("add", attachments)
}

/// Takes away what [`add`] gave.
pub(crate) fn delete<'a>(attachments: impl Iterator<Item = &'a Attachment> + Clone) -> String {
    let mut text = elements("delete", attachments.clone());
    for tap in attachments
        .filter(|guest| is_clone6(guest))
        .map(Attachment::tap)
    {
        line(
            &mut text,
            format_args!("delete chain inet coppice from_{tap}"),
        );
        line(
            &mut text,
            format_args!("delete chain inet coppice to_{tap}"),
        );
    }
    text
}

/// Whether a guest's IPv6 network is another one for itself.
fn is_clone6(guest: &Attachment) -> bool {
    guest.outer.v6 != guest.inner.v6
}

/// The chains that translate the IPv6 network of a clone: no map can hold a part of an address.
fn clone_chains(guest: &Attachment) -> Option<String> {
    let (outer, inner) = (guest.outer.v6?, guest.inner.v6?);
    let (tap, interface) = (guest.tap(), "::ffff:ffff:ffff:ffff");
    let chain = |name: &str, field: &str, prefix: Ipv6Net| {
        let prefix = prefix.network();
        format!(
            "    chain {name}_{tap} {{\n        ip6 {field} set ip6 {field} & {interface} | {prefix} accept\n    }}\n"
        )
    };
    is_clone6(guest).then(|| chain("from", "saddr", outer) + &chain("to", "daddr", inner))
}

/// One line for each map, with the elements of all guests.
fn elements<'a>(verb: &str, attachments: impl Iterator<Item = &'a Attachment>) -> String {
    let mut maps: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    for guest in attachments {
        let mut element = |map, element: String| maps.entry(map).or_default().push(element);
        let Attachment {
            outer, inner, mac, ..
        } = guest;
        let tap = guest.tap();
        element(
            "source4",
            format!("\"{tap}\" . {mac} . {} : {}", inner.v4, outer.v4),
        );
        element("inner4", format!("\"{tap}\" . {} : {}", outer.v4, inner.v4));
        if let (Some(outer), Some(inner)) = (outer.v6, inner.v6) {
            element(
                "source6",
                format!("\"{tap}\" . {mac} . {}", inner.network()),
            );
            element("destination6", format!("\"{tap}\" . {}", outer.network()));
        }
        if is_clone6(guest) {
            element("from_clone6", format!("\"{tap}\" : goto from_{tap}"));
            element("to_clone6", format!("\"{tap}\" : goto to_{tap}"));
        }
        for port in &guest.published {
            for (map, published) in published(guest, port) {
                element(map, published);
            }
        }
    }
    let mut text = String::new();
    for (map, elements) in maps {
        let elements = elements.join(", ");
        line(
            &mut text,
            format_args!("{verb} element inet coppice {map} {{ {elements} }}"),
        );
    }
    text
}

/// The elements for a port, by their maps. In IPv6, the port is of the address that the guest has by its interface.
fn published(guest: &Attachment, port: &Published) -> Vec<(&'static str, String)> {
    let key = format!("{} . {}", port.protocol, port.host_port);
    let to4 = format!("{} . {}", guest.outer.v4, port.guest_port);
    let address6 = guest.outer.v6.map(|outer| address_in(outer, guest.mac));
    let to6 = address6.map(|address| format!("{address} . {}", port.guest_port));
    match (port.address, to6) {
        (None, None) => vec![("published_anywhere4", format!("{key} : {to4}"))],
        (None, Some(to6)) => vec![
            ("published_anywhere4", format!("{key} : {to4}")),
            ("published_anywhere6", format!("{key} : {to6}")),
        ],
        (Some(IpAddr::V4(address)), _) => {
            vec![("published4", format!("{address} . {key} : {to4}"))]
        }
        (Some(IpAddr::V6(address)), Some(to6)) => {
            vec![("published6", format!("{address} . {key} : {to6}"))]
        }
        // No such guest is reached by IPv6.
        (Some(IpAddr::V6(_)), None) => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;
    use crate::attachment::Addresses;
    use crate::mac::mac_of;

    fn guest(address: [u8; 4]) -> Attachment {
        let address = Ipv4Addr::from(address);
        let addresses = Addresses {
            v4: address,
            v6: None,
        };
        Attachment {
            network: "lan".to_owned(),
            outer: addresses,
            inner: addresses,
            mac: mac_of(address),
            published: vec!["8080:80".parse().unwrap()],
        }
    }

    #[test]
    fn guests_are_elements_of_one_line_for_each_map() {
        let guests = [guest([10, 1, 0, 2]), guest([10, 1, 0, 3])];
        let text = add(guests.iter());
        assert_eq!(text.lines().count(), 3);
        assert!(text.contains(
            "\"cop-0a010002\" . 02:00:0a:01:00:02 . 10.1.0.2 : 10.1.0.2, \"cop-0a010003\""
        ));
        assert!(text.contains("published_anywhere4 { tcp . 8080 : 10.1.0.2 . 80, "));
        assert_eq!(
            delete(guests.iter()),
            text.replace("add element", "delete element")
        );
    }

    #[test]
    fn an_isolated_network_is_neither_masqueraded_nor_let_out() {
        let mut lan = Network::new("lan", "10.1.0.0/16".parse().unwrap());
        lan.outside = Outside::Isolated;
        let networks = Networks::new(vec![lan]).unwrap();
        let text = table(&networks, &Names::new(), std::iter::empty());
        assert!(!text.contains("add element inet coppice masqueraded"));
        let chain = text.split("chain network_0 {").nth(1).unwrap();
        let chain = chain.split('}').next().unwrap();
        assert!(
            chain.trim_end().ends_with("goto refuse") && !chain.contains("accept"),
            "{chain}"
        );
    }
}
