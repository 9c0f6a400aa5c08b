//! VHDX, the virtual disk format of [MS-VHDX] 8.0: fixed, dynamic and differencing disks.
//!
//! A module a chapter of the specification: `header`, `region`, `metadata`, `locator`, `log`, `bat`, `bitmap`, and
//! `format` for all that lies on disk. `view` shows the file as it is after log replay; `open` and `create` tie them
//! together. `disk` resolves ranges, `write` changes blocks, `commit` makes that durable; `state` is what they share,
//! with `pages`, `space` and `in_flight` in it. `amend` changes metadata; `resize`, `compact`, `merge`, `snapshot`,
//! `check` and `repair` are operations on whole disks.
//!
#![doc = include_str!("../../../docs/design/vhdx.md")]

mod amend;
mod bat;
mod bitmap;
mod check;
mod commit;
mod compact;
mod create;
mod disk;
mod format;
mod header;
mod identifiers;
mod in_flight;
mod info;
mod locator;
mod log;
mod merge;
mod metadata;
mod open;
mod pages;
mod region;
mod repair;
mod resize;
mod runs;
mod snapshot;
mod space;
mod state;
mod view;
mod write;

#[cfg(test)]
mod tests;

pub use check::Checked;
pub use compact::{CompactOptions, Compacted};
pub use create::{ChildOptions, CreateError, CreateOptions};
pub use disk::Vhdx;
pub use format::{Guid, SIGNATURE};
pub use identifiers::Identifiers;
pub use info::Info;
pub use locator::ParentLocator;
pub use merge::Merged;
pub use open::{data_write_guid, parent_locator};
pub use repair::{Repaired, Undone};
pub use snapshot::{ChainError, children_in, move_parent};

pub(crate) use format::{HEADER_OFFSETS, HEADER_SIGNATURE};

/// What a fuzzer needs to make files that are sound but for what it changes.
#[cfg(feature = "fuzzing")]
pub(crate) mod fuzz_seam {
    pub(crate) use super::format::{
        Guid, HEADER_OFFSETS, REGION_TABLE_LEN, REGION_TABLE_OFFSETS, RawDescriptor, RawHeader,
        RawLogEntry, checksum,
    };
}
