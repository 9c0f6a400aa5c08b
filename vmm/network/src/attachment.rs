//! A guest's interface in a network: what the host needs to know of it, in memory and in the daemon's records.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr};

use config::{MacAddress, Published};
use ipnet::{IpNet, Ipv6Net};
use serde::{Deserialize, Serialize};

/// An interface of a guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Attachment {
    /// The name of the network.
    pub network: String,
    /// The addresses under which everybody else knows the guest. No two guests have one of them in common.
    pub outer: Addresses,
    /// The addresses that the guest has of itself: the same, but for a clone, which has those of its template.
    pub inner: Addresses,
    /// The Ethernet address that the guest has of itself.
    pub mac: MacAddress,
    /// Ports of the host that lead to the guest.
    #[serde(default)]
    pub published: Vec<Published>,
}

/// The addresses of an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Addresses {
    /// IPv4.
    pub v4: Ipv4Addr,
    /// The IPv6 network of 64 bits that the guest alone takes its addresses of (RFC 8273), where its network has IPv6.
    #[serde(default)]
    pub v6: Option<Ipv6Net>,
}

/// The name of a tap: `cop-` and the guest's outer IPv4 address in hexadecimal, so that no two guests have one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct TapName(Ipv4Addr);

impl TapName {
    /// The tap of the guest that others know by `address`.
    pub fn of(address: Ipv4Addr) -> Self {
        Self(address)
    }

    /// The name of a tap of ours, `None` for any other name.
    pub fn parse(name: &str) -> Option<Self> {
        let digits = name
            .strip_prefix("cop-")
            .filter(|digits| digits.len() == 8)?;
        let is_lower = |c: u8| c.is_ascii_digit() || (b'a'..=b'f').contains(&c);
        let bits = digits
            .bytes()
            .all(is_lower)
            .then(|| u32::from_str_radix(digits, 16));
        Some(Self(Ipv4Addr::from_bits(bits?.ok()?)))
    }

    /// The guest's outer address.
    pub fn address(self) -> Ipv4Addr {
        self.0
    }
}

impl fmt::Display for TapName {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "cop-{:08x}", self.0.to_bits())
    }
}

impl Attachment {
    /// The name of its tap.
    pub fn tap(&self) -> TapName {
        TapName::of(self.outer.v4)
    }

    /// What others know it by.
    pub(crate) fn outer(&self) -> impl Iterator<Item = IpNet> + use<> {
        std::iter::once(IpNet::from(IpAddr::V4(self.outer.v4))).chain(self.outer.v6.map(IpNet::V6))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tap_is_found_again_by_its_name() {
        let name = TapName::of(Ipv4Addr::new(255, 1, 0, 2));
        assert_eq!(name.to_string(), "cop-ff010002");
        assert!(name.to_string().len() < libc::IFNAMSIZ);
        assert_eq!(TapName::parse("cop-ff010002"), Some(name));
        for other in [
            "cop-",
            "cop-ff01000",
            "cop-FF010002",
            "cop-+f010002",
            "eth0",
            "xcop-ff010002",
        ] {
            assert_eq!(TapName::parse(other), None, "{other}");
        }
    }
}
