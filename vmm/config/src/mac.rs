//! Addresses of network interfaces.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The address of an interface of one guest: 48 bits (IEEE 802), not a group's, and not zero. Written as six bytes in
/// hexadecimal digits with colons between.
#[derive(
    Clone,
    Copy,
    Debug,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    Serialize,
    Deserialize,
    utoipa::ToSchema,
)]
#[serde(try_from = "String", into = "String")]
#[schema(value_type = String, pattern = "^([0-9A-Fa-f]{2}:){5}[0-9A-Fa-f]{2}$")]
pub struct MacAddress([u8; 6]);

/// A text that is no address of an interface.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MacAddressError {
    /// It has another form.
    #[error("{0:.40?} is no MAC address: six bytes as 06:00:ac:10:00:02")]
    Form(String),
    /// It is a group's, or zero.
    #[error(
        "{0} is the address of no single interface: the first byte has to be even, and one byte not zero"
    )]
    Group(String),
}

impl MacAddress {
    /// The address of these bytes; `None` where it is a group's, or zero.
    pub fn new(bytes: [u8; 6]) -> Option<Self> {
        let [first, ..] = bytes;
        (first & 1 == 0 && bytes != [0; 6]).then_some(Self(bytes))
    }

    /// The address of one interface that ends in these bytes, of those that anybody may give (IEEE 802, 8.4).
    pub fn local(last: [u8; 5]) -> Self {
        let mut bytes = [2; 6];
        for (to, from) in bytes.iter_mut().skip(1).zip(last) {
            *to = from;
        }
        Self(bytes)
    }

    /// Its bytes, in the order of the wire.
    pub fn bytes(self) -> [u8; 6] {
        self.0
    }
}

impl FromStr for MacAddress {
    type Err = MacAddressError;

    fn from_str(text: &str) -> Result<Self, MacAddressError> {
        let form = || MacAddressError::Form(text.to_owned());
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts
                .next()
                .filter(|part| part.len() == 2)
                .ok_or_else(form)?;
            // `from_str_radix` takes a sign.
            if !part.bytes().all(|digit| digit.is_ascii_hexdigit()) {
                return Err(form());
            }
            *byte = u8::from_str_radix(part, 16).map_err(|_| form())?;
        }
        if parts.next().is_some() {
            return Err(form());
        }
        Self::new(bytes).ok_or_else(|| MacAddressError::Group(text.to_owned()))
    }
}

impl TryFrom<String> for MacAddress {
    type Error = MacAddressError;

    fn try_from(text: String) -> Result<Self, MacAddressError> {
        text.parse()
    }
}

impl From<MacAddress> for String {
    fn from(mac: MacAddress) -> Self {
        mac.to_string()
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, byte) in self.0.iter().enumerate() {
            let colon = if index > 0 { ":" } else { "" };
            write!(f, "{colon}{byte:02x}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_six_bytes_of_one_interface() {
        let mac: MacAddress = "06:00:AC:10:00:02".parse().unwrap();
        assert_eq!(mac.bytes(), [6, 0, 0xac, 16, 0, 2]);
        assert_eq!(mac.to_string(), "06:00:ac:10:00:02");
        let json = serde_json::to_string(&mac).unwrap();
        assert_eq!(serde_json::from_str::<MacAddress>(&json).unwrap(), mac);
        for text in [
            "",
            "06:00:ac:10:00",
            "06:00:ac:10:00:02:03",
            "06:00:ac:10:00:2",
            "06:00:ac:10:00:+2",
            "06-00-ac-10-00-02",
        ] {
            assert!(
                matches!(text.parse::<MacAddress>(), Err(MacAddressError::Form(_))),
                "{text}"
            );
        }
        for text in [
            "01:00:5e:00:00:01",
            "ff:ff:ff:ff:ff:ff",
            "00:00:00:00:00:00",
        ] {
            assert!(
                matches!(text.parse::<MacAddress>(), Err(MacAddressError::Group(_))),
                "{text}"
            );
        }
    }
}
