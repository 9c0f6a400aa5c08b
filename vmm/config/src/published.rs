//! Ports of the host that lead to guests.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A port of the host that leads to one of a guest: `8080:80`, `192.0.2.1:53:53/udp`, `[2001:db8::1]:443:443/tcp`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Published {
    /// The address of the host; all of them where `None`.
    pub address: Option<IpAddr>,
    /// The port of the host.
    pub host_port: u16,
    /// The port of the guest.
    pub guest_port: u16,
    /// Of which protocol both are.
    pub protocol: Protocol,
}

/// A protocol that has ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// A text that describes no published port.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{text:.80?} is no published port: [ADDRESS:]PORT:GUEST-PORT[/tcp|/udp], ports from 1 to 65535"
)]
pub struct PublishedError {
    text: String,
}

impl FromStr for Published {
    type Err = PublishedError;

    fn from_str(text: &str) -> Result<Self, PublishedError> {
        parse(text).ok_or_else(|| PublishedError {
            text: text.to_owned(),
        })
    }
}

fn parse(text: &str) -> Option<Published> {
    let (ports, protocol) = match text.split_once('/') {
        None => (text, Protocol::Tcp),
        Some((ports, "tcp")) => (ports, Protocol::Tcp),
        Some((ports, "udp")) => (ports, Protocol::Udp),
        Some(_) => return None,
    };
    let port = |digits: &str| {
        let port = digits
            .bytes()
            .all(|digit| digit.is_ascii_digit())
            .then(|| digits.parse::<u16>());
        port?.ok().filter(|port| *port != 0)
    };
    let (rest, guest_port) = ports.rsplit_once(':')?;
    let (address, host_port) = match rest.rsplit_once(':') {
        None => (None, rest),
        Some((address, host_port)) => {
            let address = match address.strip_prefix('[') {
                Some(bracketed) => IpAddr::V6(bracketed.strip_suffix(']')?.parse().ok()?),
                None => IpAddr::V4(address.parse().ok()?),
            };
            (
                Some(address).filter(|address| !address.is_unspecified()),
                host_port,
            )
        }
    };
    Some(Published {
        address,
        host_port: port(host_port)?,
        guest_port: port(guest_port)?,
        protocol,
    })
}

impl fmt::Display for Published {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self.address {
            Some(IpAddr::V4(address)) => write!(f, "{address}:")?,
            Some(IpAddr::V6(address)) => write!(f, "[{address}]:")?,
            None => {}
        }
        write!(
            f,
            "{}:{}/{}",
            self.host_port, self.guest_port, self.protocol
        )
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        })
    }
}

impl TryFrom<String> for Published {
    type Error = PublishedError;

    fn try_from(text: String) -> Result<Self, PublishedError> {
        text.parse()
    }
}

impl From<Published> for String {
    fn from(published: Published) -> Self {
        published.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_published_port_is_printed_as_it_is_read() {
        for text in [
            "8080:80/tcp",
            "192.0.2.1:53:53/udp",
            "[2001:db8::1]:443:8443/tcp",
        ] {
            assert_eq!(text.parse::<Published>().unwrap().to_string(), text);
        }
        assert_eq!(
            "8080:80".parse::<Published>().unwrap().to_string(),
            "8080:80/tcp"
        );
        assert_eq!(
            "0.0.0.0:8080:80".parse::<Published>().unwrap().to_string(),
            "8080:80/tcp"
        );
    }

    #[test]
    fn what_is_no_published_port_is_refused() {
        for text in [
            "",
            "80",
            "0:80",
            "80:0",
            "80:65536",
            "a:80:80",
            "::1:80:80",
            "[::1:80:80",
            "80:80/sctp",
            "+8:80",
            "[10.0.0.1]:80:80",
        ] {
            assert!(text.parse::<Published>().is_err(), "{text}");
        }
    }
}
