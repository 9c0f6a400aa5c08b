//! What a network's guests may reach outside, where that is not everything.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;
use std::str::FromStr;

use ipnet::IpNet;

/// One entry of an allow-list: `10.0.0.0/8`, `192.0.2.1:443`, `[2001:db8::]/32`, `192.0.2.0/24:8000-8999`,
/// `crates.io`, `crates.io:443`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Egress {
    /// Where to.
    pub destination: Destination,
    /// TCP and UDP ports; every port and every protocol where `None`.
    pub ports: Option<RangeInclusive<u16>>,
}

/// Hosts that guests may reach.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Destination {
    /// All addresses of a range.
    Range(IpNet),
    /// The addresses that a name has at present.
    Name(DomainName),
}

/// A name of the Domain Name System, in lower case (RFC 1123, 2.1).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct DomainName(String);

/// Why a text is no entry of an allow-list.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EgressError {
    /// Neither an address, nor a range, nor a domain name.
    #[error("{0:.80?} is neither an address, nor a range like 192.0.2.0/24, nor a domain name")]
    Destination(String),
    /// What stands behind the colon is no port.
    #[error("{0:.80?} is no port or range of ports: 1 to 65535, as 443 or 8000-8999")]
    Ports(String),
    /// The address of a range has bits beyond its prefix.
    #[error("{given} is no range: its first address is {first}")]
    HostBits {
        /// What was given.
        given: IpNet,
        /// The range that it lies in.
        first: IpNet,
    },
}

impl FromStr for Egress {
    type Err = EgressError;

    fn from_str(text: &str) -> Result<Self, EgressError> {
        let (destination, ports) = split(text)?;
        let ports = ports.map(parse_ports).transpose()?;
        Ok(Self { destination, ports })
    }
}

/// Takes a destination apart from its ports. The colons of IPv6 make brackets needed where there are ports.
fn split(text: &str) -> Result<(Destination, Option<&str>), EgressError> {
    if let Some(range) = parse_range(text)? {
        return Ok((Destination::Range(range), None));
    }
    if let Some(bracketed) = text.strip_prefix('[') {
        let wrong = || EgressError::Destination(text.to_owned());
        let (address, rest) = bracketed.split_once(']').ok_or_else(wrong)?;
        let (prefix, ports) = match rest.split_once(':') {
            Some((prefix, ports)) => (prefix, Some(ports)),
            None => (rest, None),
        };
        let range = parse_range(&format!("{address}{prefix}"))?
            .filter(|range| matches!(range, IpNet::V6(_)));
        return Ok((Destination::Range(range.ok_or_else(wrong)?), ports));
    }
    let (host, ports) = match text.split_once(':') {
        Some((host, ports)) => (host, Some(ports)),
        None => (text, None),
    };
    let destination = match parse_range(host)? {
        Some(range) => Destination::Range(range),
        None => Destination::Name(host.parse()?),
    };
    Ok((destination, ports))
}

fn parse_range(text: &str) -> Result<Option<IpNet>, EgressError> {
    if let Ok(address) = text.parse::<IpAddr>() {
        return Ok(Some(address.into()));
    }
    let Ok(range) = text.parse::<IpNet>() else {
        return Ok(None);
    };
    let first = range.trunc();
    if first != range {
        return Err(EgressError::HostBits {
            given: range,
            first,
        });
    }
    Ok(Some(range))
}

fn parse_ports(text: &str) -> Result<RangeInclusive<u16>, EgressError> {
    let wrong = || EgressError::Ports(text.to_owned());
    let port = |digits: &str| -> Result<u16, EgressError> {
        let port = digits
            .bytes()
            .all(|digit| digit.is_ascii_digit())
            .then(|| digits.parse());
        port.and_then(Result::ok)
            .filter(|port| *port != 0)
            .ok_or_else(wrong)
    };
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let ports = port(first)?..=port(last)?;
    if ports.is_empty() {
        Err(wrong())
    } else {
        Ok(ports)
    }
}

impl FromStr for DomainName {
    type Err = EgressError;

    fn from_str(text: &str) -> Result<Self, EgressError> {
        let is_label = |label: &str| {
            (1..=63).contains(&label.len())
                && !label.starts_with('-')
                && !label.ends_with('-')
                && label
                    .bytes()
                    .all(|c| c == b'-' || c == b'_' || c.is_ascii_alphanumeric())
        };
        // A last label of digits would be read as an IPv4 address by some.
        let last = text.rsplit('.').next().unwrap_or_default();
        let is_numeric = last.bytes().all(|c| c.is_ascii_digit());
        if text.len() > 253 || is_numeric || !text.split('.').all(is_label) {
            return Err(EgressError::Destination(text.to_owned()));
        }
        Ok(Self(text.to_ascii_lowercase()))
    }
}

