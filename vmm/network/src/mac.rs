//! Ethernet addresses of guests, of which each belongs to an IP address.

use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use ipnet::Ipv6Net;

/// An Ethernet address that a guest's interface can have: unicast, and not zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MacAddress([u8; 6]);

/// A text that is no Ethernet address of an interface.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MacError {
    /// Not six pairs of hexadecimal digits with colons between them.
    #[error("{0:.80?} is no MAC address: six pairs of hexadecimal digits with colons between them")]
    Syntax(String),
    /// An address of a group, which no interface can have as its own.
    #[error("the MAC address {0} is a group's (multicast): the first byte has to be even")]
    Multicast(String),
    /// All bytes are zero.
    #[error("the MAC address 00:00:00:00:00:00 is no interface's")]
    Zero,
}

/// The host's end of every tap has this address, so that a clone finds the gateway where its template had it.
pub const GATEWAY_MAC: MacAddress = MacAddress([0x06, 0, 0, 0, 0, 1]);

impl MacAddress {
    /// The address of the guest that has `address`: locally administered, and another one for each IP address.
    ///
    /// It is `06:00` and the four bytes of the IP address, as in Firecracker's guides, so that a guest can find its
    /// IP address with no help.
    pub fn of(address: Ipv4Addr) -> Self {
        let [a, b, c, d] = address.octets();
        Self([0x06, 0, a, b, c, d])
    }

    /// Checks six bytes.
    ///
    /// # Errors
    /// `Multicast` and `Zero`.
    pub fn new(bytes: [u8; 6]) -> Result<Self, MacError> {
        let mac = Self(bytes);
        if bytes[0] & 1 != 0 {
            return Err(MacError::Multicast(mac.to_string()));
        }
        if bytes == [0; 6] {
            return Err(MacError::Zero);
        }
        Ok(mac)
    }

    /// The bytes, in the order in which they are sent.
    pub fn bytes(self) -> [u8; 6] {
        self.0
    }

    /// The address that a guest with this interface gives itself in a prefix of 64 bits (RFC 4291, appendix A).
    pub fn address_in(self, prefix: Ipv6Net) -> Ipv6Addr {
        let [first, second, third, fourth, fifth, sixth] = self.0;
        let interface = [first ^ 2, second, third, 0xff, 0xfe, fourth, fifth, sixth];
        let interface = u64::from_be_bytes(interface);
        Ipv6Addr::from_bits(prefix.network().to_bits() | u128::from(interface))
    }
}

impl FromStr for MacAddress {
    type Err = MacError;

    fn from_str(text: &str) -> Result<Self, MacError> {
        let syntax = || MacError::Syntax(text.to_owned());
        let mut bytes = [0; 6];
        let mut pairs = text.split(':');
        for byte in &mut bytes {
            let pair = pairs.next().ok_or_else(syntax)?;
            if pair.len() != 2 || !pair.bytes().all(|digit| digit.is_ascii_hexdigit()) {
                return Err(syntax());
            }
            *byte = u8::from_str_radix(pair, 16).map_err(|_| syntax())?;
        }
        if pairs.next().is_some() {
            return Err(syntax());
        }
        Self::new(bytes)
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let pairs = self.0.map(|byte| format!("{byte:02x}"));
        f.write_str(&pairs.join(":"))
    }
}

impl TryFrom<String> for MacAddress {
    type Error = MacError;

    fn try_from(text: String) -> Result<Self, MacError> {
        text.parse()
    }
}

impl From<MacAddress> for String {
    fn from(mac: MacAddress) -> Self {
        mac.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_address_of_a_guest_is_unicast_and_locally_administered() {
        let mac = MacAddress::of(Ipv4Addr::new(172, 16, 0, 2));
        assert_eq!(mac.to_string(), "06:00:ac:10:00:02");
        assert_eq!(mac.bytes()[0] & 3, 2);
    }

    #[test]
    fn the_interface_identifier_is_that_of_rfc_4291() {
        let mac: MacAddress = "34:56:78:9a:bc:de".parse().unwrap();
        let address = mac.address_in("fd00:1::/64".parse().unwrap());
        assert_eq!(address.to_string(), "fd00:1::3656:78ff:fe9a:bcde");
    }

    #[test]
    fn what_is_no_address_of_an_interface_is_refused() {
        for text in [
            "",
            "06:00",
            "06:00:00:00:00:0",
            "06:00:00:00:00:01:02",
            "+6:00:00:00:00:01",
            "0600:00:00:00:01",
        ] {
            assert_eq!(
                text.parse::<MacAddress>(),
                Err(MacError::Syntax(text.to_owned()))
            );
        }
        assert!(matches!(
            "01:00:5e:00:00:01".parse::<MacAddress>(),
            Err(MacError::Multicast(_))
        ));
        assert_eq!(
            "00:00:00:00:00:00".parse::<MacAddress>(),
            Err(MacError::Zero)
        );
    }
}
