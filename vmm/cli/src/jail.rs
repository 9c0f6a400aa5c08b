//! `--jail [option,...]`.

use std::str::FromStr;

use super::disk::split;
use config::{Bytes, SizeError};
use jail::{CgroupConfig, JailConfig};

/// The value of `--jail`. A comma in a path is written twice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JailArgument(JailConfig);

impl From<JailArgument> for JailConfig {
    fn from(argument: JailArgument) -> Self {
        argument.0
    }
}

/// Why a text is not the description of a jail.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum JailArgumentError {
    /// An option is unknown.
    #[error(
        "{0:?} is not an option of a jail: uid=N, gid=N, cgroup=NAME, memory=SIZE, cpu=PERCENT, pids=N, io=WEIGHT, allow=PATH, require=all (a comma in a path is written twice)"
    )]
    UnknownOption(String),
    /// An option is given twice.
    #[error("{0} is given twice")]
    Twice(&'static str),
    /// An option has a value that it cannot have.
    #[error("{option}={value} is not {option}={expected}")]
    Value {
        /// The option.
        option: &'static str,
        /// Its value.
        value: String,
        /// The values that it may have.
        expected: &'static str,
    },
    /// The limit of memory is not a size.
    #[error("memory")]
    Memory(#[from] SizeError),
    /// A limit is given without a group.
    #[error("{0} is a limit of a group, and needs cgroup=NAME")]
    NoGroup(&'static str),
}

pub(super) fn set<T>(
    option: &'static str,
    slot: &mut Option<T>,
    value: T,
) -> Result<(), JailArgumentError> {
    match slot.replace(value) {
        None => Ok(()),
        Some(_) => Err(JailArgumentError::Twice(option)),
    }
}

/// Parses a number of at least `least` and at most `most`.
pub(super) fn number<T>(
    option: &'static str,
    value: &str,
    (least, most): (T, T),
    expected: &'static str,
) -> Result<T, JailArgumentError>
where
    T: FromStr + PartialOrd,
{
    let number = value.parse().ok();
    number
        .filter(|number| (least..=most).contains(number))
        .ok_or_else(|| JailArgumentError::Value {
            option,
            value: value.to_owned(),
            expected,
        })
}

impl FromStr for JailArgument {
    type Err = JailArgumentError;

    fn from_str(text: &str) -> Result<Self, JailArgumentError> {
        let mut jail = JailConfig::default();
        let (mut name, mut require) = (None, None);
        let mut limits = CgroupConfig::default();
        for part in split(text).into_iter().filter(|part| !part.is_empty()) {
            let Some((option, value)) = part.split_once('=').filter(|(_, value)| !value.is_empty())
            else {
                return Err(JailArgumentError::UnknownOption(part));
            };
            // The number -1 is no user: system calls take it as "no change".
            let ids = (0, u32::MAX - 1);
            match option {
                "uid" => set("uid", &mut jail.uid, number("uid", value, ids, "NUMBER")?)?,
                "gid" => set("gid", &mut jail.gid, number("gid", value, ids, "NUMBER")?)?,
                "cgroup" => set("cgroup", &mut name, value.into())?,
                "memory" => set("memory", &mut limits.memory, value.parse::<Bytes>()?.0)?,
                "cpu" => {
                    let percent = number("cpu", value, (1, 1_000_000), "PERCENT")?;
                    set("cpu", &mut limits.cpu, percent)?;
                }
                "pids" => {
                    let most = number("pids", value, (1, u32::MAX), "NUMBER")?;
                    set("pids", &mut limits.pids, most)?;
                }
                "io" => {
                    let weight = number("io", value, (1, 10_000), "1 to 10000")?;
                    set("io", &mut limits.io, weight)?;
                }
                "allow" => jail.allow.push(value.into()),
                "require" if value == "all" => set("require", &mut require, ())?,
                "require" => {
                    return Err(JailArgumentError::Value {
                        option: "require",
                        value: value.to_owned(),
                        expected: "all",
                    });
                }
                _ => return Err(JailArgumentError::UnknownOption(part)),
            }
        }
        jail.require_all = require.is_some();
        let given = [
            ("memory", limits.memory.is_some()),
            ("cpu", limits.cpu.is_some()),
            ("pids", limits.pids.is_some()),
            ("io", limits.io.is_some()),
        ];
        if let Some(name) = name {
            jail.cgroup = Some(CgroupConfig { name, ..limits });
        } else if let Some((option, _)) = given.into_iter().find(|(_, given)| *given) {
            return Err(JailArgumentError::NoGroup(option));
        }
        Ok(Self(jail))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn jail(text: &str) -> JailConfig {
        text.parse::<JailArgument>().unwrap().into()
    }

    #[test]
    fn options_add_to_what_every_jail_has() {
        assert_eq!(jail(""), JailConfig::default());
        let expected = JailConfig {
            uid: Some(1000),
            gid: Some(107),
            cgroup: Some(CgroupConfig {
                name: "guests/a".into(),
                memory: Some(256 << 20),
                cpu: Some(150),
                pids: Some(64),
                io: Some(10),
            }),
            allow: vec!["/disks".into(), "/a,b".into()],
            require_all: true,
            shared: None,
        };
        assert_eq!(
            jail(
                "uid=1000,gid=107,cgroup=guests/a,memory=256M,cpu=150,pids=64,io=10,allow=/disks,allow=/a,,b,require=all"
            ),
            expected
        );
    }

    #[test]
    fn anything_else_is_refused_by_name() {
        for (text, named) in [
            ("uid", "uid"),
            ("uid=", "uid="),
            ("uid=4294967295", "NUMBER"),
            ("uid=1,uid=2", "twice"),
            ("pids=0,cgroup=a", "pids=0"),
            ("io=10001,cgroup=a", "1 to 10000"),
            ("memory=1M", "cgroup=NAME"),
            ("memory=much,cgroup=a", "much"),
            ("require=some", "require=all"),
            ("root", "is not an option"),
        ] {
            let error = text.parse::<JailArgument>().unwrap_err();
            let error = host::report::chain(&error).to_string();
            assert!(error.contains(named), "{text}: {error}");
        }
    }
}
