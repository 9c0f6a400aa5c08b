//! Sizes as a user writes them.

use std::str::FromStr;

/// A size of guest RAM in MiB. It is written as any size (see [`Bytes`]), and has to come to whole MiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mebibytes(pub u32);

/// A size in bytes. It is written as a number, with or without one of the binary suffixes `K`, `M`, `G` and `T`, in any
/// case, and with or without `iB` behind it. Before a suffix the number may have a fraction, of which whole bytes are
/// taken, or whole MiB where the suffix is `G` or `T`, and whole KiB where it is `M`: `1.1G` is 1126 MiB, rounded down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bytes(pub u64);

/// Why a text is not a size.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum SizeError {
    /// No number before the suffix.
    #[error("{0:?} is not a size, such as 128M, 1.5G or a number of bytes")]
    Number(String),
    /// An unknown suffix.
    #[error("{0:?} has another suffix than K (KiB), M (MiB), G (GiB) or T (TiB), as 128M has")]
    Suffix(String),
    /// A part of a byte.
    #[error(
        "{0:?} is not a whole number of bytes; with a suffix, as 1.5G has, it could have a fraction"
    )]
    Fraction(String),
    /// Not whole MiB, where those are counted.
    #[error("{0:?} is not a whole number of MiB, as 128M is; without a suffix it is bytes")]
    Mebibytes(String),
    /// The size is too large for 64 bits.
    #[error("{0:?} is more than any host has")]
    TooLarge(String),
}

/// The power of two that a suffix stands for, and of the unit down to which a fraction of it is rounded.
fn unit(suffix: &str) -> Option<(u32, u32)> {
    Some(match suffix.to_ascii_lowercase().as_str() {
        "" => (0, 0),
        "k" | "kib" => (10, 0),
        "m" | "mib" => (20, 10),
        "g" | "gib" => (30, 20),
        "t" | "tib" => (40, 20),
        _ => return None,
    })
}

/// The fraction behind the point, `.5` of 2 to the power of `shift`; `None` where it has too many digits to count.
fn fraction(digits: &str, shift: u32) -> Option<u64> {
    let numerator = u128::from(digits.parse::<u64>().ok()?) << shift;
    let part = numerator / 10_u128.checked_pow(u32::try_from(digits.len()).ok()?)?;
    u64::try_from(part).ok()
}

impl FromStr for Bytes {
    type Err = SizeError;

    fn from_str(text: &str) -> Result<Self, SizeError> {
        let digits = |text: &str| text.bytes().take_while(u8::is_ascii_digit).count();
        let (whole, rest) = text.split_at(digits(text));
        let (part, suffix) = match rest.strip_prefix('.') {
            Some(rest) => rest.split_at(digits(rest)),
            None => ("", rest),
        };
        if whole.is_empty() || (part.is_empty() && rest.starts_with('.')) {
            return Err(SizeError::Number(text.to_owned()));
        }
        let (shift, rounded) = unit(suffix).ok_or_else(|| SizeError::Suffix(text.to_owned()))?;
        if shift == 0 && !part.is_empty() {
            return Err(SizeError::Fraction(text.to_owned()));
        }
        let too_large = || SizeError::TooLarge(text.to_owned());
        let part = match part {
            "" => 0,
            part => fraction(part, shift).ok_or_else(too_large)? >> rounded << rounded,
        };
        whole
            .parse::<u64>()
            .ok()
            .and_then(|whole| whole.checked_mul(1 << shift))
            .and_then(|whole| whole.checked_add(part))
            .map(Self)
            .ok_or_else(too_large)
    }
}

impl FromStr for Mebibytes {
    type Err = SizeError;

    fn from_str(text: &str) -> Result<Self, SizeError> {
        let Bytes(bytes) = text.parse()?;
        if !bytes.is_multiple_of(1 << 20) {
            return Err(SizeError::Mebibytes(text.to_owned()));
        }
        u32::try_from(bytes >> 20)
            .map(Self)
            .map_err(|_| SizeError::TooLarge(text.to_owned()))
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
            ("1.5G", 1536),
            ("1.1G", 1126),
            ("1048576", 1),
            ("2048K", 2),
        ];
        for (text, mebibytes) in sizes {
            assert_eq!(text.parse(), Ok(Mebibytes(mebibytes)), "{text}");
        }
    }

    #[test]
    fn bytes_need_no_suffix_and_have_a_fraction_with_one() {
        for (text, bytes) in [
            ("512", 512),
            ("4k", 4096),
            ("3MiB", 3 << 20),
            ("10G", 10 << 30),
            ("10GiB", 10 << 30),
            ("64T", 64 << 40),
            ("1.5K", 1536),
            ("1.5g", 3 << 29),
            ("0.5TiB", 1 << 39),
            ("0.7M", 716 << 10),
            ("1.50000000000000000G", 3 << 29),
        ] {
            assert_eq!(text.parse(), Ok(Bytes(bytes)), "{text}");
        }
        for text in [
            "",
            "1B",
            "-1",
            "1e3",
            "99999999T",
            "1.5",
            ".5G",
            "1.G",
            "1.5.5G",
            "1.-5G",
            "1,5G",
            "1.99999999999999999999G",
        ] {
            assert!(text.parse::<Bytes>().is_err(), "{text}");
        }
    }

    #[test]
    fn anything_else_is_refused() {
        let parse = str::parse::<Mebibytes>;
        for text in ["", "M", "-1M", "+1M", " 1M"] {
            assert!(
                matches!(
                    parse(text),
                    Err(SizeError::Number(_) | SizeError::Suffix(_))
                ),
                "{text}"
            );
        }
        for text in ["128MB", "1M ", "1Mé"] {
            assert!(matches!(parse(text), Err(SizeError::Suffix(_))), "{text}");
        }
        for text in ["128", "128K", "1.5M"] {
            assert!(
                matches!(parse(text), Err(SizeError::Mebibytes(_))),
                "{text}"
            );
        }
        for text in ["4294967296M", "4096T", "99999999999999999999G"] {
            assert!(matches!(parse(text), Err(SizeError::TooLarge(_))), "{text}");
        }
    }
}
