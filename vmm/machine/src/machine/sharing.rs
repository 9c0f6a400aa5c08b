//! The sharing of a guest's memory: joins the memory manager to the vCPUs and devices of a machine.

use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, TryLockError};
use std::time::Duration;

use devices::virtio::VirtioDevice;
use devices::virtio::block::DriveSharing;
use memshare::{
    FileIdentity, IsBusy, Limits, Merger, PAGE_SIZE, PageState, Refusal, Run, ShareMode,
    SharedMemory, StandStill, data_range,
};
use serde::Serialize;
use vm_memory::GuestAddress;

use super::domain::SharingDomain;
use super::error::{StartError, host};
use super::lost_pages::LostPages;
use super::surroundings::OnEnd;
use crate::bus_error::BusErrorWatch;
use crate::pmem::Pmem;
use crate::reference::{Key, Size, WarmRequest, Warmer, Warming};
use config::{DriveConfig, VmConfig};
use host::heap;
use host::procfs;
use host::report::chain;
use kvm::boot::{self, BootSource, MappedKernel};
use kvm::vm::{self, HugePages, VcpuHolder, Vm, VmError};

/// How often a hold of the guest is tried where there has to be one, and the pause between two attempts.
const HOLD_ATTEMPTS: u32 = 1000;
const HOLD_PAUSE: Duration = Duration::from_millis(5);
/// Enough for a thread that waits for a process and opens a file.
const WARM_STACK_SIZE: usize = 64 << 10;

/// The vCPUs and devices that are brought to a standstill for an exchange of pages.
struct VcpusAndDevices {
    holder: VcpuHolder,
    devices: Vec<Arc<Mutex<dyn VirtioDevice>>>,
}

impl StandStill for VcpusAndDevices {
    fn cpu_time(&self) -> Duration {
        self.holder.cpu_time()
    }

    fn scans_done(&self) {
        heap::give_back();
    }

