//! `--balloon [AMOUNT][,option...]`.

use std::str::FromStr;

use config::BalloonConfig;
use config::{Mebibytes, SizeError};

/// The value of `--balloon`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BalloonArgument(pub BalloonConfig);

/// Why a text is not the description of a balloon.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum BalloonArgumentError {
    /// The amount cannot be read.
    #[error(transparent)]
    Amount(#[from] SizeError),
    /// An option is unknown.
    #[error(
        "{0:?} is not an option of a balloon: deflate-on-oom, stats=SECONDS, hinting, reporting, behind the amount, if there is one"
    )]
    UnknownOption(String),
    /// An option is given twice.
    #[error("{0} is given twice")]
    Twice(&'static str),
    /// The interval of the statistics cannot be read.
    #[error("stats={0} is not stats=SECONDS, of 1 to {max}", max = u16::MAX)]
    Interval(String),
}

fn set<T>(
    option: &'static str,
    slot: &mut Option<T>,
    value: T,
) -> Result<(), BalloonArgumentError> {
    match slot.replace(value) {
        None => Ok(()),
        Some(_) => Err(BalloonArgumentError::Twice(option)),
    }
}

fn parse_interval(value: &str) -> Result<u16, BalloonArgumentError> {
    let seconds = value.parse().ok().filter(|seconds| *seconds > 0);
    seconds.ok_or_else(|| BalloonArgumentError::Interval(value.to_owned()))
}

impl FromStr for BalloonArgument {
    type Err = BalloonArgumentError;

    fn from_str(text: &str) -> Result<Self, BalloonArgumentError> {
        let mut parts = text.split(',').peekable();
        // No option begins with a digit, so that a first part that does is the amount.
        let amount =
            parts.next_if(|part| part.is_empty() || part.starts_with(|c: char| c.is_ascii_digit()));
        let amount_mib = match amount {
            None | Some("") => 0,
            Some(amount) => amount.parse::<Mebibytes>()?.0,
        };
        let (mut deflate, mut interval, mut hinting, mut reporting) = (None, None, None, None);
        for part in parts {
            match part.split_once('=') {
                None if part == "deflate-on-oom" => set("deflate-on-oom", &mut deflate, ())?,
                None if part == "hinting" => set("hinting", &mut hinting, ())?,
                None if part == "reporting" => set("reporting", &mut reporting, ())?,
                Some(("stats", value)) => set("stats", &mut interval, parse_interval(value)?)?,
                None | Some(_) => {
                    return Err(BalloonArgumentError::UnknownOption(part.to_owned()));
                }
            }
        }
        Ok(Self(BalloonConfig {
            amount_mib,
            deflate_on_oom: deflate.is_some(),
            stats_polling_interval_s: interval.unwrap_or(0),
            free_page_hinting: hinting.is_some(),
            free_page_reporting: reporting.is_some(),
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn balloon(text: &str) -> BalloonConfig {
        text.parse::<BalloonArgument>().unwrap().0
    }

    fn refused(text: &str) -> BalloonArgumentError {
        text.parse::<BalloonArgument>().unwrap_err()
    }

    #[test]
    fn an_amount_alone_or_options_alone_make_a_balloon() {
        let of = |amount_mib| BalloonConfig {
            amount_mib,
            ..BalloonConfig::default()
        };
        assert_eq!(balloon("64M"), of(64));
        assert_eq!(balloon(""), of(0));
        let reporting = BalloonConfig {
            free_page_reporting: true,
            ..BalloonConfig::default()
        };
        assert_eq!(balloon("reporting"), reporting);
        assert_eq!(balloon(",reporting"), reporting);
    }

    #[test]
    fn options_come_in_any_order() {
        let expected = BalloonConfig {
            amount_mib: 1024,
            deflate_on_oom: true,
            stats_polling_interval_s: 5,
            free_page_hinting: true,
            free_page_reporting: true,
        };
        assert_eq!(
            balloon("1G,deflate-on-oom,stats=5,hinting,reporting"),
            expected
        );
        assert_eq!(
            balloon("1G,reporting,hinting,stats=5,deflate-on-oom"),
            expected
        );
    }

    #[test]
    fn anything_else_is_refused_by_name() {
        assert!(matches!(refused("64"), BalloonArgumentError::Amount(_)));
        assert!(matches!(
            refused("9x,hinting"),
            BalloonArgumentError::Amount(_)
        ));
        let unknown = |part: &str| BalloonArgumentError::UnknownOption(part.to_owned());
        assert_eq!(refused("64M,"), unknown(""));
        assert_eq!(refused("hinting,64M"), unknown("64M"));
        assert_eq!(refused("poison"), unknown("poison"));
        assert_eq!(refused("reporting=1"), unknown("reporting=1"));
        assert_eq!(
            refused("hinting,hinting"),
            BalloonArgumentError::Twice("hinting")
        );
        for value in ["0", "-1", "65536", ""] {
            let text = format!("stats={value}");
            assert_eq!(
                refused(&text),
                BalloonArgumentError::Interval(value.to_owned())
            );
        }
    }
}
