//! What a user asks of snapshots, in the shape of Firecracker's REST bodies.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// The body of `PUT /snapshot/create`, as Firecracker has it.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateSnapshot {
    /// What of the memory is saved.
    #[serde(default)]
    pub snapshot_type: SnapshotType,
    /// The state file, which is written, or replaced as a whole.
    #[schema(value_type = String)]
    pub snapshot_path: PathBuf,
    /// The memory file, which is written, or replaced as a whole. Guests that were loaded from the old one keep that.
    #[schema(value_type = String)]
    pub mem_file_path: PathBuf,
    /// Whether a guest with `track_dirty_pages` goes on from the memory file of its first snapshot, so that the next
    /// can be a difference to it: not where the file is going to be moved. Not in Firecracker.
    #[serde(default = "yes")]
    pub is_base: bool,
}

/// What of the memory a snapshot holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, utoipa::ToSchema)]
pub enum SnapshotType {
    /// All of it.
    #[default]
    Full,
    /// What is not as it was in the snapshot before, which has to stay where it is.
    Diff,
}

/// The body of `PUT /snapshot/load`: Firecracker's, and what Coppice knows beyond it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LoadSnapshot {
    /// The state file.
    pub snapshot_path: PathBuf,
    /// The memory file; the one that the state names where absent.
    #[serde(default)]
    pub mem_backend: Option<MemoryBackend>,
    /// The older name of a file as `mem_backend`.
    #[serde(default)]
    pub mem_file_path: Option<PathBuf>,
    /// Lets the guest run at once.
    #[serde(default)]
    pub resume_vm: bool,
    /// Whether the guest can be saved as a difference. It always can, but for one whose memory a page-fault handler
    /// gives: that goes on from the memory file of its first Full snapshot then.
    #[serde(default, alias = "enable_diff_snapshots")]
    pub track_dirty_pages: bool,
    /// Compares the checksums of all memory before the guest runs, if it is in files. Not in Firecracker.
    #[serde(default = "yes")]
    pub verify_memory: bool,
    /// Disks that are elsewhere now. Not in Firecracker.
    #[serde(default)]
    pub drives: Vec<DriveOverride>,
    /// Another socket for the vsock device, or another identifier.
    #[serde(default)]
    pub vsock_override: Option<VsockOverride>,
}

impl LoadSnapshot {
    /// Of a state file, with the memory and the disks where they were.
    pub fn new(snapshot_path: PathBuf) -> Self {
        Self {
            snapshot_path,
            mem_backend: None,
            mem_file_path: None,
            resume_vm: false,
            track_dirty_pages: false,
            verify_memory: true,
            drives: Vec::new(),
            vsock_override: None,
        }
    }
}

/// What of a vsock device is another than it was.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockOverride {
    /// The socket; the one that the guest had where absent.
    #[serde(default)]
    pub uds_path: Option<PathBuf>,
    /// The guest's context identifier, which it asks for again when it is loaded; the one that it had where absent. Not
    /// in Firecracker.
    #[serde(default)]
    pub guest_cid: Option<u32>,
}

const fn yes() -> bool {
    true
}

/// Where guest memory comes from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryBackend {
    /// The file, or the socket.
    pub backend_path: PathBuf,
    /// What it is.
    pub backend_type: MemoryBackendType,
}

/// Kinds of [`MemoryBackend`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum MemoryBackendType {
    /// A memory file, which is mapped.
    File,
    /// The socket of a process that gives the pages when they are touched.
    Uffd,
}

/// Another disk for a drive of a snapshot, or for a pmem device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DriveOverride {
    /// Of the drive; of the pmem device, where no drive has it.
    pub drive_id: String,
    /// The disk.
    pub path_on_host: PathBuf,
    /// The disk is made now, as a child of the one that the drive had, which nobody may write to any more: so that a
    /// snapshot can be loaded many times. Without, it is that disk, in another place.
    #[serde(default)]
    pub clone: bool,
}
