//! Why a snapshot was not made, or not loaded.

use std::io;
use std::path::{Path, PathBuf};

use devices::lifecycle::SaveError;

use super::uffd::UffdError;
use super::version::VERSION;
use crate::pmem::{OwnPagesError, WritebackError};
use config::Sha256Digest;
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
        /// The host's error.
        source: io::Error,
    },
    /// The file is not the state of a snapshot.
    #[error("{} is not the state of a snapshot", .0.display())]
    NotAState(PathBuf),
    /// The file is not the one that was asked for.
    #[error(
        "{} has the SHA-256 {found}, and {expected} was asked for (state_sha256): it was changed or replaced; make the snapshot or template again, or load the file that has this digest",
        path.display()
    )]
    OtherState {
        /// The file.
        path: PathBuf,
        /// The digest that was asked for.
        expected: Sha256Digest,
        /// The digest of the file.
        found: Sha256Digest,
    },
    /// The state was written by another version of Coppice, whose format differs.
    #[error("{} is of version {version}, and this Coppice reads version {}; load it with the one that made it", path.display(), VERSION)]
    Version {
        /// The file.
        path: PathBuf,
        /// Its version.
        version: u32,
    },
    /// A file is shorter than the state says.
    #[error("{} ends after {found} of {expected} bytes: it was cut", path.display())]
    Truncated {
        /// The file.
        path: PathBuf,
        /// Bytes that it has.
        found: u64,
        /// Bytes that it should have.
        expected: u64,
    },
    /// The state of a device cannot be saved.
    #[error(transparent)]
    Save(#[from] SaveError),
    /// Bytes of a file differ from those that were written.
    #[error("{} is damaged: the checksum of its bytes from {offset:#x} on is another", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Where, in bytes.
        offset: u64,
    },
    /// The state contradicts itself, or the guest that it is loaded into.
    #[error("the state says {0}")]
    Contradiction(String),
    /// The state is JSON that this version of Coppice cannot have written.
    #[error("{} cannot be understood", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: serde_json::Error,
    },
    /// A disk has changed since the snapshot, or is another.
    #[error(
        "{device}: its disk was {saved} when the snapshot was made, and is {found}; give the disk as it was then"
    )]
    OtherDisk {
        /// `drive ID` or `pmem ID`.
        device: String,
        /// Its identity when the snapshot was made.
        saved: String,
        /// Its identity now.
        found: String,
    },
    /// The request names a device that the snapshot does not have.
    #[error("the snapshot has no drive and no pmem device {0}")]
    NoDrive(String),
    /// The disk of a device cannot be closed.
    #[error("{device}")]
    Disk {
        /// `drive ID` or `pmem ID`.
        device: String,
        /// Why.
        source: storage::DiskError,
    },
    /// Not all that the guest has written to a pmem device can be written to its disk.
    #[error("pmem {pmem}: what the guest wrote cannot be brought to its disk")]
    Writeback {
        /// `id`.
        pmem: String,
        /// Why not.
        source: WritebackError,
    },
    /// The pages that the guest has written on a pmem device in mode `cow` cannot be found.
    #[error("pmem {pmem}: what the guest wrote cannot be saved")]
    OwnPages {
        /// `id`.
        pmem: String,
        /// Why not.
        source: OwnPagesError,
    },
    /// What the guest had written to a pmem device in mode `cow` is in the memory file, and the guest is to get its
    /// memory from a page-fault handler.
    #[error(
        "pmem {0}: what the guest wrote to it is in the memory file, and a page-fault handler gives RAM alone: load with mem_backend File"
    )]
    OwnPagesWithHandler(String),
    /// The guest has something that cannot be saved or loaded.
    #[error("{0}")]
    Unsupported(String),
    /// A file of the snapshot cannot have the name that was given.
    #[error("{field}: {} {taken}; name another file", path.display())]
    Target {
        /// The field that names it.
        field: &'static str,
        /// The file.
        path: PathBuf,
        /// Why it cannot be there.
        taken: &'static str,
    },
    /// A difference has no snapshot before it.
    #[error(
        "a Diff needs a snapshot before it: set track_dirty_pages, and make a Full one first, or load one"
    )]
    NoBase,
    /// A difference to the memory that a page-fault handler provides, which is no file that this process knows.
    #[error(
        "a Diff needs a snapshot that is a file, and a page-fault handler gives this guest its memory: load with track_dirty_pages, and make a Full one first"
    )]
    NoFileBelow,
    /// The page-fault handler cannot provide the memory.
    #[error(transparent)]
    Uffd(#[from] UffdError),
    /// The state of KVM cannot be read or written.
    #[error(transparent)]
    State(#[from] StateError),
    /// The host refuses to read or to change the mappings of guest memory.
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
