//! Names of guests, of templates, and of devices.

use std::borrow::Borrow;
use std::fmt;
use std::ops::Deref;

use serde::{Deserialize, Serialize};

/// Whether `text` can be the name of a guest or of a template: 1 to 63 lower case letters, digits and dashes, because
/// it is used as the name of a folder and in URLs.
pub fn is_guest_id(text: &str) -> bool {
    let word = |c: u8| c == b'-' || c.is_ascii_digit() || c.is_ascii_lowercase();
    (1..=63).contains(&text.len()) && text.bytes().all(word)
}

/// Longest name of a device, in bytes.
pub(crate) const DEVICE_ID_MAX: usize = 64;

/// The name of a drive or pmem device: 1 to 64 letters, digits and underscores. It becomes a part of paths on the host
/// and of URLs, so a text of another origin than a checked configuration is made one before it is used there.
#[derive(
    Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, utoipa::ToSchema,
)]
#[serde(try_from = "String", into = "String")]
#[schema(value_type = String, pattern = "^[A-Za-z0-9_]{1,64}$")]
pub struct DeviceId(String);

/// A text that is no name of a device.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:.80?} is no name of a device: 1 to {DEVICE_ID_MAX} letters, digits and underscores")]
pub struct DeviceIdError {
    text: String,
}

impl DeviceId {
    /// Checks a name.
    ///
    /// # Errors
    /// [`DeviceIdError`].
    pub fn new(text: impl Into<String>) -> Result<Self, DeviceIdError> {
        let text = text.into();
        let is_word = |c: u8| c == b'_' || c.is_ascii_alphanumeric();
        if (1..=DEVICE_ID_MAX).contains(&text.len()) && text.bytes().all(is_word) {
            Ok(Self(text))
        } else {
            Err(DeviceIdError { text })
        }
    }
}

impl TryFrom<String> for DeviceId {
    type Error = DeviceIdError;

    fn try_from(text: String) -> Result<Self, DeviceIdError> {
        Self::new(text)
    }
}

impl From<DeviceId> for String {
    fn from(id: DeviceId) -> Self {
        id.0
    }
}

impl Deref for DeviceId {
    type Target = str;

    fn deref(&self) -> &str {
        &self.0
    }
}

impl Borrow<str> for DeviceId {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for DeviceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_of_a_device_leads_nowhere_in_paths_and_urls() {
        let longest = "a".repeat(DEVICE_ID_MAX);
        for name in ["a", "_", "Root_1", &longest] {
            let id = DeviceId::new(name).unwrap();
            assert_eq!(&*id, name);
            let json = serde_json::to_string(&id).unwrap();
            assert_eq!(serde_json::from_str::<DeviceId>(&json).unwrap(), id);
        }
        let longer = "a".repeat(DEVICE_ID_MAX + 1);
        for name in [
            "",
            ".",
            "..",
            "a/b",
            "x/../../root",
            "a-b",
            "a\0",
            "\u{e4}",
            "a b",
            &longer,
        ] {
            assert!(DeviceId::new(name).is_err(), "{name:?}");
            let json = serde_json::to_string(name).unwrap();
            assert!(serde_json::from_str::<DeviceId>(&json).is_err(), "{name:?}");
        }
    }
}
