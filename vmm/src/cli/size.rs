//! Sizes on the command line.

use std::str::FromStr;

/// A size of guest RAM in MiB. On the command line a number with a binary suffix: `M` (MiB), `G` (GiB) or `T` (TiB), in any case, and
/// with or without `iB` behind it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mebibytes(pub u32);

/// Not a size.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum SizeError {
    /// No number before the suffix.
    #[error("{0:?} is not a whole number with the suffix M, G or T, such as 128M")]
    Number(String),
    /// No suffix, or an unknown one.
    #[error("{0:?} needs the suffix M (MiB), G (GiB) or T (TiB), such as 128M")]
    Suffix(String),
    /// More than can be counted.
    #[error("{0:?} is more than any host has")]
    TooLarge(String),
}

impl FromStr for Mebibytes {
    type Err = SizeError;

    fn from_str(text: &str) -> Result<Self, SizeError> {
        let digits = text.bytes().take_while(u8::is_ascii_digit).count();
        let (number, suffix) = text.split_at(digits);
        if number.is_empty() {
            return Err(SizeError::Number(text.to_owned()));
        }
        let unit: u32 = match suffix.to_ascii_lowercase().as_str() {
            "m" | "mib" => 1,
            "g" | "gib" => 1 << 10,
            "t" | "tib" => 1 << 20,
            _ => return Err(SizeError::Suffix(text.to_owned())),
        };
        let mebibytes = number
            .parse::<u32>()
            .ok()
            .and_then(|number| number.checked_mul(unit));
        mebibytes
            .map(Self)
            .ok_or_else(|| SizeError::TooLarge(text.to_owned()))
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
