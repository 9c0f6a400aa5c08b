//! A guest: its VM, its devices, and their life from start to end.
//!
//! ```text
//! Machine::start ──> running <── pause / resume ──> paused ── shutdown ──> disks closed
//!                       └── GuestEnd, told once through `Surroundings::on_end`
//! ```
//!
//! The vCPUs run on threads of their own; all devices are served by the event loop that `start` adds them to. A machine
//! itself is called by one thread at a time.

mod attach;
mod cmdline;
mod domain;
mod drive_job;
mod error;
mod lost_pages;
mod pages;
mod sharing;
mod snapshot;
mod start;
mod surroundings;
mod taps;

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use devices::device_list::{DeviceList, DeviceMetrics};
use devices::legacy::{I8042, SerialConsole};
use devices::lock;
use devices::rate_limiter::LimitsUpdate;
use devices::virtio::balloon::VirtioBalloon;
use devices::virtio::block::VirtioBlock;
use devices::virtio::net::VirtioNet;
use memshare::SharedMemory;

use crate::disk::open_disk;
use crate::pmem::Pmem;
use crate::snapshot::{MemoryState, Served};
use config::{DriveConfig, NetworkInterfaceUpdate, RateLimiterConfig};
pub use drive_job::{DriveJob, DriveParent, DriveTask, JobState, JobStatus, commit_child};
pub use error::{DriveError, MachineError, StartError};
pub use pages::{Address, FilePage, FilePageReport, PageNameError, PageReport};
pub use sharing::SharingReport;
pub use surroundings::{NetworkHost, OnEnd, Subscriber, Surroundings, VsockHost};
pub use taps::{InterfaceTapError, TapFault, Taps};

use attach::{HostPart, Pc};
use sharing::Sharing;

use kvm::vm::{ExitKind, Vcpus};

/// The counters of a machine's devices and vCPUs.
#[derive(Debug)]
pub struct MachineMetrics {
    /// Of the devices that have some.
    pub devices: Vec<DeviceMetrics>,
    /// How often the vCPUs have left the guest, by what for.
    pub exits: Vec<(ExitKind, u64)>,
    /// When the guest told that it has booted, where it did.
    pub booted: Option<Instant>,
}

/// A started guest.
pub struct Machine {
    vcpus: Vcpus,
    devices: DeviceList,
    /// What is behind the devices on the host.
    host_parts: Vec<Box<dyn HostPart>>,
    /// The last job of each drive.
    jobs: BTreeMap<String, Arc<DriveJob>>,
    pmem: BTreeMap<String, Arc<Pmem>>,
    pc: Pc,
    sharing: Sharing,
    /// Who gives the memory, where that is another process; until vCPUs and devices have stopped.
    served: Option<Served>,
    /// The files that later differences are to, where there are any.
    base: Option<MemoryState>,
}

/// How often an ending machine looks whether a job has stopped.
const JOB_POLL: std::time::Duration = std::time::Duration::from_millis(5);

fn changed(drive: &str, source: DriveError) -> MachineError {
    MachineError::Change {
        drive: drive.to_owned(),
        source,
    }
}

fn limits(device: &str, source: std::io::Error) -> MachineError {
    MachineError::Limits {
        device: device.to_owned(),
        source,
    }
}

impl Machine {
    /// The host's side of the serial console.
    pub fn console(&self) -> &SerialConsole {
        &self.pc.console
    }

    /// Takes the vCPUs out of the guest, and lets the devices finish what they have begun.
    pub fn pause(&mut self) {
        self.vcpus.pause();
        self.devices.pause();
    }

    /// Goes on after a pause.
    pub fn resume(&mut self) {
        self.devices.resume();
        self.vcpus.resume();
    }

    /// Types Ctrl-Alt-Del, at which a guest reboots as it is set up to.
    ///
    /// # Errors
    /// `KeyboardBusy`.
    pub fn send_ctrl_alt_del(&mut self) -> Result<(), MachineError> {
        let keyboard = self.devices.get::<I8042>("");
        if keyboard.is_some_and(|keyboard| lock(&keyboard).type_ctrl_alt_del()) {
            Ok(())
        } else {
            Err(MachineError::KeyboardBusy)
        }
    }

