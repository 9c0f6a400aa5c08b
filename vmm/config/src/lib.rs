//! The configuration of a guest, in the form of Firecracker's configuration file and REST bodies.
//!
//! ```json
//! {
//!   "boot-source": { "kernel_image_path": "vmlinux", "boot_args": "console=ttyS0" },
//!   "drives": [ { "drive_id": "root", "path_on_host": "root.vhdx", "is_root_device": true } ],
//!   "machine-config": { "vcpu_count": 2, "mem_size_mib": 256 },
//!   "entropy": {}
//! }
//! ```
//!
//! Beyond Firecracker's fields there are `boot_protocol` of a boot source, `format`, `serial`, `num_queues`,
//! `keep_space`, `parents` and `share` of a drive, `mode`, `format` and `parents` of a pmem device, `vsock_port` of
//! `mmds-config`, and `sharing`. A field that Coppice does not know is refused, and so is a value that it does not
//! support, so that no part of a configuration is ignored. Rate limits, CPU templates, SMT and huge pages of hugetlbfs
//! are such values.

mod balloon;
pub mod bodies;
mod boot_source;
mod drive;
mod error;
mod id;
pub mod limits;
mod machine;
pub mod operations;
mod output;
mod pmem;
mod sharing;
mod size;
mod snapshot;
mod vsock;

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde::de::IgnoredAny;
use serde::{Deserialize, Serialize};

pub use balloon::PAGES_PER_MIB;
pub use balloon::{BalloonConfig, BalloonStatisticsUpdate, BalloonUpdate, HintingStart};
pub use boot_source::{BootProtocol, BootSourceConfig};
pub use drive::{CacheType, DriveConfig, DriveFormat, DriveUpdate, IoEngine};
pub use error::ConfigError;
pub use id::is_guest_id;
pub use limits::MAX_FILE_SIZE;
pub use machine::{CpuTemplate, HugePageConfig, MachineConfig};
pub use output::{LogLevel, LoggerConfig, MetricsConfig, SerialConfig};
pub use pmem::{PmemConfig, PmemMode};
pub use sharing::SharingConfig;
pub use size::{Bytes, Mebibytes, SizeError};
pub use snapshot::{
    CreateSnapshot, DriveOverride, LoadSnapshot, MemoryBackend, MemoryBackendType, SnapshotType,
    VsockOverride,
};
pub use vsock::{FIRST_CID, MmdsConfig, MmdsVersion, VsockConfig};

/// The configuration of one guest.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct VmConfig {
    /// The kernel, its initial RAM disk and its command line. A guest cannot start without a kernel.
    #[serde(default)]
    pub boot_source: Option<BootSourceConfig>,
    /// Virtual disks, in the order in which the guest sees them; the root device, if one is marked, comes before the
    /// others.
    #[serde(default)]
    pub drives: Vec<DriveConfig>,
    /// Disks as memory, in the order in which the guest sees them; the root device, if one is marked, comes before the
    /// others.
    #[serde(default)]
    pub pmem: Vec<PmemConfig>,
    /// Memory and vCPUs.
    #[serde(default)]
    pub machine_config: MachineConfig,
    /// How the guest shares memory with others.
    #[serde(default)]
    pub sharing: SharingConfig,
    /// The entropy device (virtio-rng); none where absent.
    #[serde(default)]
    pub entropy: Option<EntropyConfig>,
    /// The balloon (virtio-balloon); none where absent.
    #[serde(default)]
    pub balloon: Option<BalloonConfig>,
    /// The socket device (virtio-vsock); none where absent.
    #[serde(default)]
    pub vsock: Option<VsockConfig>,
    /// How a guest with a socket device gets its metadata; the defaults apply where absent.
    #[serde(default)]
    pub mmds_config: Option<MmdsConfig>,
    /// Where the output of the serial console goes; to standard output where absent.
    #[serde(default)]
    pub serial: Option<SerialConfig>,
    /// The log.
    #[serde(default)]
    pub logger: Option<LoggerConfig>,
    /// Where counters are written.
    #[serde(default)]
    pub metrics: Option<MetricsConfig>,
}