    fn hold(&self, work: &mut dyn FnMut(&IsBusy<'_>)) -> bool {
        let Some(_held) = self.holder.hold() else {
            return false;
        };
        let mut devices = Vec::with_capacity(self.devices.len());
        for device in &self.devices {
            // A device that is in use may be in use for long, and whoever uses it may wait for the table of pages,
            // which the caller has locked: so a hold does not wait for it.
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

/// The sharing of a guest that is being built.
pub(super) struct Plan {
    mode: ShareMode,
    place_from: Option<u64>,
    memory: Arc<SharedMemory>,
    lost_pages: Arc<LostPages>,
    watch: Option<BusErrorWatch>,
}

impl Plan {
    /// Makes the plan. Where files are mapped into the guest's memory, lost pages are watched for from now on.
    pub(super) fn new(
        vm: &Vm,
        config: &VmConfig,
        pmem: &[(String, Arc<Pmem>)],
        on_end: OnEnd,
        boots: bool,
    ) -> Result<Self, StartError> {
        let huge_pages = match config.machine_config.huge_pages.into() {
            HugePages::Never => false,
            HugePages::HostPolicy | HugePages::Hugetlbfs => true,
        };
        let mode = config.share_mode();
        let config = &config.sharing;
        if mode < config.mode {
            tracing::info!(
                "the guest shares none of its RAM, as machine-config.huge_pages is 2M; sharing.mode has no effect"
            );
        }
        let limits = Limits {
            // A guest that is loaded gave back its pages of zeros in the process that it was booted in.
            zeros: mode == ShareMode::All && boots,
            base: mode == ShareMode::All && !boots,
            ..Limits::of_host(config.cpu_percent, huge_pages)
        };
        let memory = Arc::new(vm.share(limits));
        let domain = SharingDomain::of(config);
        memory
            .files()
            .admit_by(Box::new(move |file| domain.admits(file)));
        let windows = pmem.iter().map(|(_, pmem)| pmem.memory().clone()).collect();
        let lost_pages = LostPages::new(memory.clone(), windows, on_end);
        let watch = (mode > ShareMode::Off || !pmem.is_empty())
            .then(|| lost_pages.watch())
            .transpose()
            .map_err(host("handler of SIGBUS"))?;
        Ok(Self {
            mode,
            place_from: config.place_kib.map(|kib| u64::from(kib) << 10),
            memory,
            lost_pages,
            watch,
        })
    }

    /// What handles lost pages.
    pub(super) fn lost_pages(&self) -> &Arc<LostPages> {
        &self.lost_pages
    }

    /// Whether everything is shared that can be.
    pub(super) fn is_all(&self) -> bool {
        self.mode == ShareMode::All
    }

    /// The memory.
    pub(super) fn memory(&self) -> &Arc<SharedMemory> {
        &self.memory
    }

    /// The memory, where kernel and initrd are to be mapped at boot.
    pub(super) fn at_boot(&self) -> Option<&SharedMemory> {
        (self.mode >= ShareMode::Boot).then_some(&*self.memory)
    }

    /// Has the files shared that the guest will unpack of its initrd, where everything is shared.
    pub(super) fn share_initrd(&self, source: &BootSource) {
        let Some(initrd) = source.initrd.as_ref().filter(|_| self.is_all()) else {
            return;
        };
        let files = boot::initrd_files(initrd, source.domain.as_deref());
        let added = files.map_err(std::io::Error::other).and_then(|files| {
            files.map_or(Ok(()), |files| self.memory.add_unpacked(&Arc::new(files)))
        });
        if let Err(error) = added {
            tracing::warn!(error = %chain(&error), initrd = %initrd.display(), "what the guest unpacks of its initrd is not shared");
        }
    }

    /// How the reads of a drive are shared; `None` where they are not.
    pub(super) fn of_drive(&self, drive: &DriveConfig) -> Option<Arc<DriveSharing>> {
        let mode = drive.share.map_or(self.mode, |share| self.mode.min(share));
        (mode >= ShareMode::Read).then(|| {
            Arc::new(DriveSharing {
                memory: self.memory.clone(),
                place_from: self.place_from,
            })
        })
    }

    /// The reference image that the kernel is to be compared with, where there is to be one. If it does not exist,
    /// `warm` is asked to make it; otherwise `warm` is dismissed.
    pub(super) fn reference(
        &self,
        kernel: Option<MappedFrom>,
        warm: Option<Warmer>,
    ) -> Option<(Range<u64>, Option<Reference>)> {
        let of_kernel = |kernel: MappedFrom| {
            let addresses = kernel.mapped.addresses.clone();
            let image = kernel.image().map_err(std::io::Error::other);
            let reference = image.and_then(|image| {
                kernel.copy_ahead(&image, &self.memory);
                self.is_all()
                    .then(|| kernel.reference(image, warm.as_ref()))
                    .transpose()
            });
            let reference = reference.unwrap_or_else(|error| {
                tracing::warn!(error = %chain(&error), "the kernel is not compared with a reference image");
                None
            });
            (addresses, reference)
        };
        let found = kernel.map(of_kernel);
        if let Some(warm) = warm {
            warm.dismiss();
        }
        found
    }

    /// Begins to share. `holder` and `devices` are the vCPUs and devices of the guest, which are held for an exchange.
    pub(super) fn start(
        self,
        holder: VcpuHolder,
        devices: Vec<Arc<Mutex<dyn VirtioDevice>>>,
        kernel: Option<(Range<u64>, Option<Reference>)>,
    ) -> Result<Sharing, StartError> {
        let still: Arc<dyn StandStill> = Arc::new(VcpusAndDevices { holder, devices });
        // The merger also runs where nothing is merged, because it checks whether the mapped files have changed.
        let merger = self
            .watch
            .is_some()
            .then(|| Merger::start(self.memory.clone(), still.clone()))
            .transpose()
            .map_err(host("thread that shares memory"))?;
        let (addresses, reference) = kernel.unzip();
        if let Some(reference) = reference.flatten()
            && let Err(error) = reference.add(&self.memory)
        {
            tracing::warn!(error = %chain(&error), "the kernel is not compared with a reference image");
        }
        Ok(Sharing {
            kernel: addresses,
            mode: self.mode,
            memory: self.memory,
            still,
            merger,
            _watch: self.watch,
        })
    }
}

/// A kernel that is mapped, and what it was booted from: the key of its reference image.
pub(super) struct MappedFrom {
    mapped: MappedKernel,
    cmdline: String,
    size: Size,
    domain: Option<String>,
}

impl MappedFrom {
    pub(super) fn new(mapped: MappedKernel, source: BootSource, size: Size) -> Self {
        Self {
            mapped,
            cmdline: source.cmdline,
            size,
            domain: source.domain,
        }
    }

    /// Copies the pages that the kernel will write to while it boots, as its reference image shows them, where there is
    /// one.
    fn copy_ahead(&self, image: &Path, memory: &SharedMemory) {
        let copy = || {
            let image = File::open(image)?;
            let Range { start: mut at, end } = self.mapped.addresses;
            while let Some(data) = data_range(&image, at, end)? {
                memory.copy_ahead(data.start, data.end - data.start)?;
                at = data.end;
            }
            std::io::Result::Ok(())
        };
        if let Err(error) = copy() {
            tracing::debug!(error = %chain(&error), image = %image.display(), "pages of the kernel are copied one by one when it writes to them");
        }
    }

    /// The path of the kernel's reference image, whether it exists or not.
    fn image(&self) -> Result<PathBuf, VmError> {
        let cpu = vm::cpu_model(self.size.representative().vcpus)?;
        let key = Key {
            kernel: self.mapped.file.path(),
            cpu: &cpu,
            size: self.size,
            cmdline: &self.cmdline,
        };
        Ok(key.path())
    }

    /// The kernel's reference image: the one that exists, or one that `warm` begins to make.
    fn reference(self, image: PathBuf, warm: Option<&Warmer>) -> std::io::Result<Reference> {
        let warming = match warm {
            Some(warm) if !image.exists() => warm.request(&WarmRequest::new(
                self.mapped.file.path().to_owned(),
                &self.cmdline,
                self.size,
                self.domain,
            ))?,
            Some(_) | None => None,
        };
        Ok(Reference { image, warming })
    }
}

/// The reference image that a guest's own pages are compared with.
pub(super) struct Reference {
    image: PathBuf,
    /// The process that makes the image, where it does not exist yet.
    warming: Option<Warming>,
}

impl Reference {
    /// Has the guest compared with the image, as soon as it exists.
    fn add(self, memory: &Arc<SharedMemory>) -> std::io::Result<()> {
        let Self { image, warming } = self;
        let add = move |memory: &SharedMemory| memory.add_reference(&Arc::new(File::open(&image)?));
        let Some(warming) = warming else {
            return add(memory);
        };
        let memory = Arc::downgrade(memory);
        std::thread::Builder::new()
            .name("warm".into())
            .stack_size(WARM_STACK_SIZE)
            .spawn(move || {
                let made = warming.wait().and_then(|status| {
                    if status.success() {
                        Ok(())
                    } else {
                        Err(std::io::Error::other(format!(
                            "coppice image warm: {status}"
                        )))
                    }
                });
                let added =
                    made.and_then(|()| memory.upgrade().map_or(Ok(()), |memory| add(&memory)));
                if let Err(error) = added {
                    tracing::warn!(error = %chain(&error), "there is no reference image of the kernel");
                }
            })?;
        Ok(())
    }
}

/// The sharing of a started guest.
pub(super) struct Sharing {
    mode: ShareMode,
    kernel: Option<Range<u64>>,
    memory: Arc<SharedMemory>,
    still: Arc<dyn StandStill>,
    /// The merger, which ends before the devices and vCPUs that it holds do.
    merger: Option<Merger>,
    _watch: Option<BusErrorWatch>,
}

impl Sharing {
    /// The memory.
    pub(super) fn memory(&self) -> &Arc<SharedMemory> {
        &self.memory
    }

    /// The addresses of the kernel, if it is mapped.
    pub(super) fn kernel(&self) -> Option<&Range<u64>> {
        self.kernel.as_ref()
    }

    /// What takes files' pages from the guest. It outlives this value.
    pub(super) fn unsharing(&self) -> Unsharing {
        Unsharing {
            memory: self.memory.clone(),
            still: self.still.clone(),
        }
    }

    /// Ends the merger.
    pub(super) fn stop(&mut self) {
        self.merger = None;
    }

    /// What is shared now.
    pub(super) fn report(&self) -> std::io::Result<SharingReport> {
        self.memory.refresh();
        self.memory.look_at_files();
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let stats = self.memory.stats();
        let usage = self.memory.usage()?;
        let process = procfs::memory(std::process::id()).map_err(std::io::Error::other)?;
        let candidates = self.memory.candidates();
        let mapped = self.memory.mapped();
        let files_own = |run: &&Run| matches!(run.backing.state, PageState::Mapped { .. });
        let saved: u64 = mapped.iter().filter(files_own).map(|run| run.pages).sum();
        let refused = Refusal::NAMES.map(|(why, name)| (name, stats.refused(why)));
        let microseconds = |nanoseconds: &AtomicU64| get(nanoseconds) / 1000;
        Ok(SharingReport {
            mode: self.mode.name(),
            private_pages: usage.private,
            shared_pages: usage.shared,
            absent_pages: usage.absent,
            private_kib: process.private,
            shared_kib: process.shared,
            proportional_kib: process.proportional,
            saved_bytes: saved * PAGE_SIZE,
            runs: mapped.len(),
            candidate_pages: candidates.iter().map(|run| run.pages).sum(),
            mapped_pages: get(&stats.booted),
            merged_pages: get(&stats.merged),
            placed_pages: get(&stats.placed),
            zero_pages: get(&stats.zeroed),
            copied_pages: get(&stats.copied),
            noted_pages: get(&stats.noted),
            refused_pages: refused.into_iter().collect(),
            mostly_unaligned: stats.is_mostly_unaligned(),
            changed_files: get(&stats.changed_files),
            given_back_bytes: get(&stats.given_back),
            holds: get(&stats.holds),
            held_microseconds: microseconds(&stats.held_nanoseconds),
            longest_hold_microseconds: microseconds(&stats.longest_hold_nanoseconds),
            merger_cpu_microseconds: microseconds(&stats.cpu_nanoseconds),
        })
    }
}

/// Gives a guest pages of its own in place of files'.
pub(super) struct Unsharing {
    memory: Arc<SharedMemory>,
    still: Arc<dyn StandStill>,
}

impl Unsharing {
    /// Gives the guest copies of its own of every page of the files, so that the files can be written to.
    pub(super) fn unshare(&self, files: &[Arc<File>]) -> std::io::Result<()> {
        for file in files {
            let file = FileIdentity::of(file)?;
            for attempt in 1.. {
                match self.memory.unshare(file, &*self.still) {
                    // A device is in use at the moment.
                    Err(error)
                        if error.kind() == std::io::ErrorKind::WouldBlock
                            && attempt < HOLD_ATTEMPTS =>
                    {
                        std::thread::sleep(HOLD_PAUSE);
                    }
                    unshared => {
                        unshared?;
                        break;
                    }
                }
            }
        }
        Ok(())
    }
}

/// The response to `GET /vm/sharing`. Pages are of 4 KiB.
#[derive(Clone, Debug, Default, PartialEq, Serialize, utoipa::ToSchema)]
pub struct SharingReport {
    /// What is shared: `off`, `boot`, `read` or `all`.
    pub mode: &'static str,
    /// Pages of RAM that are the guest's own.
    pub private_pages: u64,
    /// Pages of RAM that are files' pages, in the host's page cache once for all guests.
    pub shared_pages: u64,
    /// Pages of RAM that take nothing from the host.
    pub absent_pages: u64,
    /// Memory of the process that is nobody else's.
    pub private_kib: u64,
    /// Memory of the process that others map as well.
    pub shared_kib: u64,
    /// Memory of the process, where what is shared is divided by those that map it.
    pub proportional_kib: u64,
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
    /// Pages of zeros that were read, or that the guest held, and that take no memory any more, in total.
    pub zero_pages: u64,
    /// Pages that were a file's until the guest wrote to them, in total, as far as is known.
    pub copied_pages: u64,
    /// Pages that were read as copies, in total.
    pub noted_pages: u64,
    /// Pages that were not shared, by reason, in total.
    pub refused_pages: std::collections::BTreeMap<&'static str, u64>,
    /// Whether more than half of at least 1,000 pages that were read from disks whose reads can be shared could not be,
    /// as they were unaligned: a file system has blocks of less than 4 KiB, or a partition does not begin at a multiple
    /// of 4 KiB. `coppice disk info` says which.
    pub mostly_unaligned: bool,
    /// Files that have changed under the guest although they were not to.
    pub changed_files: u64,
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
