//! `coppice serve --jail [off | option,...]`.

use std::ops::RangeInclusive;
use std::str::FromStr;

use super::disk::split;
use super::jail::{JailArgumentError, number, set};
use daemon::serve::JailPolicy;

/// The value of `coppice serve --jail`. A comma in a path is written twice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServeJailArgument(Option<JailPolicy>);

impl From<ServeJailArgument> for Option<JailPolicy> {
    fn from(argument: ServeJailArgument) -> Self {
        argument.0
    }
}

/// Why a text does not describe how guests are jailed.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ServeJailError {
    /// An option is unknown.
    #[error(
        "{0:?} is not an option of the guests' jails: uids=FIRST-LAST, cgroup=NAME, cpu=PERCENT, pids=N, allow=PATH, require=all; or off, alone (a comma in a path is written twice)"
    )]
    UnknownOption(String),
    /// An option has a value that it cannot have, or is given twice.
    #[error(transparent)]
    Option(#[from] JailArgumentError),
}

/// Parses `FIRST-LAST`. Neither root nor -1, which is no user, can be a guest's.
fn uids(value: &str) -> Result<RangeInclusive<u32>, JailArgumentError> {
    let range = value.split_once('-').and_then(|(first, last)| {
        let (first, last) = (first.parse().ok()?, last.parse().ok()?);
        (0 < first && first <= last && last < u32::MAX).then_some(first..=last)
    });
    range.ok_or_else(|| JailArgumentError::Value {
        option: "uids",
        value: value.to_owned(),
        expected: "FIRST-LAST",
    })
}

impl FromStr for ServeJailArgument {
    type Err = ServeJailError;

    fn from_str(text: &str) -> Result<Self, ServeJailError> {
        if text == "off" {
            return Ok(Self(None));
        }
        let mut policy = JailPolicy::default();
        let mut require = None;
        for part in split(text).into_iter().filter(|part| !part.is_empty()) {
            let Some((option, value)) = part.split_once('=').filter(|(_, value)| !value.is_empty())
            else {
                return Err(ServeJailError::UnknownOption(part));
            };
            match option {
                "uids" => set("uids", &mut policy.uids, uids(value)?)?,
                "cgroup" => set("cgroup", &mut policy.cgroup, value.into())?,
                "cpu" => {
                    let percent = number("cpu", value, (1, 1_000_000), "PERCENT")?;
                    set("cpu", &mut policy.cpu, percent)?;
                }
                "pids" => {
                    let most = number("pids", value, (1, u32::MAX), "NUMBER")?;
                    set("pids", &mut policy.pids, most)?;
                }
                "allow" => policy.allow.push(value.into()),
                "require" if value == "all" => set("require", &mut require, ())?,
                _ => return Err(ServeJailError::UnknownOption(part)),
            }
        }
        policy.require_all = require.is_some();
        let given = [
            ("cpu", policy.cpu.is_some()),
            ("pids", policy.pids.is_some()),
        ];
        if policy.cgroup.is_none()
            && let Some((option, _)) = given.into_iter().find(|(_, given)| *given)
        {
            return Err(JailArgumentError::NoGroup(option).into());
        }
        Ok(Self(Some(policy)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(text: &str) -> Option<JailPolicy> {
        text.parse::<ServeJailArgument>().unwrap().into()
    }

    #[test]
    fn guests_are_jailed_by_the_options_or_not_at_all() {
        assert_eq!(policy(""), Some(JailPolicy::default()));
        assert_eq!(policy("off"), None);
        let expected = JailPolicy {
            uids: Some(1000..=1999),
            cgroup: Some("a/guests".into()),
            cpu: Some(150),
            pids: Some(64),
            allow: vec!["/a,b".into()],
            require_all: true,
        };
        let text = "uids=1000-1999,cgroup=a/guests,cpu=150,pids=64,allow=/a,,b,require=all";
        assert_eq!(policy(text), Some(expected));
    }

    #[test]
    fn anything_else_is_refused_by_name() {
        for (text, named) in [
            ("on", "uids=FIRST-LAST"),
            ("off,cgroup=a", "or off"),
            ("uids=5", "FIRST-LAST"),
            ("uids=0-5", "FIRST-LAST"),
            ("uids=6-5", "FIRST-LAST"),
            ("uids=1-4294967295", "FIRST-LAST"),
            ("uid=5", "uids="),
            ("pids=3", "cgroup=NAME"),
            ("cgroup=a,cgroup=b", "twice"),
            ("cgroup=a,cpu=0", "PERCENT"),
            ("require=some", "require=all"),
        ] {
            let error = text.parse::<ServeJailArgument>().unwrap_err().to_string();
            assert!(error.contains(named), "{text}: {error}");
        }
    }
}
