//! The identifiers that a VHDX has, and that a refusal can name.

use std::fmt;

use uuid::Uuid;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// A GUID in its on-disk byte order (mixed-endian).
#[derive(
    Clone, Copy, PartialEq, Eq, Hash, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned,
)]
#[repr(transparent)]
pub struct Guid([u8; 16]);

impl Guid {
    /// No GUID.
    pub const ZERO: Self = Self([0; 16]);

    /// The GUID that is written as the digits of `value`.
    pub(crate) const fn new(value: u128) -> Self {
        Self(Uuid::from_u128(value).to_bytes_le())
    }

    /// The GUID of a text, with or without braces.
    pub fn parse(text: &str) -> Option<Self> {
        Some(Self(Uuid::parse_str(text).ok()?.to_bytes_le()))
    }

    /// The GUID with these bytes.
    #[cfg(feature = "fuzzing")]
    pub(crate) fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }

    /// A new one.
    pub fn random() -> Self {
        Self(Uuid::new_v4().to_bytes_le())
    }
}

impl fmt::Display for Guid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&Uuid::from_bytes_le(self.0), f)
    }
}

impl fmt::Debug for Guid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
