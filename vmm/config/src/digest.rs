//! The digest by which a file is known again.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Bytes of a digest.
const LEN: usize = 32;

/// What is no digest.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:.80?} is not a SHA-256: it has 64 hexadecimal digits")]
pub struct DigestError(String);

/// The SHA-256 (FIPS 180-4) of a file. It is written as 64 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Sha256Digest([u8; LEN]);

impl Sha256Digest {
    /// Its bytes.
    pub fn bytes(&self) -> &[u8; LEN] {
        &self.0
    }
}

impl From<[u8; LEN]> for Sha256Digest {
    fn from(bytes: [u8; LEN]) -> Self {
        Self(bytes)
    }
}

impl TryFrom<String> for Sha256Digest {
    type Error = DigestError;

    fn try_from(text: String) -> Result<Self, DigestError> {
        let digit = |byte: &u8| char::from(*byte).to_digit(16);
        let digits: Option<Vec<u32>> = text.as_bytes().iter().map(digit).collect();
        let mut bytes = [0; LEN];
        match digits {
            Some(digits) if digits.len() == 2 * LEN => {
                for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
                    *byte = pair.iter().fold(0, |byte, digit| byte << 4 | *digit as u8);
                }
                Ok(Self(bytes))
            }
            _ => Err(DigestError(text)),
        }
    }
}

impl From<Sha256Digest> for String {
    fn from(digest: Sha256Digest) -> Self {
        digest.to_string()
    }
}

impl fmt::Display for Sha256Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Sha256Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_digest_is_read_as_it_was_written_and_nothing_else_is_one() {
        let mut bytes = [0; LEN];
        (bytes[0], bytes[31]) = (0xa5, 0x0f);
        let digest = Sha256Digest::from(bytes);
        let text = digest.to_string();
        assert!(text.starts_with("a5") && text.ends_with("0f") && text.len() == 64);
        assert_eq!(Sha256Digest::try_from(text.to_uppercase()), Ok(digest));
        for wrong in [
            "",
            "a5",
            &text[1..],
            &format!("{text}00"),
            &text.replace('a', "g"),
        ] {
            let error = Sha256Digest::try_from(wrong.to_owned()).unwrap_err();
            assert!(error.to_string().contains("64 hexadecimal"), "{wrong}");
        }
    }
}
