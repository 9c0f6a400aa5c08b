//! What an operator says of a network, checked.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};

use crate::attachment::Addresses;
use crate::egress::Egress;

/// A network of guests: its addresses, and what its guests may reach.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Network {
    /// Its name, as of a guest ([`config::is_guest_id`]).
    pub name: String,
    /// The IPv4 addresses. The first is the gateway's, the last nobody's.
    pub range: Ipv4Net,
    /// The prefix of the IPv6 addresses: each guest has a /64 of it. The network has no IPv6 where `None`.
    pub prefix: Option<Ipv6Net>,
    /// Whether there is a way out.
    pub outside: Outside,
    /// Whether the guests reach each other.
    pub peers: Access,
    /// Whether the guests reach the services of a cloud that tell of the host: [`METADATA`].
    pub metadata: Access,
    /// Whether the guests reach the addresses of the host.
    pub host: Access,
    /// The only addresses outside that the guests reach; all where empty.
    pub allow: Vec<Egress>,
    /// The DNS servers that the guests are told, and reach at port 53 whatever else is allowed.
    pub dns: Vec<IpAddr>,
    /// The longest packet in bytes.
    pub mtu: u16,
}

/// The way out of a network.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outside {
    /// Guests reach other hosts, under the address of this one. Global IPv6 addresses are left as they are.
    #[default]
    Nat,
    /// No packet leaves the host, but answers by a published port.
    Isolated,
}

/// Whether something can be reached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Access {
    /// It cannot.
    #[default]
    Deny,
    /// It can.
    Allow,
}

/// Addresses at which clouds serve what is the host's: link-local ones, and those that AWS, Azure, Alibaba and Oracle
/// have beside them.
pub const METADATA: [&str; 6] = [
    "169.254.0.0/16",
    "168.63.129.16/32",
    "100.100.100.200/32",
    "192.0.0.192/32",
    "fe80::/10",
    "fd00:ec2::/32",
];

/// The MTU where none is given.
pub const DEFAULT_MTU: u16 = 1500;

/// The gateway of every network in IPv6: an address of the link, as router advertisements need.
pub const GATEWAY6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);

/// Why a network cannot be as it was described.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SpecError {
    /// The name.
    #[error("{0:.80?} is no name of a network: 1 to 63 lower case letters, digits and dashes")]
    Name(String),
    /// Two have one name.
    #[error("two networks are called {0}")]
    DuplicateName(String),
    /// The range is no range of addresses that hosts have.
    #[error("network {name}: {range} cannot be the range of guests: {reason}")]
    Range {
        /// The network.
        name: String,
        /// The range.
        range: IpNet,
        /// Why not.
        reason: &'static str,
    },
    /// Ranges of two networks have addresses in common.
    #[error("networks {first} and {second}: the ranges {first_range} and {second_range} overlap")]
    Overlap {
        /// A network.
        first: String,
        /// Its range.
        first_range: IpNet,
        /// The other one.
        second: String,
        /// Its range.
        second_range: IpNet,
    },
    /// The MTU is too small, or larger than that of a tap.
    #[error("network {name}: mtu={mtu} is none of {min} to 65535{reason}", reason = if *min == MIN_MTU6 { ", as IPv6 needs" } else { "" })]
    Mtu {
        /// The network.
        name: String,
        /// The MTU.
        mtu: u16,
        /// The least one.
        min: u16,
    },
    /// An address of a DNS server that no guest could reach.
    #[error("network {name}: dns={address} cannot be reached by guests")]
    Dns {
        /// The network.
        name: String,
        /// The address.
        address: IpAddr,
    },
    /// An isolated network has an allow-list.
    #[error("network {name}: an isolated network has no way out that allow= could narrow")]
    AllowOfIsolated {
        /// The network.
        name: String,
    },
    /// More networks than the limit.
    #[error("{0} networks are more than {MAX_NETWORKS}")]
    TooMany(usize),
    /// An allow-list is longer than the limit.
    #[error("network {name}: allow= is given {entries} times, more than {MAX_ALLOW}")]
    LongAllowList {
        /// The network.
        name: String,
        /// How many entries it has.
        entries: usize,
    },
}

/// The most networks of a daemon.
pub const MAX_NETWORKS: usize = 256;
/// The most entries of an allow-list: each is a rule that a new connection may have to pass.
pub const MAX_ALLOW: usize = 256;
/// RFC 791: every host can take 576 bytes.
const MIN_MTU4: u16 = 576;
/// RFC 8200, section 5.
const MIN_MTU6: u16 = 1280;

impl Network {
    /// A network with a name and a range; the rest is as it is where nothing is said.
    pub fn new(name: impl Into<String>, range: Ipv4Net) -> Self {
        Self {
            name: name.into(),
            range,
            prefix: None,
            outside: Outside::default(),
            peers: Access::default(),
            metadata: Access::default(),
            host: Access::default(),
            allow: Vec::new(),
            dns: Vec::new(),
            mtu: DEFAULT_MTU,
        }
    }

