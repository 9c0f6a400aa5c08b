//! What control needs of a guest.

use std::path::Path;
use std::sync::{Arc, Mutex};

use devices::rate_limiter::LimitsUpdate;
use devices::virtio::balloon::VirtioBalloon;

use config::{CreateSnapshot, DriveConfig, NetworkInterfaceUpdate, VmConfig};
use machine::snapshot::{Loading, SnapshotError};
use machine::{
    Address, DriveParent, DriveTask, FilePage, FilePageReport, JobStatus, Machine, MachineError,
    MachineMetrics, PageReport, SharingReport, StartError,
};

/// What a guest begins with.
pub enum Origin {
    /// Its kernel; it runs at once.
    Kernel,
    /// A snapshot; it stands still.
    Snapshot(Box<Loading>),
}

/// A started guest. It is [`Machine`], or a double in tests.
pub trait Guest: Send {
    /// Lets the vCPUs stand still; only called while they run.
    fn pause(&mut self);
    /// Lets the vCPUs run on; only called while they stand still.
    fn resume(&mut self);
    /// Types Ctrl-Alt-Del.
    ///
    /// # Errors
    /// See [`Machine::send_ctrl_alt_del`].
    fn send_ctrl_alt_del(&mut self) -> Result<(), MachineError>;
    /// Gives a drive another file.
    ///
    /// # Errors
    /// See [`Machine::replace_drive`].
    fn replace_drive(&mut self, drive: &DriveConfig) -> Result<(), MachineError>;
    /// Changes the limits of a network interface.
    ///
    /// # Errors
    /// See [`Machine::limit_interface`].
    fn limit_interface(&mut self, update: &NetworkInterfaceUpdate) -> Result<(), MachineError>;
    /// Changes what a drive does at most.
    ///
    /// # Errors
    /// See [`Machine::limit_drive`].
    fn limit_drive(&self, id: &str, update: LimitsUpdate) -> Result<(), MachineError>;
    /// Changes what a pmem device does at most.
    ///
    /// # Errors
    /// See [`Machine::limit_pmem`].
    fn limit_pmem(&self, id: &str, update: LimitsUpdate) -> Result<(), MachineError>;
    /// Lets a drive go on in a new file.
    ///
    /// # Errors
    /// See [`Machine::snapshot_drive`].
    fn snapshot_drive(&mut self, id: &str, path: &Path, new: &Path) -> Result<(), MachineError>;
    /// Lets a pmem device go on in a new file.
    ///
    /// # Errors
    /// See [`Machine::snapshot_pmem`].
    fn snapshot_pmem(&mut self, id: &str, path: &Path, new: &Path) -> Result<(), MachineError>;
    /// Makes a drive larger.
    ///
    /// # Errors
    /// See [`Machine::resize_drive`].
    fn resize_drive(&mut self, id: &str, size: u64) -> Result<(), MachineError>;
    /// What the disk of a drive stands on.
    ///
    /// # Errors
    /// See [`Machine::drive_parent`].
    fn drive_parent(&self, id: &str, path: &Path) -> Result<DriveParent, MachineError>;
    /// Starts a job on a drive.
    ///
    /// # Errors
    /// See [`Machine::start_job`].
    fn start_job(&mut self, id: &str, task: DriveTask) -> Result<(), MachineError>;
    /// The last job of a drive.
    ///
    /// # Errors
    /// See [`Machine::job`].
    fn job(&self, id: &str) -> Result<JobStatus, MachineError>;
    /// Asks the job of a drive to stop.
    ///
    /// # Errors
    /// See [`Machine::job`].
    fn cancel_job(&self, id: &str) -> Result<(), MachineError>;
    /// What of its memory is shared.
    ///
    /// # Errors
    /// See [`Machine::sharing`].
    fn sharing(&self) -> Result<SharingReport, MachineError>;
    /// What backs a page of it.
    ///
    /// # Errors
    /// See [`Machine::page`].
    fn page(&self, address: Address) -> Result<PageReport, MachineError>;
    /// Its pages that a page of a file backs.
    fn pages_of(&self, page: FilePage) -> FilePageReport;
    /// Its balloon, where it has one.
    fn balloon(&self) -> Option<Arc<Mutex<VirtioBalloon>>>;
    /// Saves it; only called while the vCPUs stand still. It was started with `config`.
    ///
    /// # Errors
    /// See [`Machine::snapshot`].
    fn snapshot(
        &mut self,
        request: &CreateSnapshot,
        config: &VmConfig,
    ) -> Result<(), SnapshotError>;
    /// The counters of its devices.
    fn metrics(&self) -> MachineMetrics;
    /// Stops it for good and closes its disks.
    fn shutdown(self: Box<Self>);
}

