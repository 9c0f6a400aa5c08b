//! Disks as a guest's memory (virtio-pmem): the contents of a disk are mapped from its files, so that all guests of a
//! host share the pages that its page cache has of them.
//!
//! ```text
//! open: disk ── resolve_read ─> extents ── mmap ─> window ── memory slot ─> guest
//! flush:  guest ── dirty log ─> pages ── resolve_write, flush ─> disk
//! ```
//!
//! The mapping is private: a page that the guest writes becomes a copy of its own, whatever the mode. [`PmemMode`] says
//! what becomes of it. In `rw` the copy stays when its page is on the disk, so such a page is in memory twice as long
//! as the host's page cache keeps it. In `cow` it is nowhere else, and is saved with the guest.

mod map;
mod own_pages;
#[cfg(test)]
mod tests;
mod writeback;

use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use devices::bus::BusDevice;
use devices::virtio::Interrupt;
use devices::virtio::pmem::{Backing, MappingFigures, PmemConfig as DeviceConfig, VirtioPmem};
use memshare::{LostPage, PAGE_SIZE, SharedFile, Window};
use storage::{Disk, OpenError, OpenOptions, Parents};

use self::map::MappedDisk;
pub use self::map::{MapBudget, MapError};
pub use self::own_pages::OwnPagesError;
use self::writeback::Writeback;
pub use self::writeback::{DirtyPages, WritebackError};
use crate::bus_error::GuestRange;
use config::{PmemConfig, PmemMode};
use kvm::vm::{DirtyLog, Vm, VmError, WindowAccess};

/// Why a guest cannot have a pmem device.
#[derive(Debug, thiserror::Error)]
pub enum PmemError {
    /// The disk cannot be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The disk cannot be mapped.
    #[error("{}", path.display())]
    Map {
        /// Its file.
        path: PathBuf,
        /// Why not.
        source: MapError,
    },
    /// The guest has no room for it among its addresses.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// The host has no file descriptor left.
    #[error("cannot make the device")]
    Host(#[source] io::Error),
}

/// A pmem device of a guest, and the disk behind it.
pub struct Pmem {
    device: Arc<Mutex<VirtioPmem>>,
    memory: PmemMemory,
    writeback: Option<Arc<Writeback<DirtyLog>>>,
    guard: Option<Guard>,
}

/// A range that the guest may only read, and the device on the MMIO bus that takes its writes there.
pub struct Guard {
    /// First guest physical address.
    pub address: u64,
    /// Length in bytes.
    pub len: u64,
    /// Takes the writes.
    pub writes: Arc<Mutex<dyn BusDevice>>,
}

/// The memory of a pmem device, for the search for lost pages and for snapshots.
#[derive(Clone)]
pub struct PmemMemory {
    address: u64,
    disk: Arc<MappedDisk>,
    mode: PmemMode,
}

impl PmemMemory {
    /// Where it is.
    pub fn range(&self) -> GuestRange {
        GuestRange::new(self.address, self.disk.window())
    }

    /// The immutable files behind it: none where the guest's writes go to the files.
    pub fn immutable_files(&self) -> Vec<Arc<SharedFile>> {
        if self.mode.keeps() {
            Vec::new()
        } else {
            self.disk.files()
        }
    }

    /// The first page of a file that is lost.
    pub fn lost_page(&self) -> Option<LostPage> {
        let lost = self.disk.lost_page()?;
        Some(LostPage {
            address: self.address + lost.address,
            ..lost
        })
    }

    /// Whether the guest's writes stay in its memory and its snapshots, and never reach the disk.
    pub(crate) fn is_cow(&self) -> bool {
        self.mode == PmemMode::Cow
    }

    /// The memory itself.
    pub(crate) fn window(&self) -> &Window {
        self.disk.window()
    }

    /// Runs of pages that differ from the disk: offsets in bytes from the first, in order. The guest is paused.
    ///
    /// # Errors
    /// [`OwnPagesError`].
    pub(crate) fn own_pages(&self) -> Result<Vec<Range<u64>>, OwnPagesError> {
        self.disk.own_pages()
    }

    /// Maps pages of `file`, which is immutable, over the disk's.
    ///
    /// # Errors
    /// Where the range is outside the memory or not made of whole pages, and the host's error; then nothing is changed.
    pub(crate) fn map_over(
        &self,
        at: u64,
        len: u64,
        file: &Arc<SharedFile>,
        offset: u64,
    ) -> io::Result<()> {
        self.disk.map_over(at, len, file, offset)
    }

    /// How the disk is mapped.
    pub(crate) fn figures(&self) -> MappingFigures {
        self.disk.figures()
    }

