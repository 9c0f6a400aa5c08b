//! Which page of a file backs a page of the guest, and which pages of the guest a page of a file backs.

use std::path::PathBuf;
use std::str::FromStr;

use memshare::{Backing, FileIdentity, PAGE_SIZE, PageState, SharedMemory};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// A guest physical address; read from decimal digits, or from hexadecimal ones behind `0x`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Address(pub u64);

/// A page of a file, by the file's identity; read from `DEVICE-INODE-OFFSET` in decimal, with the offset in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FilePage {
    /// The file (`st_dev`, `st_ino`).
    pub file: FileIdentity,
    /// The offset of a byte of the page.
    pub offset: u64,
}

/// The name of a page in the path of a request cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{name:.80?} is not {expected}")]
pub struct PageNameError {
    name: String,
    expected: &'static str,
}

impl FromStr for Address {
    type Err = PageNameError;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        let number = match name.strip_prefix("0x") {
            Some(digits) => u64::from_str_radix(digits, 16),
            None => name.parse(),
        };
        number.map(Self).map_err(|_| PageNameError {
            name: name.to_owned(),
            expected: "a guest physical address",
        })
    }
}

impl FromStr for FilePage {
    type Err = PageNameError;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        let numbers: Result<Vec<u64>, _> = name.splitn(3, '-').map(str::parse).collect();
        match numbers.as_deref() {
            Ok(&[device, inode, offset]) => Ok(Self {
                file: FileIdentity { device, inode },
                offset,
            }),
            Ok(_) | Err(_) => Err(PageNameError {
                name: name.to_owned(),
                expected: "DEVICE-INODE-OFFSET",
            }),
        }
    }
}

/// What backs a page of a guest.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, ToSchema)]
pub struct PageReport {
    /// Guest physical address of its first byte.
    pub address: u64,
    /// `own`: the page is the guest's own. `mapped`: it is the file's page. `copied`: it was the file's page until the
    /// guest wrote to it. `candidate`: it may be a copy of the file's page, and is to be compared with it.
    pub state: &'static str,
    /// The file, by the name that it was opened by.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub path_on_host: Option<PathBuf>,
    /// Where its page begins, in bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub offset: Option<u64>,
}

/// The pages of a guest that are a certain page of a file, or may become it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct FilePageReport {
    /// Guest physical addresses of their first bytes.
    pub addresses: Vec<u64>,
}

impl PageReport {
    /// The report of the page with a guest physical address; `None` where there is no RAM.
    pub(super) fn of(memory: &SharedMemory, Address(address): Address) -> Option<Self> {
        let address = address / PAGE_SIZE * PAGE_SIZE;
        let mut regions = memory.regions().iter();
        regions.find(|region| {
            address
                .checked_sub(region.start)
                .is_some_and(|offset| offset < region.window.len())
        })?;
        memory.refresh();
        let backing = memory.backing(address);
        let state = match &backing {
            None => "own",
            Some(Backing { state, .. }) => match state {
                PageState::Mapped { .. } => "mapped",
                PageState::Copied { .. } => "copied",
                PageState::Candidate { .. } => "candidate",
            },
        };
        Some(Self {
            address,
            state,
            offset: backing.as_ref().map(|backing| backing.offset),
            path_on_host: backing.map(|backing| backing.file.path().to_owned()),
        })
    }
}

impl FilePageReport {
    pub(super) fn of(memory: &SharedMemory, page: FilePage) -> Self {
        memory.refresh();
        Self {
            addresses: memory.pages_of(page.file, page.offset / PAGE_SIZE * PAGE_SIZE),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt;
    use std::sync::Arc;

    use memshare::{Limits, Region, Window};

    use super::*;

    #[test]
    fn names_are_numbers_and_nothing_else() {
        assert_eq!("4096".parse(), Ok(Address(4096)));
        assert_eq!("0x1F000".parse(), Ok(Address(0x1f000)));
        for name in ["", "0x", "-1", "1.0", "0x1_0", "99999999999999999999"] {
            let error = name.parse::<Address>().unwrap_err().to_string();
            assert_eq!(error, format!("{name:?} is not a guest physical address"));
        }
        let page = "3-5-4096".parse::<FilePage>().unwrap();
        let (device, inode) = (3, 5);
        assert_eq!(
            (page.file, page.offset),
            (FileIdentity { device, inode }, 4096)
        );
        for name in ["", "1-2", "1-2-3-4", "1-2-x", "a-2-3", "-1-2-3"] {
            assert!(name.parse::<FilePage>().is_err(), "{name}");
        }
    }

    #[test]
    fn a_page_is_reported_from_the_guests_side_and_from_the_files() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().write_all_at(&[7; 8192], 0).unwrap();
        let file = Arc::new(File::open(file.path()).unwrap());
        let window = Window::reserve(4 * PAGE_SIZE).unwrap();
        let region = Region {
            start: 0x10_0000,
            window,
        };
        let memory = SharedMemory::new(vec![region], Limits::of_host(5, false));
        let shared = memory.files().share(&file).unwrap();
        memory.map(0x10_1000, 8192, &shared, 0).unwrap();
        let of = |address| PageReport::of(&memory, Address(address));
        assert_eq!(of(0x10_0fff).unwrap().state, "own");
        assert_eq!(
            (of(0xf_ffff), of(0x10_4000), of(u64::MAX)),
            (None, None, None)
        );
        let mapped = of(0x10_2fff).unwrap();
        assert_eq!((mapped.address, mapped.state), (0x10_2000, "mapped"));
        assert_eq!(mapped.offset, Some(4096));
        assert_eq!(mapped.path_on_host.as_deref(), Some(shared.path()));
        memory.regions()[0].window.write(0x2000, &[1]);
        assert_eq!(of(0x10_2000).unwrap().state, "copied");
        let of_file = |offset| {
            let file = FileIdentity::of(&file).unwrap();
            FilePageReport::of(&memory, FilePage { file, offset }).addresses
        };
        assert_eq!(of_file(4095), [0x10_1000]);
        assert!(of_file(8192).is_empty());
    }
}
