//! Requests for snapshots, in the form of Firecracker's REST bodies.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::digest::Sha256Digest;
use super::machine::HugePageConfig;

/// The body of `PUT /snapshot/create`: Firecracker's, with an additional field.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateSnapshot {
    /// Which pages of the memory are saved.
    #[serde(default)]
    pub snapshot_type: SnapshotType,
    /// The state file. It is made, or replaced as a whole.
    #[schema(value_type = String)]
    pub snapshot_path: PathBuf,
    /// The memory file. It is made, or replaced as a whole. Guests that were loaded from the old one keep that.
    #[schema(value_type = String)]
    pub mem_file_path: PathBuf,
    /// Whether a guest with `track_dirty_pages` maps the memory file of its first snapshot, so that the next one can be
    /// a difference to it. Set it to `false` where the file will be moved. Not in Firecracker.
    #[serde(default = "yes")]
    pub is_base: bool,
}

/// Which pages of the memory a snapshot has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, utoipa::ToSchema)]
pub enum SnapshotType {
    /// All of it.
    #[default]
    Full,
    /// The pages that differ from the snapshot before. That snapshot's files must stay where they are.
    Diff,
}

/// The body of `PUT /snapshot/load`: Firecracker's, with additional fields.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
#[allow(
    clippy::struct_excessive_bools,
    reason = "the fields are those of Firecracker's body"
)]
pub struct LoadSnapshot {
    /// The state file.
    #[schema(value_type = String)]
    pub snapshot_path: PathBuf,
    /// The SHA-256 of the state file, in hexadecimal digits: another file is refused before it is read any further. Not
    /// in Firecracker.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, pattern = "^[0-9a-fA-F]{64}$")]
    pub state_sha256: Option<Sha256Digest>,
    /// The memory file; the one that the state names where absent.
    #[serde(default)]
    pub mem_backend: Option<MemoryBackend>,
    /// The memory file, by the older field of Firecracker's API; otherwise use `mem_backend`.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub mem_file_path: Option<PathBuf>,
    /// The memory files below that one, the lowest first, where the snapshot is a difference; those that the state
    /// names where empty. Not in Firecracker.
    #[serde(default)]
    #[schema(value_type = Vec<String>)]
    pub lower_mem_files: Vec<PathBuf>,
    /// Lets the guest run at once.
    #[serde(default)]
    pub resume_vm: bool,
    /// Whether the guest can be saved as a difference. A guest from files always can. A guest whose memory a page-fault
    /// handler provides can after its first Full snapshot, whose memory file it maps then.
    #[serde(default, alias = "enable_diff_snapshots")]
    pub track_dirty_pages: bool,
    /// Compares the checksums of all memory before the guest runs, if it is in files. Not in Firecracker.
    #[serde(default = "yes")]
    pub verify_memory: bool,
    /// Disks whose files have moved, or that are to be cloned. Not in Firecracker.
    #[serde(default)]
    pub drives: Vec<DriveOverride>,
    /// Network interfaces whose taps are others than those that they had.
    #[serde(default)]
    pub network_overrides: Vec<NetworkOverride>,
    /// Whether the guest's clocks go on as if it had run meanwhile, so that its wall clock is right; otherwise they go
    /// on where they were saved. Firecracker's field, whose default is `false`.
    #[serde(default = "yes")]
    pub clock_realtime: bool,
    /// How RAM is backed.
    #[serde(default)]
    pub huge_pages: LoadHugePages,
    /// Another socket for the vsock device, or another CID.
    #[serde(default)]
    pub vsock_override: Option<VsockOverride>,
}

impl LoadSnapshot {
    /// The load of a state file, with the memory and the disks where they were.
    pub fn new(snapshot_path: PathBuf) -> Self {
        Self {
            snapshot_path,
            state_sha256: None,
            mem_backend: None,
            mem_file_path: None,
            lower_mem_files: Vec::new(),
            resume_vm: false,
            track_dirty_pages: false,
            verify_memory: true,
            drives: Vec::new(),
            network_overrides: Vec::new(),
            clock_realtime: true,
            huge_pages: LoadHugePages::Snapshot,
            vsock_override: None,
        }
    }
}

/// Another tap for a network interface of a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NetworkOverride {
    /// The interface.
    pub iface_id: String,
    /// Its tap.
    pub host_dev_name: String,
}

/// Fields of the vsock device that differ from the saved ones.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VsockOverride {
    /// The socket; the one that the guest had where absent.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub uds_path: Option<PathBuf>,
    /// The guest's context identifier, which it reads again after the load; the one that it had where absent. Not in
    /// Firecracker.
    #[serde(default)]
    pub guest_cid: Option<u32>,
}

/// How the RAM of a loaded guest is backed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub enum LoadHugePages {
    /// As it was when the guest was saved.
    #[default]
    Snapshot,
    /// Pages of 4 KiB.
    None,
    /// Huge pages where the host gives them.
    Transparent,
    /// Huge pages of 2 MiB that the host has reserved: the memory file is copied to them.
    #[serde(rename = "2M")]
    Hugetlbfs2M,
}

impl LoadHugePages {
    /// The one of the two that counts.
    pub fn or(self, saved: HugePageConfig) -> HugePageConfig {
        match self {
            Self::Snapshot => saved,
            Self::None => HugePageConfig::None,
            Self::Transparent => HugePageConfig::Transparent,
            Self::Hugetlbfs2M => HugePageConfig::Hugetlbfs2M,
        }
    }
}

const fn yes() -> bool {
    true
}

/// Where guest memory comes from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MemoryBackend {
    /// The file, or the socket.
    #[schema(value_type = String)]
    pub backend_path: PathBuf,
    /// The kind of the backend.
    pub backend_type: MemoryBackendType,
}

/// Kinds of [`MemoryBackend`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub enum MemoryBackendType {
    /// A memory file, which is mapped.
    File,
    /// The socket of a page-fault handler, which provides the pages when they are touched.
    Uffd,
}

/// Another disk for a drive of a snapshot, or for a pmem device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DriveOverride {
    /// The id of the drive, or of the pmem device where no drive has it.
    pub drive_id: String,
    /// The disk.
    #[schema(value_type = String)]
    pub path_on_host: PathBuf,
    /// Whether the disk is made now, as a child of the one that the drive had, so that a snapshot can be loaded many
    /// times. Nobody may write to the parent any more. Otherwise the file is the disk that the drive had, in another
    /// place.
    #[serde(default)]
    pub clone: bool,
}
