//! What can go wrong with a snapshot.

use std::io;
use std::path::{Path, PathBuf};

use devices::lifecycle::SaveError;

use super::uffd::UffdError;
use super::version::VERSION;
use crate::pmem::{OwnPagesError, WritebackError};
use kvm::vm::StateError;

/// Why a snapshot was not made, or not loaded.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// A file of the snapshot cannot be used.
    #[error("cannot {operation} {}", path.display())]
    File {
        /// What was to be done.
        operation: &'static str,
        /// The file.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// A file that is no snapshot's state.
    #[error("{} is not the state of a snapshot", .0.display())]
    NotAState(PathBuf),
    /// Written by a Coppice that is newer, or that nobody has any more.
    #[error("{} is of version {version}, and this Coppice reads version {}; load it with the one that made it", path.display(), VERSION)]
    Version {
        /// The file.
        path: PathBuf,
        /// Its version.
        version: u32,
    },
    /// A file that is shorter than it says.
    #[error("{} ends after {found} of {expected} bytes: it was cut", path.display())]
    Truncated {
        /// The file.
        path: PathBuf,
        /// Bytes that it has.
        found: u64,
        /// Bytes that it should have.
        expected: u64,
    },
    /// The state of a device.
    #[error(transparent)]
    Save(#[from] SaveError),
    /// Bytes that are not those that were written.
    #[error("{} is damaged: the checksum of its bytes from {offset:#x} on is another", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Where, in bytes.
        offset: u64,
    },
    /// A state that contradicts itself, or what it is loaded with.
    #[error("the state says {0}")]
    Contradiction(String),
    /// Its values are none that this Coppice could have written.
    #[error("{} cannot be understood", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: serde_json::Error,
    },
    /// A disk that is not as it was.
    #[error(
        "{device}: its disk was {saved} when the snapshot was made, and is {found}; give the disk as it was then"
    )]
    OtherDisk {
        /// `drive ID` or `pmem ID`.
        device: String,
        /// What it was.
        saved: String,
        /// What it is.
        found: String,
    },
    /// A device that the snapshot does not have.
    #[error("the snapshot has no drive and no pmem device {0}")]
    NoDrive(String),
    /// The disk of a device does not close.
    #[error("{device}")]
    Disk {
        /// `drive ID` or `pmem ID`.
        device: String,
        /// Why.
        source: storage::DiskError,
    },
    /// Not all that the guest has written to memory that is a disk gets there.
    #[error("pmem {pmem}: what the guest wrote cannot be brought to its disk")]
    Writeback {
        /// `id`.
        pmem: String,
        /// Why not.
        source: WritebackError,
    },
    /// What the guest has written to a pmem device in mode `cow` is not found.
    #[error("pmem {pmem}: what the guest wrote cannot be saved")]
    OwnPages {
        /// `id`.
        pmem: String,
        /// Why not.
        source: OwnPagesError,
    },
    /// What the guest had written to a pmem device in mode `cow` is in a file, and memory is not from files.
    #[error(
        "pmem {0}: what the guest wrote to it is in the memory file, and a page-fault handler gives RAM alone: load with mem_backend File"
    )]
    NotOfHandler(String),
    /// A device that cannot be saved.
    #[error("{0}")]
    Unsupported(String),
    /// A file of a snapshot cannot be there.
    #[error("{field}: {} {taken}; name another file", path.display())]
    Target {
        /// The field that names it.
        field: &'static str,
        /// The file.
        path: PathBuf,
        /// What it is.
        taken: &'static str,
    },
    /// A difference to nothing.
    #[error(
        "a Diff needs a snapshot before it: set track_dirty_pages, and make a Full one first, or load one"
    )]
    NoBase,
    /// A difference to what a page-fault handler gives, of which nobody knows where it is from.
    #[error(
        "a Diff needs a snapshot that is a file, and a page-fault handler gives this guest its memory: load with track_dirty_pages, and make a Full one first"
    )]
    NoFileBelow,
    /// Memory that a page-fault handler gives.
    #[error(transparent)]
    Uffd(#[from] UffdError),
    /// What KVM holds.
    #[error(transparent)]
    State(#[from] StateError),
    /// Where the guest's memory is cannot be told, or not be changed.
    #[error("guest memory")]
    Memory(#[source] io::Error),
}

impl SnapshotError {
    pub(super) fn file(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::File {
            operation,
            path: path.to_owned(),
            source,
        }
    }
}