impl Guest for Machine {
    fn pause(&mut self) {
        Machine::pause(self);
    }

    fn resume(&mut self) {
        Machine::resume(self);
    }

    fn send_ctrl_alt_del(&mut self) -> Result<(), MachineError> {
        Machine::send_ctrl_alt_del(self)
    }

    fn replace_drive(&mut self, drive: &DriveConfig) -> Result<(), MachineError> {
        Machine::replace_drive(self, drive)
    }

    fn limit_interface(&mut self, update: &NetworkInterfaceUpdate) -> Result<(), MachineError> {
        Machine::limit_interface(self, update)
    }

    fn limit_drive(&self, id: &str, update: LimitsUpdate) -> Result<(), MachineError> {
        Machine::limit_drive(self, id, update)
    }

    fn limit_pmem(&self, id: &str, update: LimitsUpdate) -> Result<(), MachineError> {
        Machine::limit_pmem(self, id, update)
    }

    fn snapshot_drive(&mut self, id: &str, path: &Path, new: &Path) -> Result<(), MachineError> {
        Machine::snapshot_drive(self, id, path, new)
    }

    fn snapshot_pmem(&mut self, id: &str, path: &Path, new: &Path) -> Result<(), MachineError> {
        Machine::snapshot_pmem(self, id, path, new)
    }

    fn resize_drive(&mut self, id: &str, size: u64) -> Result<(), MachineError> {
        Machine::resize_drive(self, id, size)
    }

    fn drive_parent(&self, id: &str, path: &Path) -> Result<DriveParent, MachineError> {
        Machine::drive_parent(self, id, path)
    }

    fn start_job(&mut self, id: &str, task: DriveTask) -> Result<(), MachineError> {
        Machine::start_job(self, id, task)
    }

    fn job(&self, id: &str) -> Result<JobStatus, MachineError> {
        Ok(Machine::job(self, id)?.status())
    }

    fn cancel_job(&self, id: &str) -> Result<(), MachineError> {
        Machine::job(self, id)?.cancel();
        Ok(())
    }

    fn sharing(&self) -> Result<SharingReport, MachineError> {
        Machine::sharing(self)
    }

    fn page(&self, address: Address) -> Result<PageReport, MachineError> {
        Machine::page(self, address)
    }

    fn pages_of(&self, page: FilePage) -> FilePageReport {
        Machine::pages_of(self, page)
    }

    fn balloon(&self) -> Option<Arc<Mutex<VirtioBalloon>>> {
        Machine::balloon(self)
    }

    fn snapshot(
        &mut self,
        request: &CreateSnapshot,
        config: &VmConfig,
    ) -> Result<(), SnapshotError> {
        Machine::snapshot(self, request, config)
    }

    fn metrics(&self) -> MachineMetrics {
        Machine::metrics(self)
    }

    fn shutdown(self: Box<Self>) {
        Machine::shutdown(*self);
    }
}

/// Why a guest could not be launched.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// The guest or one of its devices.
    #[error(transparent)]
    Start(#[from] StartError),
    /// The process only takes the configuration; the daemon starts the guest in another process.
    #[error(
        "this process only takes the configuration: the daemon starts the guest in another one"
    )]
    OnlyConfigured,
    /// The output of its serial console.
    #[error("serial.serial_out_path")]
    Serial(#[source] std::io::Error),
    /// The event loop does not answer: the process is about to end.
    #[error("the event loop has stopped")]
    EventLoop(#[from] event_manager::Error),
}