    /// The address of the gateway: the first of the range.
    pub fn gateway(&self) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.range.network().to_bits() | 1)
    }

    /// The address of the host in the network's prefix, which is the first behind that of the network too.
    pub fn gateway6(&self) -> Option<Ipv6Addr> {
        let prefix = self.prefix?.network();
        Some(Ipv6Addr::from_bits(prefix.to_bits() | 1))
    }

    /// The addresses of the guest that has this IPv4 address.
    pub fn addresses_of(&self, v4: Ipv4Addr) -> Addresses {
        let number = v4.to_bits() ^ self.range.network().to_bits();
        let v6 = self.prefix.and_then(|prefix| {
            let network = prefix.network().to_bits() | u128::from(number) << 64;
            Ipv6Net::new(Ipv6Addr::from_bits(network), 64).ok()
        });
        Addresses { v4, v6 }
    }

    /// Checks each field by itself.
    ///
    /// # Errors
    /// [`SpecError`].
    pub fn validate(&self) -> Result<(), SpecError> {
        let name = || self.name.clone();
        if !config::is_guest_id(&self.name) {
            return Err(SpecError::Name(name()));
        }
        let wrong = |range, reason| SpecError::Range {
            name: name(),
            range,
            reason,
        };
        if let Some(reason) = wrong_range(self.range) {
            return Err(wrong(self.range.into(), reason));
        }
        if let Some((prefix, reason)) = self
            .prefix
            .and_then(|prefix| Some((prefix, wrong_prefix(prefix, self.range)?)))
        {
            return Err(wrong(prefix.into(), reason));
        }
        let min = if self.prefix.is_some() {
            MIN_MTU6
        } else {
            MIN_MTU4
        };
        if self.mtu < min {
            return Err(SpecError::Mtu {
                name: name(),
                mtu: self.mtu,
                min,
            });
        }
        let is_reachable = |address: &&IpAddr| {
            address.is_loopback() || address.is_unspecified() || address.is_multicast()
        };
        if let Some(address) = self.dns.iter().find(is_reachable) {
            return Err(SpecError::Dns {
                name: name(),
                address: *address,
            });
        }
        if self.outside == Outside::Isolated && !self.allow.is_empty() {
            return Err(SpecError::AllowOfIsolated { name: name() });
        }
        if self.allow.len() > MAX_ALLOW {
            return Err(SpecError::LongAllowList {
                name: name(),
                entries: self.allow.len(),
            });
        }
        Ok(())
    }
}

/// The ranges of a network: one, or one of each family.
pub(crate) fn ranges(network: &Network) -> impl Iterator<Item = IpNet> + use<> {
    let prefix = network.prefix.map(IpNet::V6);
    std::iter::once(IpNet::V4(network.range)).chain(prefix)
}

fn wrong_range(range: Ipv4Net) -> Option<&'static str> {
    let in_range = |text: &str| {
        text.parse()
            .is_ok_and(|other: Ipv4Net| other.contains(&range) || range.contains(&other))
    };
    if range != range.trunc() {
        Some("its address has bits beyond the prefix")
    } else if range.prefix_len() > 30 {
        Some("it is too small: network, gateway, a guest and the last address make a /30")
    } else if range.prefix_len() < 8 {
        Some("it is too large: a /8 is the largest")
    } else if in_range("0.0.0.0/8")
        || in_range("127.0.0.0/8")
        || in_range("169.254.0.0/16")
        || in_range("224.0.0.0/3")
    {
        Some("hosts have no such addresses")
    } else {
        None
    }
}

fn wrong_prefix(prefix: Ipv6Net, range: Ipv4Net) -> Option<&'static str> {
    let address = prefix.network();
    // Unique local (RFC 4193) and global unicast (RFC 4291, 2.4).
    let is_of_hosts = address.is_unique_local() || address.segments()[0] & 0xe000 == 0x2000;
    if prefix != prefix.trunc() {
        Some("its address has bits beyond the prefix")
    } else if prefix.prefix_len() > 32 + range.prefix_len() {
        Some("it is too small: each guest takes a /64, so that the range a.b.c.d/16 needs a /48")
    } else if !is_of_hosts {
        Some("it is neither unique local (fd00::/8) nor global (2000::/3)")
    } else {
        None
    }
}

/// All networks of a daemon. None has a name or an address of another one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Networks(Vec<Network>);

impl Networks {
    /// Checks each by itself, and all together.
    ///
    /// # Errors
    /// [`SpecError`].
    pub fn new(networks: Vec<Network>) -> Result<Self, SpecError> {
        if networks.len() > MAX_NETWORKS {
            return Err(SpecError::TooMany(networks.len()));
        }
        for (at, second) in networks.iter().enumerate() {
            second.validate()?;
            for first in &networks[..at] {
                if first.name == second.name {
                    return Err(SpecError::DuplicateName(first.name.clone()));
                }
                let pairs = ranges(first).flat_map(|a| ranges(second).map(move |b| (a, b)));
                if let Some((first_range, second_range)) = { pairs }.find(|(a, b)| overlap(a, b)) {
                    let (first, second) = (first.name.clone(), second.name.clone());
                    return Err(SpecError::Overlap {
                        first,
                        first_range,
                        second,
                        second_range,
                    });
                }
            }
        }
        Ok(Self(networks))
    }