/// The entropy device, which has no options.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct EntropyConfig {
    /// Not supported: refused unless `null`.
    #[serde(default, skip_serializing)]
    #[schema(ignore)]
    pub rate_limiter: Option<IgnoredAny>,
}

impl VmConfig {
    /// Reads a configuration file, of [`MAX_FILE_SIZE`] at most, and checks it.
    ///
    /// # Errors
    /// `Read`, `TooLong`, `Json`, and those of [`VmConfig::validate`].
    pub fn from_file(path: &Path) -> Result<Self, ConfigError> {
        let read = |source| ConfigError::Read {
            path: path.to_owned(),
            source,
        };
        let mut text = Vec::new();
        File::open(path)
            .map_err(read)?
            .take(MAX_FILE_SIZE + 1)
            .read_to_end(&mut text)
            .map_err(read)?;
        if text.len() as u64 > MAX_FILE_SIZE {
            return Err(ConfigError::TooLong {
                path: path.to_owned(),
            });
        }
        let config: Self = serde_json::from_slice(&text).map_err(|source| ConfigError::Json {
            path: path.to_owned(),
            source,
        })?;
        config.validate()?;
        Ok(config)
    }

    /// Checks every field by itself and all of them together. Opens no file: see [`VmConfig::check_files`].
    ///
    /// # Errors
    /// `Unsupported`, `Invalid`, `DuplicateDrive`, `SecondRoot`, `DuplicatePmem`, `SecondPmemRoot`, `TooManyDevices`.
    pub fn validate(&self) -> Result<(), ConfigError> {
        if let Some(boot_source) = &self.boot_source {
            boot_source.validate()?;
        }
        self.machine_config.validate()?;
        self.sharing.validate()?;
        let mut ids = BTreeSet::new();
        let mut root: Option<&str> = None;
        for drive in &self.drives {
            drive.validate()?;
            if !ids.insert(drive.drive_id.as_str()) {
                return Err(ConfigError::DuplicateDrive(drive.drive_id.clone()));
            }
            if drive.is_root_device
                && let Some(first) = root.replace(&drive.drive_id)
            {
                return Err(ConfigError::SecondRoot {
                    drive: drive.drive_id.clone(),
                    first: first.to_owned(),
                });
            }
        }
        let mut ids = BTreeSet::new();
        for pmem in &self.pmem {
            pmem.validate()?;
            if !ids.insert(pmem.id.as_str()) {
                return Err(ConfigError::DuplicatePmem(pmem.id.clone()));
            }
            if pmem.root_device
                && let Some(first) = root.replace(&pmem.id)
            {
                return Err(ConfigError::SecondPmemRoot {
                    pmem: pmem.id.clone(),
                    first: first.to_owned(),
                });
            }
        }
        if self
            .entropy
            .is_some_and(|entropy| entropy.rate_limiter.is_some())
        {
            return Err(ConfigError::Unsupported {
                field: "entropy.rate_limiter",
            });
        }
        let memory = self.machine_config.mem_size_mib;
        if let Some(balloon) = self.balloon
            && balloon.amount_mib > memory
        {
            return Err(ConfigError::invalid(
                "balloon.amount_mib",
                &balloon.amount_mib,
                format!("{memory}, which the guest has, or less"),
            ));
        }
        if let Some(vsock) = &self.vsock {
            vsock.validate()?;
        }
        if let Some(mmds) = &self.mmds_config {
            mmds.validate()?;
        }
        if let Some(serial) = &self.serial {
            serial.validate()?;
        }
        if let Some(logger) = &self.logger {
            logger.validate()?;
        }
        if let Some(metrics) = &self.metrics {
            metrics.validate()?;
        }
        let devices = self.drives.len()
            + self.pmem.len()
            + usize::from(self.entropy.is_some())
            + usize::from(self.balloon.is_some())
            + usize::from(self.vsock.is_some());
        if devices > limits::MAX_VIRTIO_DEVICES {
            return Err(ConfigError::TooManyDevices { found: devices });
        }
        Ok(())
    }

