//! Snapshots of a guest: made while it is paused, and loaded by another process, now or later, once or many times.
//!
//! ```text
//! paused guest ── create ─┬─> state file: configuration, states of KVM and of the devices, identity of each
//!                         │   disk, checksums of memory
//!                         └─> memory file: RAM, with holes; or the delta to the last one (Diff); and the pages of
//!                             pmem devices that no disk has
//! state + memory files ── load ──> a paused guest, whose RAM is the memory file, mapped private
//! ```
//!
//! A load reads the state and maps the memory: how long it takes does not depend on the size of RAM, unless checksums
//! are to be compared. All guests that are loaded from a memory file share its pages, through the host's page cache,
//! until they write to them; that is what a clone is. A page-fault handler can give the memory instead, see
//! [`PageServer`]. The disks are no part of a snapshot: each has to be as it was, or, for a clone, gets a child that is
//! the guest's own.

mod disks;
mod error;
mod file;
#[cfg(feature = "fuzzing")]
pub mod fuzzing;
mod memory;
mod own_pages;
mod runs;
mod state;
mod uffd;
mod version;

use std::fs::File;
use std::path::{Path, PathBuf};

use memshare::{PAGE_SIZE, SharedMemory};
use storage::vhdx::{ChildOptions, Vhdx};

use crate::disk::open_disk;
use crate::pmem::PmemMemory;
use config::{CreateSnapshot, DriveOverride, LoadSnapshot, MemoryBackendType, SnapshotType};
use config::{DriveConfig, DriveFormat, PmemConfig, VmConfig};
use host::report::chain;
use kvm::vm::ClockOnLoad;

pub use disks::DiskIdentity;
pub(crate) use disks::{DiskOf, DriveState};
pub use error::SnapshotError;
pub(crate) use file::NewFile;
pub use file::version_of;
pub(crate) use memory::GivenLayers;
pub use memory::{Layer, MemoryState, OpenMemory};
pub use own_pages::{AllOwnPages, OwnPages};
pub use runs::SavedRun;
pub(crate) use state::GuestState;
pub use uffd::{PageServer, Served, UffdError};
pub use version::VERSION;

use memory::LayerFile;
use runs::Blocks;

/// Writes the memory of a guest that is paused, and the pages of its pmem devices that no disk has. A difference is to
/// `base`, the layers that the guest was loaded from or last saved to. Returns the layers of the whole, and the new
/// file, which gets its name together with the file of the state.
///
/// # Errors
/// `NoBase`, `Target`, `File`, `Memory`, `OwnPages`; then there is no new file.
pub(crate) fn write_memory<'a>(
    memory: &SharedMemory,
    pmem: impl Iterator<Item = (&'a str, &'a PmemMemory)>,
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
    let (mut blocks, bytes) = (Blocks::new()?, memory.bytes());
    let layer = memory::write(memory, &new, diff, &mut blocks)?;
    let own_pages = AllOwnPages::write(pmem, &new, bytes, &mut blocks)?;
    new.finish(own_pages.end(bytes)?)?;
    let state = MemoryState {
        bytes,
        layers: below.into_iter().chain([layer]).collect(),
        own_pages,
    };
    Ok((state, new))
}

/// Writes the state of a guest, and then gives it and the memory file their names. All that a full disk could make fail
/// is done before, so that older files of these names are complete until they are replaced.
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
            tracing::warn!(error = %chain(&error), path = %at.display(), "a memory file without a state is left over");
        }
    })
}

/// Where the memory of a snapshot that is being loaded comes from.
pub(crate) enum MemorySource {
    Files(OpenMemory),
    Handler(PageServer),
}

/// The files of a snapshot that whoever loads it has named. They are open, and nothing of them has been read: a process
/// that has rights to lose opens them, and reads them when it has none left.
pub struct SnapshotFiles {
    request: LoadSnapshot,
    state: File,
    memory: GivenMemory,
}

enum GivenMemory {
    Files(GivenLayers),
    Handler(PageServer),
}