    /// Gives a drive another file; the guest is told of the new size. Where it is the file that a raw disk has already,
    /// it is the size alone.
    ///
    /// # Errors
    /// `NoDrive`, `Drive`, `Replacement`; the drive then keeps its file.
    pub fn replace_drive(&mut self, config: &DriveConfig) -> Result<(), MachineError> {
        let id = &config.drive_id;
        let present = lock(&*self.idle_drive(id)?).disk().clone();
        let disk = match storage::remeasure(&present, &config.path_on_host) {
            Ok(Some(disk)) => Ok(disk),
            Ok(None) => open_disk(config),
            Err(error) => Err(error),
        };
        let disk = disk.map_err(|source| MachineError::Drive {
            drive: id.clone(),
            source,
        })?;
        lock(&*self.drive(id)?)
            .replace_disk(disk)
            .map_err(|source| MachineError::Replacement {
                drive: id.clone(),
                source,
            })
    }

    /// Changes what a drive does at most.
    ///
    /// # Errors
    /// `NoDrive`, `Limits`; the drive then keeps its limits.
    pub fn limit_drive(&self, id: &str, update: LimitsUpdate) -> Result<(), MachineError> {
        lock(&*self.drive(id)?)
            .update_limits(update)
            .map_err(|source| limits(id, source))
    }

    /// Changes what a pmem device does at most.
    ///
    /// # Errors
    /// `NoPmem`, `Limits`; the device then keeps its limits.
    pub fn limit_pmem(&self, id: &str, update: LimitsUpdate) -> Result<(), MachineError> {
        lock(self.pmem(id)?.device())
            .update_limits(update)
            .map_err(|source| limits(id, source))
    }

    fn pmem(&self, id: &str) -> Result<&Arc<Pmem>, MachineError> {
        let pmem = self.pmem.get(id);
        pmem.ok_or_else(|| MachineError::NoPmem(id.to_owned()))
    }

    fn drive(&self, id: &str) -> Result<Arc<Mutex<VirtioBlock>>, MachineError> {
        let drive = self.devices.get(id);
        drive.ok_or_else(|| MachineError::NoDrive(id.to_owned()))
    }

    /// Changes the limits of a network interface.
    ///
    /// # Errors
    /// `NoInterface`, `Limits`.
    pub fn limit_interface(&self, update: &NetworkInterfaceUpdate) -> Result<(), MachineError> {
        let id = &update.iface_id;
        let interface = self.devices.get::<VirtioNet>(id);
        let interface = interface.ok_or_else(|| MachineError::NoInterface(id.clone()))?;
        let of = |limiter: Option<RateLimiterConfig>| limiter.unwrap_or_default().update();
        let limited =
            lock(&interface).limit(of(update.rx_rate_limiter), of(update.tx_rate_limiter));
        limited.map_err(|source| limits(id, source))
    }

    /// A drive without a job that is not over.
    fn idle_drive(&self, id: &str) -> Result<Arc<Mutex<VirtioBlock>>, MachineError> {
        let drive = self.drive(id)?;
        match self.jobs.get(id) {
            Some(job) if !job.is_over() => Err(changed(id, DriveError::Busy(job.name()))),
            Some(_) | None => Ok(drive),
        }
    }

    /// Lets the disk of a drive, whose file is at `path`, go on in a new file at `new`, and keeps the old one as it is.
    ///
    /// # Errors
    /// `NoDrive`, `Change`; the drive then keeps its file.
    pub fn snapshot_drive(
        &mut self,
        id: &str,
        path: &Path,
        new: &Path,
    ) -> Result<(), MachineError> {
        lock(&*self.idle_drive(id)?)
            .change_disk(|disk| -> Result<Arc<dyn storage::Disk>, DriveError> {
                Ok(drive_job::vhdx(disk)?.snapshot(path, new)?)
            })
            .map_err(|source| changed(id, source))
    }

    /// Lets the disk of a pmem device, whose file is at `path`, go on in a new file at `new`, and keeps the old one as
    /// it is, with all that the guest has written.
    ///
    /// # Errors
    /// `NoPmem`, `ChangePmem`; the device then keeps its file.
    pub fn snapshot_pmem(&self, id: &str, path: &Path, new: &Path) -> Result<(), MachineError> {
        let changed =
            self.pmem(id)?
                .change_disk(|disk| -> Result<Arc<dyn storage::Disk>, DriveError> {
                    Ok(drive_job::vhdx(disk)?.snapshot(path, new)?)
                });
        changed
            .unwrap_or(Err(DriveError::NotWritten))
            .map_err(|source| MachineError::ChangePmem {
                pmem: id.to_owned(),
                source: Box::new(source),
            })
    }

