//! VHDX, the virtual disk format of [MS-VHDX] 8.0: fixed, dynamic and differencing disks.
//!
//! ```text
//!  0       64 KiB   128 KiB  192 KiB        256 KiB        1 MiB
//!  | identifier | header | header | region table | region table | log, metadata, BAT, payload blocks in any order ...
//! ```
//!
//! A module a chapter of the specification: `header`, `region`, `metadata`, `locator`, `log`, `bat`, `bitmap`, and
//! `format` for all that lies on disk. `view` shows the file as it is after log replay; `open` and `create` tie them
//! together. `disk` resolves ranges, `write` changes blocks, `commit` makes that durable; `state` is what they share,
//! with `pages`, `space` and `in_flight` in it. `amend` changes metadata; `resize`, `compact`, `merge`, `snapshot`,
//! `check` and `repair` are operations on whole disks.
//!
//! # What a request does to a block
//!
//! | state of the block | read | write of a part | write of the block | trim of the block | zeros to a part | zeros to the block |
//! |---|---|---|---|---|---|---|
//! | not present (0), no parent | zeros | 6, rest zeros | 6 | stays | stays | stays |
//! | not present (0), a parent | the parent | 7, bits set at its end | 6 | 3 | 7, as a write | 2 |
//! | undefined (1) | zeros | 6, rest zeros | 6 | stays | 2 | 2 |
//! | zero (2) | zeros | 6, rest zeros | 6 | stays | stays | stays |
//! | unmapped (3) | zeros | 6, rest zeros, in its own space if that is to be had | 6 | stays | 2 | 2 |
//! | fully present (6) | the file | in place | in place | 3, space kept as an anchor | in place | 2, space freed; in place without leave to unmap |
//! | partially present (7) | the file where its bit is set, else the parent | in place, bits set at its end; 6 with the last bit | 6 | 3 | in place, bits set | 2; in place and 6 without leave |
//!
//! A trim of a part of a block punches holes into what the file has of it, and a block's state does not change. A fixed
//! disk keeps its blocks: a trim does nothing, and zeros are written in place. A flush makes all of it durable and
//! changes nothing. A range that ends with the disk covers its last block. What stays as it is, is not written.
//!
//! Free space is one of: *zero*, which durably reads as zeros and is handed out; *stale*, which is zeroed, and synced,
//! before it is; and on its way there: see `space`. So a block never shows what another held. An unmapped block that is
//! written takes its anchor back if that has been zeroed; with many anchors and no other space they are dropped.
//!
//! # Life of an open file
//!
//! ```text
//!   open ──> untouched ──first change──> announced ──close──> untouched
//!              (nothing is written)     (new identifiers, and a LogGuid in both headers, durable)
//! ```
//!
//! Opening writes nothing unless a log has to be replayed, and that only when all else was found sound, parents
//! included. A file opened for reading is seen through its log and never written. Which identifiers change when: see
//! `identifiers`.
//!
//! The first write of an open waits for the announcement, four syncs; a write that needs more space than the file has
//! waits for `ftruncate`, or for freed space to be zeroed. All other requests wait for no I/O but the reading of a
//! metadata page.
//!
//! # What survives a cut
//!
//! A change is made to pages in memory. A flush describes the changed pages in the log, makes that durable together
//! with all payload (one `fdatasync`), then writes the pages in place. Where a page says that sectors are in a child,
//! which a reader would otherwise see in the parent, their data is made durable before the log is written (two). Space
//! of a log entry is used again when a later sync has made its pages durable. So at any cut the file opens, here and in
//! any other reader: the log brings the tables to the state of the last flush, or of the one that was under way, and
//! space whose entry was lost is given back. The entry of a new block may be durable before its data is: the block then
//! reads as zeros, as it did before the write.
//!
//! # Chains
//!
//! A child records its parent's DataWriteGuid, and every open compares them. Parents are open for reading, shared with
//! other children, and locked against writers. What the parents hold of a block is remembered, so that depth costs
//! little. A disk in use is snapshotted by a new child on top of it (`Vhdx::snapshot`), and a chain is made shorter by
//! merging a layer into the one below while the layers above are in use (`Vhdx::merge_into_parent`).

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
pub use format::Guid;
pub use identifiers::Identifiers;
pub use info::Info;
pub use locator::ParentLocator;
pub use merge::Merged;
pub use repair::{Repaired, Undone};
pub use snapshot::{ChainError, children_in};

pub(crate) use format::{HEADER_OFFSETS, HEADER_SIGNATURE};

/// What a fuzzer needs to make files that are sound but for what it changes.
#[cfg(feature = "fuzzing")]
pub(crate) mod fuzz_seam {
    pub(crate) use super::format::{
        Guid, HEADER_OFFSETS, REGION_TABLE_LEN, REGION_TABLE_OFFSETS, RawDescriptor, RawHeader,
        RawLogEntry, checksum,
    };
}
