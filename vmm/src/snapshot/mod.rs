//! Snapshots of a guest: made while it is paused, and loaded by another process, now or later, once or many times.
//!
//! ```text
//! paused guest ── create ──> state file: configuration, KVM's state, devices', identity of each disk, checksums of memory
//!                       └──> memory file: RAM, with holes; or the news since the last one (Diff)
//! state + memory files ── load ──> a paused guest, whose RAM is the memory file, mapped private
//! ```
//!
//! A load reads the state and maps the memory: how long it takes does not depend on the size of RAM, unless checksums are to be compared. All
//! guests that are loaded from a memory file share its pages, through the host's page cache, until they write to them; that is what a clone is.
//! The disks are no part of a snapshot: each has to be as it was, or, for a clone, gets a child that is the guest's own.

mod disks;
mod error;
mod file;
mod memory;

use std::path::{Path, PathBuf};

use memshare::SharedMemory;
use serde::{Deserialize, Serialize};
use storage::vhdx::{ChildOptions, Vhdx};

use crate::config::{DriveConfig, VmConfig};
use crate::machine::{DevicesState, open_disk};
use crate::vm::{VcpuState, VmState};

pub use disks::DiskIdentity;
pub use error::SnapshotError;
pub(crate) use file::NewFile;
pub use file::VERSION;
pub use memory::{Layer, MemoryState, OpenMemory, SavedRun};

/// The body of `PUT /snapshot/create`, as Firecracker has it.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CreateSnapshot {
    /// What of the memory is saved.
    #[serde(default)]
    pub snapshot_type: SnapshotType,
    /// The state file, which is written, or replaced as a whole.
    pub snapshot_path: PathBuf,
    /// The memory file, which is written, or replaced as a whole. Guests that were loaded from the old one keep that.
    pub mem_file_path: PathBuf,
    /// Whether a guest with `track_dirty_pages` goes on from the memory file of its first snapshot, so that the next can be a difference to it: not where
    /// the file is going to be moved. Not in Firecracker.
    #[serde(default = "yes")]
    pub is_base: bool,
}

/// What of the memory a snapshot holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub enum SnapshotType {
    /// All of it.
    #[default]
    Full,
    /// What is not as it was in the snapshot before, which has to stay where it is.
    Diff,
}

/// The body of `PUT /snapshot/load`: Firecracker's, and what Coppice knows beyond it.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
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
    /// Whether the guest can be saved as a difference. It always can.
    #[serde(default, alias = "enable_diff_snapshots")]
    pub track_dirty_pages: bool,
    /// Compares the checksums of all memory before the guest runs. Not in Firecracker.
    #[serde(default = "yes")]
    pub verify_memory: bool,
    /// Disks that are elsewhere now. Not in Firecracker.
    #[serde(default)]
    pub drives: Vec<DriveOverride>,
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
        }
    }
}

const fn yes() -> bool {
    true
}

/// Where guest memory comes from.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryBackend {
    /// The file.
    pub backend_path: PathBuf,
    /// What it is.
    pub backend_type: MemoryBackendType,
}

/// Kinds of [`MemoryBackend`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub enum MemoryBackendType {
    /// A memory file, which is mapped.
    File,
}

/// Another disk for a drive of a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DriveOverride {
    /// Of the drive.
    pub drive_id: String,
    /// The disk.
    pub path_on_host: PathBuf,
    /// The disk is made now, as a child of the one that the drive had, which nobody may write to any more: so that a snapshot can be loaded many
    /// times. Without, it is that disk, in another place.
    #[serde(default)]
    pub clone: bool,
}

/// All that is known of a guest that stands still, but for its memory.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct GuestState {
    /// What it was started with, and what has become of it.
    pub config: VmConfig,
    pub vm: VmState,
    pub vcpus: Vec<VcpuState>,
    pub devices: DevicesState,
    pub drives: Vec<DriveState>,
    pub memory: MemoryState,
}

/// The disk of a drive.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct DriveState {
    pub drive_id: String,
    pub disk: DiskIdentity,
}

/// Writes the memory of a guest that stands still, which is laid upon `base`, the layers that it was loaded from or last saved to. Returns the layers
/// of the whole, and the file, which gets its name with that of the state.
///
/// # Errors
/// `NoBase`, `Target`, `File`, `Memory`; then there is no new file.
pub(crate) fn write_memory(
    memory: &SharedMemory,
    request: &CreateSnapshot,
    base: Option<&MemoryState>,
) -> Result<(MemoryState, NewFile), SnapshotError> {
    let diff = match request.snapshot_type {
        SnapshotType::Full => false,
        SnapshotType::Diff => true,
    };
    let below = match (diff, base) {
        (true, None) => return Err(SnapshotError::NoBase),
        (true, Some(base)) => base.layers.clone(),
        (false, _) => Vec::new(),
    };
    let new = NewFile::create(&request.mem_file_path)?;
    if below.iter().any(|layer| layer.path == new.path()) {
        return Err(SnapshotError::Target {
            field: "mem_file_path",
            path: new.path().to_owned(),
            taken: "is what the Diff is to, which has to stay",
        });
    }
    let (layer, new) = memory::write(memory, new, diff)?;
    let state = MemoryState {
        bytes: memory.bytes(),
        layers: below.into_iter().chain([layer]).collect(),
    };
    Ok((state, new))
}

