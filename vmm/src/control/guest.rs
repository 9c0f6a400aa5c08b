//! What control needs of a guest.

use crate::config::DriveConfig;
use crate::machine::{DeviceMetrics, Machine, MachineError, StartError};

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
    /// The counters of its devices.
    fn metrics(&self) -> DeviceMetrics;
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

    fn metrics(&self) -> DeviceMetrics {
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
    /// The output of its serial console.
    #[error("serial.serial_out_path: {0}")]
    Serial(std::io::Error),
    /// The event loop does not answer: the process is about to end.
    #[error("the event loop has stopped: {0}")]
    EventLoop(#[from] event_manager::Error),
}