impl SnapshotFiles {
    /// Opens the files.
    ///
    /// # Errors
    /// `File`, `Unsupported`, `Uffd`.
    pub fn open(request: &LoadSnapshot) -> Result<Self, SnapshotError> {
        let path = &request.snapshot_path;
        let state = File::open(path).map_err(SnapshotError::file("open", path))?;
        let lower = request.lower_mem_files.iter();
        let lower = lower.map(|path| LayerFile::open(path));
        let lower = lower.collect::<Result<_, _>>()?;
        let files = |top: Option<&PathBuf>| -> Result<_, SnapshotError> {
            let top = top.map(|path| LayerFile::open(path)).transpose()?;
            Ok(GivenMemory::Files(GivenLayers { lower, top }))
        };
        let memory = match (&request.mem_backend, &request.mem_file_path) {
            (Some(backend), None) => match backend.backend_type {
                MemoryBackendType::File => files(Some(&backend.backend_path))?,
                MemoryBackendType::Uffd => {
                    GivenMemory::Handler(PageServer::connect(&backend.backend_path)?)
                }
            },
            (None, path) => files(path.as_ref())?,
            (Some(_), Some(_)) => {
                let what = "mem_backend and mem_file_path are both given: leave out one";
                return Err(SnapshotError::Unsupported(what.into()));
            }
        };
        Ok(Self {
            request: request.clone(),
            state,
            memory,
        })
    }

    /// Reads and checks the snapshot, opens the files that the state names and nobody has given, and creates the disks
    /// of a clone.
    ///
    /// # Errors
    /// [`SnapshotError`]; then no disk was created.
    pub fn read(self) -> Result<Loading, SnapshotError> {
        let Self {
            request,
            state,
            memory,
        } = self;
        let mut state: GuestState =
            file::read(state, &request.snapshot_path, request.state_sha256)?;
        if let Some(other) = &request.vsock_override {
            let Some(vsock) = &mut state.config.vsock else {
                let what = "vsock_override: the guest has no vsock device";
                return Err(SnapshotError::Unsupported(what.into()));
            };
            vsock.uds_path = other.uds_path.clone().or(vsock.uds_path.take());
            vsock.guest_cid = other.guest_cid.or(vsock.guest_cid);
        }
        for other in &request.network_overrides {
            let mut interfaces = state.config.network_interfaces.iter_mut();
            let interface = interfaces.find(|interface| interface.iface_id == other.iface_id);
            let Some(interface) = interface else {
                let id = &other.iface_id;
                let what = format!("network_overrides: the guest has no interface {id:.80?}");
                return Err(SnapshotError::Unsupported(what));
            };
            // An address that was made up belongs to the guest, whatever its tap is.
            interface.guest_mac = Some(interface.mac());
            interface.host_dev_name = Some(other.host_dev_name.clone());
            (interface.network, interface.publish) = (None, Vec::new());
        }
        let machine = &mut state.config.machine_config;
        machine.track_dirty_pages |= request.track_dirty_pages;
        machine.huge_pages = request.huge_pages.or(machine.huge_pages);
        let memory = match memory {
            GivenMemory::Files(given) => {
                let files = state.memory.clone().open(given, request.verify_memory)?;
                MemorySource::Files(files)
            }
            GivenMemory::Handler(handler) => {
                if let Some(pmem) = state.memory.own_pages.first() {
                    return Err(SnapshotError::OwnPagesWithHandler(pmem.to_owned()));
                }
                MemorySource::Handler(handler)
            }
        };
        let clock = if request.clock_realtime {
            ClockOnLoad::Follows
        } else {
            ClockOnLoad::Kept
        };
        let mut loading = Loading {
            state,
            memory,
            clock,
            made: Vec::new(),
        };
        for drive in &request.drives {
            loading.override_disk(drive)?;
        }
        Ok(loading)
    }
}

/// A snapshot that is being loaded.
pub struct Loading {
    pub(crate) state: GuestState,
    memory: MemorySource,
    /// Where the guest's clocks go on.
    pub(crate) clock: ClockOnLoad,
    /// Disks that were created for it, which are removed unless the guest starts with them.
    made: Vec<PathBuf>,
}

impl Loading {
    /// The configuration that the guest was started with.
    pub fn config(&self) -> &VmConfig {
        &self.state.config
    }

