//! `--disk FILE[,option...]`.

use std::path::PathBuf;
use std::str::FromStr;

use memshare::ShareMode;

use super::rate::{OPS, RATE, limiter, parse_ops, parse_rate};
use config::{DriveConfig, DriveFormat};

/// The value of `--disk`. A comma in the name of the file is written twice.
#[derive(Clone, Debug, PartialEq)]
pub struct DiskArgument {
    path: PathBuf,
    read_only: bool,
    root: bool,
    id: Option<String>,
    format: Option<DriveFormat>,
    serial: Option<String>,
    queues: Option<u16>,
    parents: Option<PathBuf>,
    keep_space: bool,
    share: Option<ShareMode>,
    rate: Option<u64>,
    ops: Option<u64>,
}

/// Why a text is not the description of a disk.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum DiskError {
    /// The file is missing.
    #[error(
        "names no file: write FILE[,ro][,root][,format=vhdx|raw][,serial=S][,id=ID][,queues=N][,parents=DIR][,keep-space][,share=off|read][,rate=SIZE][,ops=N]"
    )]
    NoFile,
    /// An option is unknown.
    #[error(
        "{0:?} is not an option of a disk: ro, root, format=vhdx|raw, serial=S, id=ID, queues=N, parents=DIR, keep-space, share=off|read, rate=SIZE, ops=N (a comma in a file name is written twice)"
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
}

/// Splits a text at single commas. Two commas stand for one in a part.
pub(super) fn split(text: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut rest = text.chars().peekable();
    while let Some(c) = rest.next() {
        let cut = c == ',' && rest.next_if_eq(&',').is_none();
        match parts.last_mut() {
            Some(last) if !cut => last.push(c),
            Some(_) | None => parts.push(String::new()),
        }
    }
    parts
}

fn set<T>(option: &'static str, slot: &mut Option<T>, value: T) -> Result<(), DiskError> {
    match slot.replace(value) {
        None => Ok(()),
        Some(_) => Err(DiskError::Twice(option)),
    }
}

impl FromStr for DiskArgument {
    type Err = DiskError;

    fn from_str(text: &str) -> Result<Self, DiskError> {
        let mut parts = split(text).into_iter();
        let path = parts
            .next()
            .filter(|path| !path.is_empty())
            .ok_or(DiskError::NoFile)?;
        let (mut parents, mut keep_space, mut share) = (None, None, None);
        let (mut rate, mut ops) = (None, None);
        let (mut read_only, mut root, mut id, mut format, mut serial, mut queues) =
            (None, None, None, None, None, None);
        for part in parts {
            match part.split_once('=') {
                None if part == "ro" => set("ro", &mut read_only, ())?,
                None if part == "root" => set("root", &mut root, ())?,
                Some(("id", value)) => set("id", &mut id, value.to_owned())?,
                Some(("serial", value)) => set("serial", &mut serial, value.to_owned())?,
                Some(("format", value)) => set("format", &mut format, parse_format(value)?)?,
                None if part == "keep-space" => set("keep-space", &mut keep_space, ())?,
                Some(("parents", value)) => set("parents", &mut parents, value.into())?,
                Some(("share", value)) => set("share", &mut share, parse_share(value)?)?,
                Some(("queues", value)) => set("queues", &mut queues, parse_queues(value)?)?,
                Some(("rate", value)) => {
                    let parsed = parse_rate(value).ok_or_else(|| wrong("rate", value, RATE))?;
                    set("rate", &mut rate, parsed)?;
                }
                Some(("ops", value)) => {
                    let parsed = parse_ops(value).ok_or_else(|| wrong("ops", value, OPS))?;
                    set("ops", &mut ops, parsed)?;
                }
                None | Some(_) => return Err(DiskError::UnknownOption(part)),
            }
        }
        Ok(Self {
            path: path.into(),
            read_only: read_only.is_some(),
            root: root.is_some(),
            id,
            format,
            serial,
            queues,
            parents,
            keep_space: keep_space.is_some(),
            share,
            rate,
            ops,
        })
    }
}

fn wrong(option: &'static str, value: &str, expected: &'static str) -> DiskError {
    DiskError::Value {
        option,
        value: value.to_owned(),
        expected,
    }
}

fn parse_format(value: &str) -> Result<DriveFormat, DiskError> {
    match value {
        "raw" => Ok(DriveFormat::Raw),
        "vhdx" => Ok(DriveFormat::Vhdx),
        _ => Err(wrong("format", value, "vhdx|raw")),
    }
}