/// Writes the state of a guest, and gives it and the memory file their names: when all that a full disk could hinder is done, and older files are
/// whole as long.
///
/// # Errors
/// `Target`, `File`; then there is no new file.
pub(crate) fn write_state(
    path: &Path,
    state: &GuestState,
    memory: NewFile,
) -> Result<(), SnapshotError> {
    let new = file::write(path, state)?;
    if new.path() == memory.path() {
        return Err(SnapshotError::Target {
            field: "snapshot_path",
            path: new.path().to_owned(),
            taken: "is mem_file_path, too",
        });
    }
    let at = memory.path().to_owned();
    let is_new = memory.name()?;
    new.name().map(drop).inspect_err(|_| {
        if is_new && let Err(error) = std::fs::remove_file(&at) {
            tracing::warn!(%error, path = %at.display(), "a memory file without a state is left over");
        }
    })
}

/// A snapshot that is being loaded.
pub struct Loading {
    pub(crate) state: GuestState,
    pub(crate) memory: OpenMemory,
    /// Disks that were made for it, until it is certain that the guest has them.
    made: Vec<PathBuf>,
}

impl Loading {
    /// Reads and checks a snapshot, and makes the disks of a clone.
    ///
    /// # Errors
    /// [`SnapshotError`]; then no disk was made.
    pub fn read(request: &LoadSnapshot) -> Result<Self, SnapshotError> {
        let state: GuestState = file::read(&request.snapshot_path)?;
        let top = match (&request.mem_backend, &request.mem_file_path) {
            (Some(backend), None) => Some(&*backend.backend_path),
            (None, path) => path.as_deref(),
            (Some(_), Some(_)) => {
                let what = "mem_backend and mem_file_path are both given: leave out one";
                return Err(SnapshotError::Unsupported(what.into()));
            }
        };
        let memory = state.memory.clone().open(top, request.verify_memory)?;
        let mut loading = Self {
            state,
            memory,
            made: Vec::new(),
        };
        for drive in &request.drives {
            loading.move_drive(drive)?;
        }
        Ok(loading)
    }

    /// Disks that were made for it.
    pub fn made(&self) -> &[PathBuf] {
        &self.made
    }

    /// What the guest was started with.
    pub fn config(&self) -> &VmConfig {
        &self.state.config
    }

    fn move_drive(&mut self, request: &DriveOverride) -> Result<(), SnapshotError> {
        let id = &request.drive_id;
        let GuestState { config, drives, .. } = &mut self.state;
        let drive = config.drives.iter_mut().find(|d| d.drive_id == *id);
        let saved = drives.iter().position(|d| d.drive_id == *id);
        let (Some(drive), Some(saved)) = (drive, saved) else {
            return Err(SnapshotError::NoDrive(id.clone()));
        };
        let new = request.path_on_host.clone();
        if request.clone {
            let parent = std::mem::replace(&mut drive.path_on_host, new.clone());
            let below = DriveConfig {
                path_on_host: parent.clone(),
                is_read_only: true,
                ..drive.clone()
            };
            let opened = open_disk(&below)
                .map_err(|error| SnapshotError::Unsupported(format!("drive {id}: {error}")))?;
            if let Some(drive) = drives.get(saved) {
                drive.check(&opened)?;
            }
            Vhdx::create_child(&new, &parent, &ChildOptions::default())
                .map_err(|error| SnapshotError::Unsupported(format!("drive {id}: {error}")))?;
            self.made.push(new);
            // It is the guest's own, and has just been made.
            drives.remove(saved);
        } else {
            drive.path_on_host = new;
        }
        Ok(())
    }

    /// Checks that a drive's disk is the one that the guest had.
    pub(crate) fn check_drive(
        &self,
        id: &str,
        disk: &std::sync::Arc<dyn storage::Disk>,
    ) -> Result<(), SnapshotError> {
        let saved = self.state.drives.iter().find(|drive| drive.drive_id == id);
        saved.map_or(Ok(()), |saved| saved.check(disk))
    }

    /// The guest has its disks: they stay.
    pub(crate) fn keep_disks(&mut self) {
        self.made.clear();
    }
}

impl Drop for Loading {
    fn drop(&mut self) {
        for path in &self.made {
            if let Err(error) = std::fs::remove_file(path) {
                tracing::warn!(%error, path = %path.display(), "a disk is left over");
            }
        }
    }
}

impl DriveState {
    /// Notes the disk of a drive on which nothing is under way; what is written to it from now on makes it another.
    pub(crate) fn of(
        id: &str,
        disk: &std::sync::Arc<dyn storage::Disk>,
    ) -> Result<Self, SnapshotError> {
        let failed = |source| SnapshotError::Disk {
            drive: id.to_owned(),
            source,
        };
        // The next write announces itself, by a new DataWriteGuid.
        disk.close().map_err(failed)?;
        let identity = DiskIdentity::of(disk);
        let disk = identity.ok_or_else(|| {
            SnapshotError::Unsupported(format!("drive {id}: its disk cannot be told from others"))
        })?;
        Ok(Self {
            drive_id: id.to_owned(),
            disk,
        })
    }

    fn check(&self, disk: &std::sync::Arc<dyn storage::Disk>) -> Result<(), SnapshotError> {
        let found = DiskIdentity::of(disk);
        if found.as_ref() == Some(&self.disk) {
            return Ok(());
        }
        Err(SnapshotError::Drive {
            drive: self.drive_id.clone(),
            saved: self.disk.to_string(),
            found: found.map_or_else(|| "unknown".to_owned(), |found| found.to_string()),
        })
    }
}