    /// Maps the saved pages into RAM, or copies them where its pages of `page` bytes are larger than a file's, and into
    /// pmem devices in mode `cow`, or has the page-fault handler provide them. Nobody has touched that memory yet. If
    /// the handler ends before it has provided all pages, `on_lost` is called with the reason for the guest's end.
    ///
    /// # Errors
    /// Those of [`OpenMemory::map`] and [`OpenMemory::map_over`], and `Uffd`.
    pub(crate) fn give_memory<'a>(
        &self,
        (memory, page): (&SharedMemory, u64),
        pmem: impl Iterator<Item = (&'a str, &'a PmemMemory)> + Clone,
        on_lost: impl Fn(String) + Send + 'static,
    ) -> Result<Option<Served>, SnapshotError> {
        match &self.memory {
            MemorySource::Files(files) => {
                if page > PAGE_SIZE {
                    files.copy_to(memory, page)?;
                } else {
                    files.map(memory)?;
                }
                files.map_over(memory, pmem)?;
                Ok(None)
            }
            MemorySource::Handler(handler) => {
                let bytes = self.state.memory.bytes;
                Ok(Some(handler.serve(
                    (memory, page),
                    bytes,
                    Box::new(on_lost),
                )?))
            }
        }
    }

    /// The files that later differences are to, where the memory is from files.
    pub(crate) fn base(&self) -> Option<&MemoryState> {
        match &self.memory {
            MemorySource::Files(files) => Some(files.state()),
            MemorySource::Handler(_) => None,
        }
    }

    fn override_disk(&mut self, request: &DriveOverride) -> Result<(), SnapshotError> {
        let id = &request.drive_id;
        let GuestState { config, .. } = &mut self.state;
        let drive = config.drives.iter_mut().find(|d| d.drive_id == *id);
        let pmem = config.pmem.iter_mut().find(|pmem| pmem.id == *id);
        let (device, path, format, mut below) = match (drive, pmem) {
            (Some(drive), _) => {
                let below = DriveConfig {
                    is_read_only: true,
                    ..drive.clone()
                };
                let DriveConfig {
                    path_on_host,
                    format,
                    ..
                } = drive;
                (DiskOf::Drive(id), path_on_host, format, below)
            }
            (None, Some(pmem)) => {
                let below = DriveConfig {
                    is_read_only: true,
                    format: pmem.format,
                    parents: pmem.parents.clone(),
                    ..DriveConfig::new(id.clone(), pmem.path_on_host.clone())
                };
                let PmemConfig {
                    path_on_host,
                    format,
                    ..
                } = pmem;
                (DiskOf::Pmem(id), path_on_host, format, below)
            }
            (None, None) => return Err(SnapshotError::NoDrive(id.clone())),
        };
        path.clone_from(&request.path_on_host);
        if request.clone {
            // What is cloned is a VHDX, and so is its child.
            *format = Some(DriveFormat::Vhdx);
            below.format = *format;
            let failed = |error: &dyn std::error::Error| {
                SnapshotError::Unsupported(format!("{device}: {}", chain(error)))
            };
            let opened = open_disk(&below).map_err(|error| failed(&error))?;
            self.state.check_disk(device, &opened)?;
            let new = &request.path_on_host;
            Vhdx::create_child(new, &below.path_on_host, &ChildOptions::default())
                .map_err(|error| failed(&error))?;
            self.made.push(new.clone());
            // The new child is the guest's own, so it has no saved identity.
            self.state.forget_disk(device);
        }
        Ok(())
    }

    /// Checks that the disk of a device is the one that the guest had when it was saved.
    pub(crate) fn check_disk(
        &self,
        device: DiskOf<'_>,
        disk: &std::sync::Arc<dyn storage::Disk>,
    ) -> Result<(), SnapshotError> {
        self.state.check_disk(device, disk)
    }

    /// Keeps the disks that were created, as the guest has them now.
    pub(crate) fn keep_disks(&mut self) {
        self.made.clear();
    }
}

impl Drop for Loading {
    fn drop(&mut self) {
        for path in &self.made {
            if let Err(error) = std::fs::remove_file(path) {
                tracing::warn!(error = %chain(&error), path = %path.display(), "a disk is left over");
            }
        }
    }
}