fn parse_share(value: &str) -> Result<ShareMode, DiskError> {
    match value {
        "off" => Ok(ShareMode::Off),
        "read" => Ok(ShareMode::Read),
        _ => Err(wrong("share", value, "off|read")),
    }
}

fn parse_queues(value: &str) -> Result<u16, DiskError> {
    value.parse().map_err(|_| wrong("queues", value, "NUMBER"))
}

impl DiskArgument {
    /// The drive. Without an id, it gets the first of `disk0`, `disk1` and so on that is free. `taken` returns whether
    /// an id is in use.
    pub fn into_drive(self, taken: impl Fn(&str) -> bool) -> DriveConfig {
        let Self {
            path,
            read_only,
            root,
            id,
            format,
            serial,
            queues,
            parents,
            keep_space,
            share,
            rate,
            ops,
        } = self;
        let id = id.unwrap_or_else(|| {
            // There are more numbers than a guest can have drives, so that one is free.
            let mut free = (0..=u16::MAX).map(|number| format!("disk{number}"));
            free.find(|id| !taken(id)).unwrap_or_default()
        });
        let drive = DriveConfig::new(id, path);
        DriveConfig {
            is_root_device: root,
            is_read_only: read_only,
            format,
            serial,
            num_queues: queues.unwrap_or(drive.num_queues),
            parents,
            keep_space,
            share,
            rate_limiter: limiter(rate, ops),
            ..drive
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drive(text: &str) -> DriveConfig {
        text.parse::<DiskArgument>()
            .unwrap()
            .into_drive(|id| id == "disk0")
    }

    fn refused(text: &str) -> DiskError {
        text.parse::<DiskArgument>().unwrap_err()
    }

    #[test]
    fn a_file_alone_is_a_writable_disk_with_a_name_that_is_free() {
        assert_eq!(drive("a b.vhdx"), DriveConfig::new("disk1", "a b.vhdx"));
    }

    #[test]
    fn options_come_in_any_order() {
        let expected = DriveConfig {
            is_read_only: true,
            is_root_device: true,
            format: Some(DriveFormat::Raw),
            serial: Some("s=1".to_owned()),
            num_queues: 4,
            keep_space: true,
            parents: Some("/p".into()),
            rate_limiter: limiter(Some(100 << 20), Some(5)),
            ..DriveConfig::new("root", "/d")
        };
        assert_eq!(
            drive(
                "/d,ro,root,format=raw,serial=s=1,id=root,queues=4,parents=/p,keep-space,rate=100M,ops=5"
            ),
            expected
        );
        assert_eq!(
            drive(
                "/d,ops=5,rate=100M,keep-space,parents=/p,queues=4,id=root,serial=s=1,format=raw,root,ro"
            ),
            expected
        );
    }

    #[test]
    fn a_comma_in_a_name_is_written_twice() {
        assert_eq!(drive("a,,b,ro").path_on_host, PathBuf::from("a,b"));
        assert_eq!(drive("a,,,ro").path_on_host, PathBuf::from("a,"));
        assert_eq!(drive(",,").path_on_host, PathBuf::from(","));
    }

    #[test]
    fn anything_else_is_refused_by_name() {
        assert_eq!(refused(""), DiskError::NoFile);
        assert_eq!(refused(",ro"), DiskError::NoFile);
        assert_eq!(refused("d,"), DiskError::UnknownOption(String::new()));
        assert_eq!(refused("d,rw"), DiskError::UnknownOption("rw".to_owned()));
        assert_eq!(
            refused("d,ro=1"),
            DiskError::UnknownOption("ro=1".to_owned())
        );
        assert_eq!(refused("d,ro,ro"), DiskError::Twice("ro"));
        assert_eq!(
            refused("d,format=raw,format=vhdx"),
            DiskError::Twice("format")
        );
        assert!(matches!(
            refused("d,format=qcow2"),
            DiskError::Value {
                option: "format",
                ..
            }
        ));
        assert!(matches!(
            refused("d,queues=-1"),
            DiskError::Value {
                option: "queues",
                ..
            }
        ));
        for (text, named) in [
            ("d,rate=0", "rate"),
            ("d,rate=x", "rate"),
            ("d,ops=0", "ops"),
        ] {
            assert!(
                matches!(refused(text), DiskError::Value { option, .. } if option == named),
                "{text}"
            );
        }
        assert_eq!(refused("d,ops=1,ops=2"), DiskError::Twice("ops"));
    }
}