impl DomainName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for DomainName {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Display for Egress {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match (&self.destination, &self.ports) {
            (Destination::Range(IpNet::V6(range)), Some(_)) => {
                write!(f, "[{}]/{}", range.addr(), range.prefix_len())?;
            }
            (Destination::Range(range), _) => write!(f, "{range}")?,
            (Destination::Name(name), _) => write!(f, "{name}")?,
        }
        match &self.ports {
            None => Ok(()),
            Some(ports) if ports.start() == ports.end() => write!(f, ":{}", ports.start()),
            Some(ports) => write!(f, ":{}-{}", ports.start(), ports.end()),
        }
    }
}

/// Only the addresses of a lookup's answer that a name may lead to.
///
/// Who answers for a name must not open what the network closes: the host's own loopback and addresses of the link
/// only, and addresses that stand for no single host.
pub fn public_addresses(answer: impl IntoIterator<Item = SocketAddr>) -> Vec<IpAddr> {
    let is_host = |address: &IpAddr| match address {
        IpAddr::V4(address) => {
            !(address.is_loopback()
                || address.is_link_local()
                || address.is_multicast()
                || address.is_unspecified()
                || address.is_broadcast())
        }
        IpAddr::V6(address) => {
            !(address.is_loopback()
                || address.is_unicast_link_local()
                || address.is_multicast()
                || address.is_unspecified())
        }
    };
    let mut addresses: Vec<_> = answer
        .into_iter()
        .map(|address| address.ip().to_canonical())
        .filter(is_host)
        .collect();
    addresses.sort();
    addresses.dedup();
    addresses
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn an_entry_is_printed_as_it_is_read() {
        for text in [
            "10.0.0.0/8",
            "192.0.2.1/32:443",
            "192.0.2.0/24:8000-8999",
            "2001:db8::/32",
            "[2001:db8::]/32:443",
            "crates.io",
            "static.crates.io:443",
            "localhost:1-65535",
        ] {
            assert_eq!(text.parse::<Egress>().unwrap().to_string(), text);
        }
        assert_eq!(
            "192.0.2.1:443".parse::<Egress>().unwrap().to_string(),
            "192.0.2.1/32:443"
        );
        assert_eq!(
            "[2001:db8::1]:443".parse::<Egress>().unwrap().to_string(),
            "[2001:db8::1]/128:443"
        );
        assert_eq!(
            "Crates.IO".parse::<Egress>().unwrap().to_string(),
            "crates.io"
        );
    }

    #[test]
    fn what_is_no_entry_is_refused() {
        for text in [
            "",
            ":443",
            "a..b",
            "-a.b",
            "a_b-.c",
            "1.2.3",
            "10.0.0.0/33",
            "[10.0.0.1]:4",
            "a b",
            "a;drop",
            "é.fr",
            "[::1",
        ] {
            assert!(
                matches!(text.parse::<Egress>(), Err(EgressError::Destination(_))),
                "{text}"
            );
        }
        for text in [
            "a.b:",
            "a.b:0",
            "a.b:65536",
            "a.b:9-8",
            "a.b:+1",
            "a.b:1-2-3",
            "10.0.0.0/8:x",
        ] {
            assert!(
                matches!(text.parse::<Egress>(), Err(EgressError::Ports(_))),
                "{text}"
            );
        }
        assert!(matches!(
            "10.0.0.1/8".parse::<Egress>(),
            Err(EgressError::HostBits { .. })
        ));
    }

    #[test]
    fn a_name_cannot_lead_to_the_hosts_loopback_or_to_the_link() {
        let answer = [
            "127.0.0.1:0",
            "169.254.169.254:0",
            "[::ffff:127.0.0.1]:0",
            "[fe80::1]:0",
            "[::1]:0",
            "192.0.2.1:0",
            "[2001:db8::1]:0",
            "192.0.2.1:0",
        ];
        let addresses = public_addresses(answer.map(|text| text.parse().unwrap()));
        assert_eq!(
            addresses,
            [
                "192.0.2.1".parse::<IpAddr>().unwrap(),
                "2001:db8::1".parse().unwrap()
            ]
        );
    }

    proptest! {
        /// What is read becomes words of rules.
        #[test]
        fn no_text_that_is_read_holds_what_rules_are_made_of(text in ".{0,40}") {
            if let Ok(entry) = text.parse::<Egress>() {
                let entry = entry.to_string();
                prop_assert!(!entry.contains(|c: char| c.is_whitespace() || "{};\"#\\,@$".contains(c)), "{}", entry);
            }
        }
    }
}
