//! `--pmem FILE[,option...]`.

use std::path::PathBuf;
use std::str::FromStr;

use super::disk::split;
use super::rate::{OPS, RATE, limiter, parse_ops, parse_rate};
use config::{DriveFormat, PmemConfig, PmemMode};

/// The value of `--pmem`. A comma in the name of the file is written twice.
#[derive(Clone, Debug, PartialEq)]
pub struct PmemArgument {
    path: PathBuf,
    mode: PmemMode,
    root: bool,
    id: Option<String>,
    format: Option<DriveFormat>,
    parents: Option<PathBuf>,
    rate: Option<u64>,
    ops: Option<u64>,
}

/// Why a text is not the description of a pmem device.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum PmemError {
    /// The file is missing.
    #[error(
        "names no file: write FILE[,ro|cow|rw][,root][,id=ID][,format=vhdx|raw][,parents=DIR][,rate=SIZE][,ops=N]"
    )]
    NoFile,
    /// An option is unknown.
    #[error(
        "{0:?} is not an option of a pmem device: ro, cow, rw, root, id=ID, format=vhdx|raw, parents=DIR, rate=SIZE, ops=N (a comma in a file name is written twice)"
    )]
    UnknownOption(String),
    /// An option is given twice.
    #[error("{0} is given twice")]
    Twice(&'static str),
    /// The format is unknown.
    #[error("format={0} is not format=vhdx|raw")]
    Format(String),
    /// A limit is none.
    #[error("{option}={value} is not {option}={expected}")]
    Limit {
        /// The option.
        option: &'static str,
        /// Its value.
        value: String,
        /// The values that it may have.
        expected: &'static str,
    },
}

fn wrong(option: &'static str, value: &str, expected: &'static str) -> PmemError {
    PmemError::Limit {
        option,
        value: value.to_owned(),
        expected,
    }
}

fn set<T>(option: &'static str, slot: &mut Option<T>, value: T) -> Result<(), PmemError> {
    match slot.replace(value) {
        None => Ok(()),
        Some(_) => Err(PmemError::Twice(option)),
    }
}

impl FromStr for PmemArgument {
    type Err = PmemError;

    fn from_str(text: &str) -> Result<Self, PmemError> {
        const MODE: &str = "the mode (ro, cow, rw)";
        let mut parts = split(text).into_iter();
        let path = parts
            .next()
            .filter(|path| !path.is_empty())
            .ok_or(PmemError::NoFile)?;
        let (mut mode, mut root, mut id, mut format, mut parents) = (None, None, None, None, None);
        let (mut rate, mut ops) = (None, None);
        for part in parts {
            match part.split_once('=') {
                None if part == "ro" => set(MODE, &mut mode, PmemMode::Ro)?,
                None if part == "cow" => set(MODE, &mut mode, PmemMode::Cow)?,
                None if part == "rw" => set(MODE, &mut mode, PmemMode::Rw)?,
                None if part == "root" => set("root", &mut root, ())?,
                Some(("id", value)) => set("id", &mut id, value.to_owned())?,
                Some(("format", "raw")) => set("format", &mut format, DriveFormat::Raw)?,
                Some(("format", "vhdx")) => set("format", &mut format, DriveFormat::Vhdx)?,
                Some(("format", value)) => return Err(PmemError::Format(value.to_owned())),
                Some(("parents", value)) => set("parents", &mut parents, value.into())?,
                Some(("rate", value)) => {
                    let parsed = parse_rate(value).ok_or_else(|| wrong("rate", value, RATE))?;
                    set("rate", &mut rate, parsed)?;
                }
                Some(("ops", value)) => {
                    let parsed = parse_ops(value).ok_or_else(|| wrong("ops", value, OPS))?;
                    set("ops", &mut ops, parsed)?;
                }
                None | Some(_) => return Err(PmemError::UnknownOption(part)),
            }
        }
        Ok(Self {
            path: path.into(),
            mode: mode.unwrap_or(PmemMode::Ro),
            root: root.is_some(),
            id,
            format,
            parents,
            rate,
            ops,
        })
    }
}

impl PmemArgument {
    /// The device. Without an id, it gets the first of `pmem0`, `pmem1` and so on that is free. `taken` returns whether
    /// an id is in use.
    pub fn into_pmem(self, taken: impl Fn(&str) -> bool) -> PmemConfig {
        let id = self.id.unwrap_or_else(|| {
            // There are more numbers than a guest can have devices, so that one is free.
            let mut free = (0..=u16::MAX).map(|number| format!("pmem{number}"));
            free.find(|id| !taken(id)).unwrap_or_default()
        });
        PmemConfig {
            root_device: self.root,
            format: self.format,
            parents: self.parents,
            rate_limiter: limiter(self.rate, self.ops),
            ..PmemConfig::new(id, self.path, self.mode)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pmem(text: &str) -> PmemConfig {
        text.parse::<PmemArgument>()
            .unwrap()
            .into_pmem(|id| id == "pmem0")
    }

    fn refused(text: &str) -> PmemError {
        text.parse::<PmemArgument>().unwrap_err()
    }

    #[test]
    fn a_file_alone_is_read_only_with_a_name_that_is_free() {
        let expected = PmemConfig::new("pmem1", "a,b", PmemMode::Ro);
        assert_eq!(pmem("a,,b"), expected);
        assert!(expected.read_only);
    }

    #[test]
    fn options_come_in_any_order() {
        let expected = PmemConfig {
            root_device: true,
            format: Some(DriveFormat::Raw),
            parents: Some("/p".into()),
            rate_limiter: limiter(Some(1 << 10), Some(7)),
            ..PmemConfig::new("root", "/d", PmemMode::Rw)
        };
        assert_eq!(
            pmem("/d,rw,root,id=root,format=raw,parents=/p,rate=1K,ops=7"),
            expected
        );
        assert_eq!(
            pmem("/d,ops=7,rate=1K,parents=/p,format=raw,id=root,root,rw"),
            expected
        );
        assert_eq!(pmem("/d,cow").mode(), PmemMode::Cow);
    }

    #[test]
    fn anything_else_is_refused_by_name() {
        assert_eq!(refused(""), PmemError::NoFile);
        assert_eq!(refused(",ro"), PmemError::NoFile);
        let unknown = |option: &str| PmemError::UnknownOption(option.to_owned());
        assert_eq!(refused("d,"), unknown(""));
        assert_eq!(refused("d,queues=2"), unknown("queues=2"));
        assert_eq!(refused("d,ro=1"), unknown("ro=1"));
        assert_eq!(refused("d,root,root"), PmemError::Twice("root"));
        assert!(refused("d,ro,rw").to_string().contains("mode"));
        for text in ["d,rate=0", "d,ops=x"] {
            let refused = refused(text);
            assert!(matches!(refused, PmemError::Limit { .. }), "{refused}");
        }
        assert_eq!(refused("d,format=x"), PmemError::Format("x".to_owned()));
    }
}
