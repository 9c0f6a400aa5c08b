//! VHDX, the virtual disk format of [MS-VHDX] 8.0: fixed and dynamic disks.
//!
//! ```text
//!  0       64 KiB   128 KiB  192 KiB        256 KiB        1 MiB
//!  | identifier | header | header | region table | region table | log, metadata, BAT, payload blocks in any order ...
//! ```
//!
//! A module a chapter of the specification: `header`, `region`, `metadata`, `log`, `bat`, and `format` for
//! all that lies on disk. `view` shows the file as it is after log replay; `open` and `create` tie them
//! together. `disk` resolves ranges, `commit` makes what was allocated durable, `pages` and `space` are what they
//! share.
//!
//! # Life of an open file
//!
//! ```text
//!   open ──> untouched ──first write──> announced ──close──> untouched
//!              (nothing is written)     (new FileWriteGuid, DataWriteGuid and LogGuid in both headers, durable)
//! ```
//!
//! Opening writes nothing unless a log has to be replayed, and that only when all else was found sound. A file opened for
//! reading is seen through its log and never written.
//!
//! The first write of an open waits for the announcement, four syncs; a write that needs more space than the file has waits for
//! `ftruncate`. All other requests wait for no I/O but the reading of a BAT page.
//!
//! # What survives a cut
//!
//! An allocating write takes space past the end of the last block, which reads as zeros, and changes the BAT in memory. A
//! flush describes the changed BAT pages in the log, makes that durable together with all payload (one
//! `fdatasync`), then writes the pages in place. Space of a log entry is used again when a later sync has made its pages
//! durable. So at any cut the file opens, here and in any other reader: the log brings the table to the state of the last
//! flush, or of the one that was under way, and space whose entry was lost is given back. An entry may be durable before
//! the data of its block is: the block then reads as zeros, as it did before the write.

mod amend;
mod bat;
mod bitmap;
mod check;
mod commit;
mod compact;
mod create;
mod disk;
mod flights;
mod format;
mod header;
mod identifiers;
mod info;
mod locator;
mod log;
mod merge;
mod metadata;
mod open;
mod pages;
mod region;
mod resize;
mod runs;
mod snapshot;
mod space;
mod view;
mod write;

#[cfg(test)]
mod tests;

pub use check::Checked;
pub use compact::{CompactOptions, Compacted};
pub use create::{ChildOptions, CreateError, CreateOptions};
pub use disk::Vhdx;
pub use format::Guid;
pub use identifiers::Identifiers;
pub use info::Info;
pub use locator::ParentLocator;
pub use merge::Merged;
pub use snapshot::{ChainError, children_in};

pub(crate) use format::{HEADER_OFFSETS, HEADER_SIGNATURE, SIGNATURE};

/// What a fuzzer needs to make files that are sound but for what it changes.
#[cfg(feature = "fuzzing")]
pub(crate) mod fuzz_seam {
    pub(crate) use super::format::{
        Guid, HEADER_OFFSETS, REGION_TABLE_LEN, REGION_TABLE_OFFSETS, RawDescriptor, RawHeader,
        RawLogEntry, checksum,
    };
}