    /// Checks that the kernel, the initrd and every drive and pmem device can be opened as they will be, and that a
    /// vsock device has a socket.
    ///
    /// # Errors
    /// `File` and `NotAFile`, `Invalid`.
    pub fn check_files(&self) -> Result<(), ConfigError> {
        if let Some(boot_source) = &self.boot_source {
            boot_source.check_files()?;
        }
        if let Some(vsock) = &self.vsock {
            vsock.check_path()?;
        }
        self.check_disks()
    }

    /// Checks that every drive and pmem device can be opened as it will be.
    ///
    /// # Errors
    /// `File` and `NotAFile`.
    pub fn check_disks(&self) -> Result<(), ConfigError> {
        self.drives.iter().try_for_each(DriveConfig::check_file)?;
        self.pmem.iter().try_for_each(PmemConfig::check_file)
    }

    /// The first field that is set and describes the guest: any but the log, the metrics and the serial console.
    pub fn of_a_guest(&self) -> Option<&'static str> {
        let is_set = [
            (self.boot_source.is_some(), "boot-source"),
            (!self.drives.is_empty(), "drives"),
            (!self.pmem.is_empty(), "pmem"),
            (
                self.machine_config != MachineConfig::default(),
                "machine-config",
            ),
            (self.sharing != SharingConfig::default(), "sharing"),
            (self.entropy.is_some(), "entropy"),
            (self.balloon.is_some(), "balloon"),
            (self.vsock.is_some(), "vsock"),
            (self.mmds_config.is_some(), "mmds-config"),
        ];
        is_set
            .iter()
            .find_map(|(is_set, field)| is_set.then_some(*field))
    }

    /// Makes the paths of disks, and of the vsock device's socket, absolute.
    ///
    /// # Errors
    /// `Read`, where the working directory of this process does not exist any more.
    pub fn make_paths_absolute(&mut self) -> Result<(), ConfigError> {
        let drives = self.drives.iter_mut();
        let drives = drives.flat_map(|drive| {
            std::iter::once(&mut drive.path_on_host).chain(drive.parents.as_mut())
        });
        let pmem = self.pmem.iter_mut();
        let pmem = pmem
            .flat_map(|pmem| std::iter::once(&mut pmem.path_on_host).chain(pmem.parents.as_mut()));
        let vsock = self
            .vsock
            .as_mut()
            .and_then(|vsock| vsock.uds_path.as_mut());
        for path in drives.chain(pmem).chain(vsock) {
            *path = std::path::absolute(&*path).map_err(|source| ConfigError::Read {
                path: path.clone(),
                source,
            })?;
        }
        Ok(())
    }

    /// Adds a drive, or replaces the one with the same `drive_id` in its place.
    pub fn set_drive(&mut self, drive: DriveConfig) {
        match self
            .drives
            .iter_mut()
            .find(|other| other.drive_id == drive.drive_id)
        {
            Some(other) => *other = drive,
            None => self.drives.push(drive),
        }
    }

    /// The file of a drive, or of the pmem device where no drive has the id.
    pub fn disk_mut(&mut self, id: &str) -> Option<&mut PathBuf> {
        let drive = self.drives.iter_mut().find(|drive| drive.drive_id == id);
        let pmem = self.pmem.iter_mut().find(|pmem| pmem.id == id);
        let drive = drive.map(|drive| &mut drive.path_on_host);
        drive.or(pmem.map(|pmem| &mut pmem.path_on_host))
    }

    /// Adds a pmem device, or replaces the one with the same `id` in its place.
    pub fn set_pmem(&mut self, pmem: PmemConfig) {
        match self.pmem.iter_mut().find(|other| other.id == pmem.id) {
            Some(other) => *other = pmem,
            None => self.pmem.push(pmem),
        }
    }
}

#[cfg(test)]
mod tests;