    /// The network of a name.
    pub fn get(&self, name: &str) -> Option<&Network> {
        self.0.iter().find(|network| network.name == name)
    }

    /// All, in the order in which they were given.
    pub fn iter(&self) -> impl Iterator<Item = &Network> {
        self.0.iter()
    }
}

/// Whether two ranges have an address in common: then one holds the other.
fn overlap(a: &IpNet, b: &IpNet) -> bool {
    a.contains(b) || b.contains(a)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn network(name: &str, range: &str) -> Network {
        Network::new(name, range.parse().unwrap())
    }

    #[test]
    fn the_gateway_is_the_first_address() {
        let mut lan = network("lan", "10.1.0.0/16");
        lan.prefix = Some("fd00:1::/48".parse().unwrap());
        assert_eq!(lan.gateway().to_string(), "10.1.0.1");
        assert_eq!(lan.gateway6().unwrap().to_string(), "fd00:1::1");
        assert_eq!(lan.validate(), Ok(()));
        let of_guest = lan.addresses_of("10.1.3.2".parse().unwrap());
        assert_eq!(of_guest.v6.unwrap().to_string(), "fd00:1:0:302::/64");
    }

    #[test]
    fn a_range_that_hosts_cannot_have_is_refused() {
        for range in [
            "10.1.0.1/16",
            "10.0.0.0/31",
            "10.0.0.0/32",
            "0.0.0.0/0",
            "0.0.0.0/8",
            "127.0.0.0/8",
            "127.1.0.0/16",
            "169.254.0.0/16",
            "169.254.169.0/24",
            "224.0.0.0/8",
            "240.0.0.0/8",
            "255.255.255.0/24",
            "10.0.0.0/7",
        ] {
            let refused = network("lan", range).validate();
            assert!(
                matches!(refused, Err(SpecError::Range { .. })),
                "{range}: {refused:?}"
            );
        }
        for prefix in [
            "fd00:1::/49",
            "fd00:1::/64",
            "fd00::1/48",
            "fe80::/48",
            "ff02::/48",
            "::/48",
        ] {
            let mut lan = network("lan", "10.1.0.0/16");
            lan.prefix = Some(prefix.parse().unwrap());
            let refused = lan.validate();
            assert!(
                matches!(refused, Err(SpecError::Range { .. })),
                "{prefix}: {refused:?}"
            );
        }
    }

    #[test]
    fn ranges_that_overlap_are_refused_with_both_names() {
        let refused = Networks::new(vec![
            network("a", "10.0.0.0/8"),
            network("b", "10.1.0.0/16"),
        ])
        .unwrap_err();
        assert_eq!(
            refused.to_string(),
            "networks a and b: the ranges 10.0.0.0/8 and 10.1.0.0/16 overlap"
        );
        let mut v6 = [network("a", "10.0.0.0/16"), network("b", "10.1.0.0/16")];
        for network in &mut v6 {
            network.prefix = Some("fd00:1::/48".parse().unwrap());
        }
        assert!(matches!(
            Networks::new(v6.to_vec()),
            Err(SpecError::Overlap { .. })
        ));
        let same = Networks::new(vec![
            network("a", "10.0.0.0/16"),
            network("a", "10.1.0.0/16"),
        ]);
        assert_eq!(same, Err(SpecError::DuplicateName("a".to_owned())));
    }

    #[test]
    fn fields_of_no_sense_are_refused() {
        let refused = |change: fn(&mut Network)| {
            let mut lan = network("lan", "10.1.0.0/16");
            change(&mut lan);
            lan.validate().unwrap_err()
        };
        assert!(matches!(
            refused(|lan| lan.name = "a;b".to_owned()),
            SpecError::Name(_)
        ));
        assert!(matches!(
            refused(|lan| lan.name = String::new()),
            SpecError::Name(_)
        ));
        assert!(matches!(
            refused(|lan| lan.mtu = 575),
            SpecError::Mtu { min: 576, .. }
        ));
        let small = refused(|lan| (lan.mtu, lan.prefix) = (1279, "fd00::/48".parse().ok()));
        assert_eq!(
            small.to_string(),
            "network lan: mtu=1279 is none of 1280 to 65535, as IPv6 needs"
        );
        assert!(matches!(
            refused(|lan| lan.dns = vec![IpAddr::from([127, 0, 0, 53])]),
            SpecError::Dns { .. }
        ));
        let isolated = refused(|lan| {
            (lan.outside, lan.allow) = (Outside::Isolated, vec!["a.b".parse().unwrap()]);
        });
        assert!(matches!(isolated, SpecError::AllowOfIsolated { .. }));
        assert!(matches!(
            refused(|lan| lan.allow = vec!["a.b".parse().unwrap(); 257]),
            SpecError::LongAllowList { .. }
        ));
    }
}
