//! Why a guest cannot be started, and why a running one refuses a request.

use std::path::PathBuf;

use devices::bus::BusRangeError;
use devices::persist::RestoreError;
use devices::virtio::block::BlockError;
use devices::vmclock::VmClockError;
use devices::vmgenid::VmGenIdError;
use storage::DiskError;
use storage::vhdx::ChainError;

use super::taps::InterfaceTapError;
use crate::pmem::{PmemError, WritebackError};
use crate::snapshot::SnapshotError;
use host::socket::SocketError;
use kvm::boot::BootError;
use kvm::layout;
use kvm::vm::VmError;

/// Why a guest cannot be started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// No kernel is configured.
    #[error("no kernel is configured: set boot-source")]
    NoKernel,
    /// The VM.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// The kernel or the initrd.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// A drive's file.
    #[error("drive {drive}")]
    Drive {
        /// `drive_id`.
        drive: String,
        /// What is wrong with its file.
        source: storage::OpenError,
    },
    /// A drive's device.
    #[error("drive {drive}")]
    Block {
        /// `drive_id`.
        drive: String,
        /// What is wrong with its settings.
        source: BlockError,
    },
    /// A pmem device.
    #[error("pmem {pmem}")]
    Pmem {
        /// `id`.
        pmem: String,
        /// Why the guest cannot have it.
        source: Box<PmemError>,
    },
    /// More devices than interrupt lines.
    #[error("a guest has at most {} virtio devices", layout::VIRTIO_GSIS.len())]
    TooManyDevices,
    /// A device that each guest has is not there.
    #[error("the guest has no {0}")]
    Missing(&'static str),
    /// Two devices have the same addresses.
    #[error(transparent)]
    Bus(#[from] BusRangeError),
    /// The socket of the vsock device.
    #[error("vsock")]
    Vsock(#[from] SocketError),
    /// The tap of a network interface.
    #[error(transparent)]
    Tap(#[from] InterfaceTapError),
    /// The generation ID.
    #[error(transparent)]
    Generation(#[from] VmGenIdError),
    /// The vmclock page.
    #[error(transparent)]
    Clock(#[from] VmClockError),
    /// The saved state of a device does not fit the device.
    #[error(transparent)]
    Restore(#[from] RestoreError),
    /// The snapshot.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// The host has no room for a device: no descriptor, no memory or no thread.
    #[error("cannot make the {device}")]
    Host {
        /// The device.
        device: &'static str,
        /// The host's error.
        source: std::io::Error,
    },
}

/// The error for a device that the host has no room for.
pub(super) fn host(device: &'static str) -> impl FnOnce(std::io::Error) -> StartError {
    move |source| StartError::Host { device, source }
}

/// Why a running guest refuses a request.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// There is no drive of that name.
    #[error("there is no drive {0}")]
    NoDrive(String),
    /// There is no network interface of that name.
    #[error("there is no network interface {0}")]
    NoInterface(String),
    /// The host has no descriptor for the timer of a limit.
    #[error("the limits of {device} cannot be changed")]
    Limits {
        /// Its name.
        device: String,
        /// The host's error.
        source: std::io::Error,
    },
    /// There is no RAM at that guest physical address.
    #[error("there is no RAM at {0:#x}")]
    NotRam(u64),
    /// There is no pmem device of that name.
    #[error("there is no pmem device {0}")]
    NoPmem(String),
    /// The disk of a pmem device cannot be changed as was asked for.
    #[error("pmem {pmem}")]
    ChangePmem {
        /// `id`.
        pmem: String,
        /// Why not.
        source: Box<DriveError>,
    },
    /// The new file of a drive cannot be used.
    #[error("drive {drive}")]
    Drive {
        /// `drive_id`.
        drive: String,
        /// What is wrong with its file.
        source: storage::OpenError,
    },
    /// The new file differs from the old one in a property that the guest relies on.
    #[error("drive {drive}")]
    Replacement {
        /// `drive_id`.
        drive: String,
        /// In what it differs.
        source: BlockError,
    },
    /// The disk of a drive cannot be changed as was asked for.
    #[error("drive {drive}")]
    Change {
        /// `drive_id`.
        drive: String,
        /// Why not.
        source: DriveError,
    },
    /// The host does not report how much of the guest's memory is mapped from where.
    #[error("where guest memory is cannot be told")]
    Sharing(#[source] std::io::Error),
    /// The guest has not read the keys typed before.
    #[error("the guest has not taken the last Ctrl-Alt-Del yet")]
    KeyboardBusy,
}

/// Why an operation on the disk of a running guest failed. The guest goes on with the disk it has.
#[derive(Debug, thiserror::Error)]
pub enum DriveError {
    /// The operation needs a VHDX, and the disk is raw.
    #[error("is not a VHDX")]
    NotVhdx,
    /// A disk without parent.
    #[error("has no parent that it could be merged into")]
    NoParent,
    /// The file of the parent may not be written to.
    #[error(
        "cannot be merged into {} (in a jail, parents are read-only: name it by --jail allow=PATH, and have it open to the guest's user)",
        base.display()
    )]
    ParentClosed {
        /// The file.
        base: PathBuf,
        /// The host's error.
        #[source]
        error: std::io::Error,
    },
    /// A job is not over.
    #[error("has a {0} that is not over")]
    Busy(&'static str),
    /// No job was started.
    #[error("has no job")]
    NoJob,
    /// The chain of the disk cannot be changed.
    #[error(transparent)]
    Chain(#[from] ChainError),
    /// The disk refused.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// The disk of a pmem device that the guest only reads.
    #[error("is not written to")]
    NotWritten,
    /// Not all that the guest has written is on the disk.
    #[error(transparent)]
    Writeback(#[from] WritebackError),
    /// The device refused.
    #[error(transparent)]
    Block(#[from] BlockError),
    /// The host refused.
    #[error("cannot {operation}")]
    Io {
        /// What was tried.
        operation: String,
        /// The host's error.
        #[source]
        error: std::io::Error,
    },
}