    /// Makes the disk of a drive larger, and tells the guest.
    ///
    /// # Errors
    /// `NoDrive`, `Change`; the drive then has its old size.
    pub fn resize_drive(&mut self, id: &str, size: u64) -> Result<(), MachineError> {
        let drive = self.idle_drive(id)?;
        let resized = || -> Result<(), DriveError> {
            // While the device serves the guest; then it looks at the size anew.
            let disk = drive_job::vhdx(lock(&drive).disk())?;
            disk.resize(size, false)?;
            lock(&drive).change_disk(|disk| Ok(Arc::clone(disk)))
        };
        resized().map_err(|source| changed(id, source))
    }

    /// What the disk of a drive, whose file is at `path`, stands on.
    ///
    /// # Errors
    /// `NoDrive`, `Change` where it has no parent.
    pub fn drive_parent(&self, id: &str, path: &Path) -> Result<DriveParent, MachineError> {
        let disk = drive_job::vhdx(lock(&*self.drive(id)?).disk());
        disk.and_then(|disk| DriveParent::of(&disk, path))
            .map_err(|source| changed(id, source))
    }

    /// Starts a job on the disk of a drive.
    ///
    /// # Errors
    /// `NoDrive`, `Change`.
    pub fn start_job(&mut self, id: &str, task: DriveTask) -> Result<(), MachineError> {
        let drive = self.idle_drive(id)?;
        let started =
            DriveJob::start(&drive, task, &self.sharing).map_err(|source| changed(id, source))?;
        self.jobs.insert(id.to_owned(), started);
        Ok(())
    }

    /// The last job of a drive.
    ///
    /// # Errors
    /// `NoDrive`, `Change` where there was none.
    pub fn job(&self, id: &str) -> Result<Arc<DriveJob>, MachineError> {
        self.drive(id)?;
        let job = self.jobs.get(id).cloned();
        job.ok_or_else(|| changed(id, DriveError::NoJob))
    }

    /// What of the guest's memory is shared.
    ///
    /// # Errors
    /// `Sharing`.
    pub fn sharing(&self) -> Result<SharingReport, MachineError> {
        self.sharing.report().map_err(MachineError::Sharing)
    }

    /// What backs a page of the guest.
    ///
    /// # Errors
    /// `NotRam`.
    pub fn page(&self, address: Address) -> Result<PageReport, MachineError> {
        PageReport::of(self.sharing.memory(), address).ok_or(MachineError::NotRam(address.0))
    }

    /// The pages of the guest that a page of a file backs, or may come to back.
    pub fn pages_of(&self, page: FilePage) -> FilePageReport {
        FilePageReport::of(self.sharing.memory(), page)
    }

    /// The guest's memory, and what of it is shared.
    pub fn shared_memory(&self) -> &Arc<SharedMemory> {
        self.sharing.memory()
    }

    /// Guest physical addresses of the kernel, where it is mapped from a file.
    pub fn kernel(&self) -> Option<&Range<u64>> {
        self.sharing.kernel()
    }

    /// The balloon, where there is one.
    pub fn balloon(&self) -> Option<Arc<Mutex<VirtioBalloon>>> {
        self.devices.get(attach::BALLOON)
    }

    /// The counters of the devices and of the vCPUs.
    pub fn metrics(&self) -> MachineMetrics {
        MachineMetrics {
            devices: self.devices.metrics(),
            exits: self.vcpus.exits(),
            booted: self.pc.boot_mark.get().copied(),
        }
    }

    /// Stops the vCPUs for good and closes the disks, each complete and clean.
    pub fn shutdown(mut self) {
        self.pc.console.hang_up();
        self.sharing.stop();
        self.vcpus.stop();
        for job in self.jobs.values() {
            job.cancel();
        }
        while self.jobs.values().any(|job| !job.is_over()) {
            // They stop at the next block.
            std::thread::sleep(JOB_POLL);
        }
        self.devices.reset();
        for part in &self.host_parts {
            part.close();
        }
    }
}
