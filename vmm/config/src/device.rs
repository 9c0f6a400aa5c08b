//! What the configuration of a device declares of itself.

use std::path::{Path, PathBuf};

use super::{ConfigError, DriveFormat, MachineConfig};

/// What of the host's files a device uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HostFile<'a> {
    /// A virtual disk, and the disks that it stands on.
    Disk {
        /// The file.
        path: &'a Path,
        /// The format of the file, where it is known.
        format: Option<DriveFormat>,
        /// Whether the guest's writes go to it.
        is_written: bool,
    },
    /// The sockets beside one, for each port: `PATH_PORT`.
    PortSockets(&'a Path),
}

/// The configuration of a virtio device: an element of a list of [`VmConfig`](crate::VmConfig), or an optional field of
/// it.
///
/// What checks, jails, counts or stores devices asks them by this trait, and knows no kind of them.
pub trait DeviceConfig {
    /// Its field in a configuration file.
    fn field(&self) -> &'static str;

    /// Its name among those of its field; `None` where a guest has one at most.
    fn id(&self) -> Option<&str> {
        None
    }

    /// Whether the guest mounts it as its root.
    fn is_root(&self) -> bool {
        false
    }

    /// Checks the fields, those that depend on `machine` too, but no file.
    ///
    /// # Errors
    /// `Unsupported`, `Invalid`.
    fn validate(&self, machine: &MachineConfig) -> Result<(), ConfigError>;

    /// Checks that its files can be opened as the device is going to open them.
    ///
    /// # Errors
    /// `File`, `NotAFile`, `Invalid`.
    fn check_files(&self) -> Result<(), ConfigError> {
        Ok(())
    }

    /// What the device uses of the host's files: what its jail has.
    fn host_files(&self) -> Vec<HostFile<'_>> {
        Vec::new()
    }

    /// Its paths on the host, which can be relative.
    fn paths_mut(&mut self) -> Vec<&mut PathBuf> {
        Vec::new()
    }
}

/// A field of a configuration that has devices of a kind.
pub(crate) trait Slot<D> {
    /// Puts a device in the place of the one of the same name, or behind the others.
    fn put(&mut self, device: D);
}

impl<D: DeviceConfig> Slot<D> for Vec<D> {
    fn put(&mut self, device: D) {
        match self.iter_mut().find(|other| other.id() == device.id()) {
            Some(other) => *other = device,
            None => self.push(device),
        }
    }
}

impl<D: DeviceConfig> Slot<D> for Option<D> {
    fn put(&mut self, device: D) {
        *self = Some(device);
    }
}
