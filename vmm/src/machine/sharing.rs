//! What of a guest's memory is shared: joins the memory manager to the vCPUs and devices of a machine.

use std::sync::{Arc, Mutex, TryLockError};

use devices::virtio::VirtioDevice;
use devices::virtio::block::DriveSharing;
use memshare::{IsBusy, Limits, Merger, Refusal, ShareMode, SharedMemory, StandStill};
use serde::Serialize;
use std::sync::atomic::{AtomicU64, Ordering};
use vm_memory::GuestAddress;

use super::{StartError, host};
use crate::config::{DriveConfig, SharingConfig};
use crate::vm::{Brake, HugePages, Vm};

/// Brings vCPUs and devices to a standstill.
struct Machinery {
    brake: Brake,
    devices: Vec<Arc<Mutex<dyn VirtioDevice>>>,
}

impl StandStill for Machinery {
    fn hold(&self, work: &mut dyn FnMut(&IsBusy<'_>)) -> bool {
        let Some(_held) = self.brake.hold() else {
            return false;
        };
        let mut devices = Vec::with_capacity(self.devices.len());
        for device in &self.devices {
            // A device that is being used may go on being used for long, and its user may wait for the table.
            match device.try_lock() {
                Ok(device) => devices.push(device),
                Err(TryLockError::Poisoned(device)) => devices.push(device.into_inner()),
                Err(TryLockError::WouldBlock) => return false,
            }
        }
        work(&|address, len| {
            devices
                .iter()
                .any(|device| device.is_writing(GuestAddress(address), len))
        });
        true
    }
}

/// The sharing of a guest that is being put together.
pub(super) struct Plan {
    mode: ShareMode,
    place_from: Option<u64>,
    memory: Arc<SharedMemory>,
}

impl Plan {
    pub(super) fn new(vm: &Vm, config: &SharingConfig, huge_pages: HugePages) -> Self {
        let huge_pages = match huge_pages {
            HugePages::Never => false,
            HugePages::HostPolicy => true,
        };
        let limits = Limits::of_host(config.cpu_percent, huge_pages);
        Self {
            mode: config.mode.into(),
            place_from: config.place_kib.map(|kib| u64::from(kib) << 10),
            memory: Arc::new(vm.share(limits)),
        }
    }

    /// The memory, where kernel and initrd are to be mapped.
    pub(super) fn at_boot(&self) -> Option<&SharedMemory> {
        (self.mode >= ShareMode::Boot).then_some(&*self.memory)
    }

    /// How the reads of a drive are shared.
    pub(super) fn of_drive(&self, drive: &DriveConfig) -> Option<Arc<DriveSharing>> {
        let mode = drive
            .share
            .map_or(self.mode, |share| self.mode.min(share.into()));
        (mode >= ShareMode::Read).then(|| {
            Arc::new(DriveSharing {
                memory: self.memory.clone(),
                place_from: self.place_from,
            })
        })
    }

    /// Begins to share, with the guest's vCPUs and devices.
    pub(super) fn start(
        self,
        brake: Brake,
        devices: Vec<Arc<Mutex<dyn VirtioDevice>>>,
    ) -> Result<Sharing, StartError> {
        let still: Arc<dyn StandStill> = Arc::new(Machinery { brake, devices });
        let merger = (self.mode >= ShareMode::Read)
            .then(|| Merger::start(self.memory.clone(), still.clone()))
            .transpose()
            .map_err(host("thread that shares memory"))?;
        Ok(Sharing {
            mode: self.mode,
            memory: self.memory,
            still,
            merger,
        })
    }
}

/// The sharing of a started guest.
pub(super) struct Sharing {
    mode: ShareMode,
    memory: Arc<SharedMemory>,
    still: Arc<dyn StandStill>,
    /// Ends before anything that it holds still.
    merger: Option<Merger>,
}

impl Sharing {
    /// Ends the merger.
    pub(super) fn stop(&mut self) {
        self.merger = None;
    }

    /// What is shared now.
    pub(super) fn report(&self) -> std::io::Result<SharingReport> {
        self.memory.refresh();
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let stats = self.memory.stats();
        let usage = self.memory.usage()?;
        let candidates = self.memory.candidates();
        let refused = Refusal::NAMES.map(|(why, name)| (name, stats.refused(why)));
        let microseconds = |nanoseconds: &AtomicU64| get(nanoseconds) / 1000;
        Ok(SharingReport {
            mode: self.mode.name(),
            private_pages: usage.private,
            shared_pages: usage.shared,
            absent_pages: usage.absent,
            saved_bytes: usage.shared * memshare::PAGE_SIZE,
            runs: self.memory.mapped().len(),
            candidate_pages: candidates.iter().map(|run| run.pages).sum(),
            mapped_pages: get(&stats.booted),
            merged_pages: get(&stats.merged),
            placed_pages: get(&stats.placed),
            zero_pages: get(&stats.zeroed),
            copied_pages: get(&stats.copied),
            noted_pages: get(&stats.noted),
            refused_pages: refused.into_iter().collect(),
            given_back_bytes: get(&stats.given_back),
            holds: get(&stats.holds),
            held_microseconds: microseconds(&stats.held_nanoseconds),
            longest_hold_microseconds: microseconds(&stats.longest_hold_nanoseconds),
            merger_cpu_microseconds: microseconds(&stats.cpu_nanoseconds),
        })
    }
}

/// What `GET /vm/sharing` answers. Pages are of 4 KiB.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct SharingReport {
    /// What is shared: `off`, `boot`, `read` or `all`.
    pub mode: &'static str,
    /// Pages of RAM that are the guest's own.
    pub private_pages: u64,
    /// Pages of RAM that are files' pages, in the host's page cache once for all guests.
    pub shared_pages: u64,
    /// Pages of RAM that take nothing from the host.
    pub absent_pages: u64,
    /// What the guest would hold more without the shared pages.
    pub saved_bytes: u64,
    /// Runs of pages that are mapped from files.
    pub runs: usize,
    /// Pages that may be copies of a file's, and are to be compared.
    pub candidate_pages: u64,
    /// Pages mapped at boot, in total.
    pub mapped_pages: u64,
    /// Pages that were compared and exchanged, in total.
    pub merged_pages: u64,
    /// Pages that were put in place by a read, in total.
    pub placed_pages: u64,
    /// Pages of zeros that were read, and that take no memory, in total.
    pub zero_pages: u64,
    /// Pages that were a file's until the guest wrote to them, in total, as far as is known.
    pub copied_pages: u64,
    /// Pages that were read as copies, in total.
    pub noted_pages: u64,
    /// Pages that were not shared, by reason, in total.
    pub refused_pages: std::collections::BTreeMap<&'static str, u64>,
    /// Bytes that the guest gave back, in total.
    pub given_back_bytes: u64,
    /// Times that the guest was held for an exchange.
    pub holds: u64,
    /// How long it was held in total.
    pub held_microseconds: u64,
    /// How long it was held at once, at most.
    pub longest_hold_microseconds: u64,
    /// CPU time of the merger.
    pub merger_cpu_microseconds: u64,
}
