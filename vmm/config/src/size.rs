//! Sizes on the command line.

use std::str::FromStr;

/// A size of guest RAM in MiB. On the command line a number with a binary suffix: `M` (MiB), `G` (GiB) or `T` (TiB), in any case, and
/// with or without `iB` behind it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mebibytes(pub u32);

/// A size in bytes. On the command line a number, with or without one of the binary suffixes `K`, `M`, `G` and `T`, in any case, and with or
/// without `iB` behind it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bytes(pub u64);

/// Not a size.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum SizeError {
    /// No number before the suffix.
    #[error("{0:?} is not a whole number with a binary suffix, such as 128M")]
    Number(String),
    /// No suffix, or an unknown one.
    #[error("{0:?} needs the suffix M (MiB), G (GiB) or T (TiB), such as 128M")]
    Suffix(String),
    /// More than can be counted.
    #[error("{0:?} is more than any host has")]
    TooLarge(String),
}

/// The number of a size, and the power of two that its suffix stands for, if it has one.
fn split(text: &str) -> Result<(&str, Option<u32>), SizeError> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, suffix) = text.split_at(digits);
    if number.is_empty() {
        return Err(SizeError::Number(text.to_owned()));
    }
    let shift = match suffix.to_ascii_lowercase().as_str() {
        "" => None,
        "k" | "kib" => Some(10),
        "m" | "mib" => Some(20),
        "g" | "gib" => Some(30),
        "t" | "tib" => Some(40),
        _ => return Err(SizeError::Suffix(text.to_owned())),
    };
    Ok((number, shift))
}

fn scaled(text: &str, number: &str, shift: u32) -> Result<u64, SizeError> {
    number
        .parse::<u64>()
        .ok()
        .and_then(|number| number.checked_mul(1 << shift))
        .ok_or_else(|| SizeError::TooLarge(text.to_owned()))
}

impl FromStr for Mebibytes {
    type Err = SizeError;

    fn from_str(text: &str) -> Result<Self, SizeError> {
        let (number, shift) = split(text)?;
        let shift = shift
            .and_then(|shift| shift.checked_sub(20))
            .ok_or_else(|| SizeError::Suffix(text.to_owned()))?;
        u32::try_from(scaled(text, number, shift)?)
            .map(Self)
            .map_err(|_| SizeError::TooLarge(text.to_owned()))
    }
}

impl FromStr for Bytes {
    type Err = SizeError;

    fn from_str(text: &str) -> Result<Self, SizeError> {
        let (number, shift) = split(text)?;
        scaled(text, number, shift.unwrap_or(0)).map(Self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn suffixes_are_binary() {
        let sizes = [
            ("128M", 128),
            ("1G", 1024),
            ("2gib", 2048),
            ("1T", 1 << 20),
            ("0m", 0),
            ("3MiB", 3),
        ];
        for (text, mebibytes) in sizes {
            assert_eq!(text.parse(), Ok(Mebibytes(mebibytes)), "{text}");
        }
    }

    #[test]
    fn bytes_need_no_suffix() {
        for (text, bytes) in [
            ("512", 512),
            ("4k", 4096),
            ("3MiB", 3 << 20),
            ("10G", 10 << 30),
            ("64T", 64 << 40),
        ] {
            assert_eq!(text.parse(), Ok(Bytes(bytes)), "{text}");
        }
        for text in ["", "1B", "1.5G", "-1", "1e3", "99999999T"] {
            assert!(text.parse::<Bytes>().is_err(), "{text}");
        }
    }

    #[test]
    fn anything_else_is_refused() {
        let parse = str::parse::<Mebibytes>;
        for text in ["", "M", "-1M", "+1M", "1.5G", " 1M"] {
            assert!(
                matches!(
                    parse(text),
                    Err(SizeError::Number(_) | SizeError::Suffix(_))
                ),
                "{text}"
            );
        }
        for text in ["128", "128K", "128MB", "1M ", "1Mé"] {
            assert!(matches!(parse(text), Err(SizeError::Suffix(_))), "{text}");
        }
        for text in ["4294967296M", "4096T", "99999999999999999999G"] {
            assert!(matches!(parse(text), Err(SizeError::TooLarge(_))), "{text}");
        }
    }
}