    /// The memory of a raw disk in mode `cow`, without a guest.
    #[cfg(any(test, feature = "fuzzing"))]
    pub(crate) fn cow(disk: &std::path::Path) -> Self {
        let options = OpenOptions {
            read_only: true,
            format: Some(storage::Format::Raw),
            ..OpenOptions::default()
        };
        let disk = storage::open(disk, &options).expect("a raw disk");
        let disk = MappedDisk::of(&disk, &mut MapBudget::of_host(), &|_| true);
        Self {
            address: 0,
            disk: Arc::new(disk.expect("a disk that can be mapped")),
            mode: PmemMode::Cow,
        }
    }
}

impl Pmem {
    /// Opens and maps a disk, within the `budget` of mappings that all disks of the guest share, and places it among
    /// the guest's addresses. Files that `admits` refuses are copied.
    ///
    /// # Errors
    /// [`PmemError`].
    pub fn attach(
        config: &PmemConfig,
        vm: &mut Vm,
        interrupt: Arc<Interrupt>,
        budget: &mut MapBudget,
        admits: &dyn Fn(&Arc<File>) -> bool,
    ) -> Result<Self, PmemError> {
        let options = OpenOptions {
            read_only: !config.mode().keeps(),
            format: config.format.map(Into::into),
            parents: match &config.parents {
                Some(folder) => Parents::Within(folder.clone()),
                None => Parents::Anywhere,
            },
            ..OpenOptions::default()
        };
        let disk = storage::open(&config.path_on_host, &options)?;
        let disk = MappedDisk::of(&disk, budget, admits).map_err(|source| PmemError::Map {
            path: config.path_on_host.clone(),
            source,
        })?;
        let disk = Arc::new(disk);
        let mapping = disk.figures();
        if mapping.copied > 0 {
            tracing::warn!(
                pmem = %config.id,
                bytes = mapping.copied * PAGE_SIZE,
                "parts of the disk are no whole pages of its files: they were copied, and are shared with nobody"
            );
        }
        let access = match config.mode() {
            PmemMode::Ro => WindowAccess::Read,
            PmemMode::Cow => WindowAccess::Write,
            PmemMode::Rw => WindowAccess::LoggedWrite,
        };
        let size = disk.window().len();
        let placed = vm.add_window(disk.window().clone(), access)?;
        tracing::info!(
            pmem = %config.id,
            address = format_args!("{:#x}", placed.address),
            size,
            mappings = mapping.mappings,
            "pmem"
        );
        let writeback = placed
            .log
            .map(|log| Arc::new(Writeback::new(disk.clone(), log)));
        let device = DeviceConfig {
            start: placed.address,
            size,
            backing: writeback
                .clone()
                .map(|writeback| writeback as Arc<dyn Backing>),
            mapping,
        };
        let mut device = VirtioPmem::new(device, interrupt).map_err(PmemError::Host)?;
        device
            .update_limits(config.rate_limiter.unwrap_or_default().limits().into())
            .map_err(PmemError::Host)?;
        let guard = match config.mode() {
            PmemMode::Ro => {
                let dropped = DroppedWrites::new(config.id.clone());
                Some(Guard {
                    address: placed.address,
                    len: size,
                    writes: Arc::new(Mutex::new(dropped)),
                })
            }
            PmemMode::Cow | PmemMode::Rw => None,
        };
        Ok(Self {
            device: Arc::new(Mutex::new(device)),
            memory: PmemMemory {
                address: placed.address,
                disk,
                mode: config.mode(),
            },
            writeback,
            guard,
        })
    }

    /// The device.
    pub fn device(&self) -> &Arc<Mutex<VirtioPmem>> {
        &self.device
    }

    /// Its memory.
    pub fn memory(&self) -> &PmemMemory {
        &self.memory
    }

    /// The range that belongs on the MMIO bus, where the guest may only read.
    pub fn guard(&self) -> Option<&Guard> {
        self.guard.as_ref()
    }

    /// The disk.
    pub(crate) fn disk(&self) -> Arc<dyn Disk> {
        self.memory.disk.disk()
    }

    /// Makes durable what the guest has written, and replaces the disk by the child that `change` makes of it, which
    /// takes the guest's later writes. `None` where the guest's writes go to no disk.
    ///
    /// # Errors
    /// Where not all of it is on the disk, and those of `change`; then the disk stays.
    pub(crate) fn change_disk<E: From<WritebackError>>(
        &self,
        change: impl FnOnce(&Arc<dyn Disk>) -> Result<Arc<dyn Disk>, E>,
    ) -> Option<Result<(), E>> {
        let writeback = self.writeback.as_ref()?;
        Some(writeback.change_disk(change))
    }

    /// Makes durable what the guest has written. While no vCPU runs, that is all of it.
    ///
    /// # Errors
    /// Where a part of it is not on the disk.
    pub(crate) fn write_back(&self) -> Result<(), WritebackError> {
        match &self.writeback {
            Some(writeback) => writeback.write_back().map(drop),
            None => Ok(()),
        }
    }

    /// Makes durable what the guest has written, and closes the disk. No vCPU runs any more, and the device is reset.
    ///
    /// # Errors
    /// Where a part of it is not on the disk.
    pub fn close(&self) -> Result<(), WritebackError> {
        let written = self.write_back();
        let closed = self.memory.disk.close();
        written?;
        Ok(closed?)
    }
}

/// Drops what a guest writes to memory that it may only read: KVM hands such writes to the process
/// (`KVM_MEM_READONLY`).
struct DroppedWrites {
    id: String,
    has_warned: bool,
}

impl DroppedWrites {
    fn new(id: String) -> Self {
        Self {
            id,
            has_warned: false,
        }
    }
}

impl BusDevice for DroppedWrites {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        // KVM serves reads from the memory itself, so that none arrive here.
        data.fill(0xff);
    }

    fn write(&mut self, offset: u64, _data: &[u8]) {
        if !std::mem::replace(&mut self.has_warned, true) {
            tracing::warn!(
                pmem = %self.id,
                offset,
                "the guest writes to memory that it may only read; this and what follows is dropped"
            );
        }
    }
}
