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
//! `keep_space`, `parents` and `share` of a drive, `num_queue_pairs`, `network`, `publish` and `lease` of a network
//! interface, `mode`, `format` and `parents` of a pmem device, `vsock_port` of `mmds-config`, and `sharing`. A field
//! that Coppice does not know is refused, and so is a value that it does not support, so that no part of a
//! configuration is ignored.

mod balloon;
pub mod bodies;
mod boot_source;
mod cpu_config;
mod device;
mod digest;
mod drive;
mod entropy;
mod error;
mod format;
mod id;
pub mod limits;
mod mac;
mod machine;
mod mmds;
mod network_interface;
mod object;
mod output;
mod pmem;
mod published;
mod rate_limiter;
mod sharing;
mod size;
mod snapshot;
mod vsock;

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use memshare::ShareMode;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use device::Slot;

pub use balloon::PAGES_PER_MIB;
pub use balloon::{BalloonConfig, BalloonStatisticsUpdate, BalloonUpdate, HintingStart};
pub use boot_source::{BootProtocol, BootSourceConfig};
pub use cpu_config::{
    Bitmap, CpuConfig, CpuConfigSource, CpuidModifier, CpuidRegister, KvmCapability, MsrModifier,
    Number, RegisterModifier,
};
pub use device::{DeviceConfig, HostFile};
pub use digest::{DigestError, Sha256Digest};
pub use drive::{CacheType, DriveConfig, DriveUpdate, IoEngine};
pub use entropy::EntropyConfig;
pub use error::ConfigError;
pub use format::DriveFormat;
pub use id::{DeviceId, DeviceIdError, is_guest_id};
pub use limits::MAX_FILE_SIZE;
pub use mac::{MacAddress, MacAddressError};
pub use machine::{CpuTemplate, HugePageConfig, MachineConfig};
pub use mmds::{MmdsConfig, MmdsVersion};
pub use network_interface::{LeaseConfig, NetworkInterfaceConfig, NetworkInterfaceUpdate};
pub use output::{LogLevel, LoggerConfig, MetricsConfig, SerialConfig};
pub use pmem::{PmemConfig, PmemMode, PmemUpdate};
pub use published::{Protocol, Published, PublishedError};
pub use rate_limiter::{RateLimiterConfig, TokenBucketConfig};
pub use sharing::SharingConfig;
pub use size::{Bytes, Mebibytes, SizeError};
pub use snapshot::{
    CreateSnapshot, DriveOverride, LoadHugePages, LoadSnapshot, MemoryBackend, MemoryBackendType,
    NetworkOverride, SnapshotType, VsockOverride,
};
pub use vsock::{FIRST_CID, VsockConfig};

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
    /// Network interfaces, in the order in which the guest sees them.
    #[serde(default)]
    pub network_interfaces: Vec<NetworkInterfaceConfig>,
    /// Memory and vCPUs.
    #[serde(default)]
    pub machine_config: MachineConfig,
    /// What the guest's CPU has otherwise than the host's. In a configuration file it may be the name of a file that
    /// has it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<CpuConfig>)]
    pub cpu_config: Option<CpuConfigSource>,
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
    /// How the guest gets its metadata; where absent, over vsock alone, with the defaults.
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

/// A device that a [`VmConfig`] has a field for.
pub trait ConfiguredDevice: DeviceConfig {
    /// Adds it to a configuration, or puts it in the place of the one of the same name.
    fn store(self, config: &mut VmConfig);
}

/// Names the fields of a configuration that make virtio devices, and the types of these.
macro_rules! devices {
    ($($field:ident: $device:ty),* $(,)?) => {
        $(impl ConfiguredDevice for $device {
            fn store(self, config: &mut VmConfig) {
                config.$field.put(self);
            }
        })*

        impl VmConfig {
            /// All virtio devices that are asked for.
            pub fn devices(&self) -> impl Iterator<Item = &dyn DeviceConfig> {
                std::iter::empty()$(.chain(self.$field.iter().map(|device| device as &dyn DeviceConfig)))*
            }

            fn devices_mut(&mut self) -> impl Iterator<Item = &mut dyn DeviceConfig> {
                std::iter::empty()$(.chain(self.$field.iter_mut().map(|device| device as &mut dyn DeviceConfig)))*
            }
        }
    };
}

devices! {
    drives: DriveConfig,
    pmem: PmemConfig,
    network_interfaces: NetworkInterfaceConfig,
    entropy: EntropyConfig,
    vsock: VsockConfig,
    balloon: BalloonConfig,
}

/// Reads a file of [`MAX_FILE_SIZE`] at most.
fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T, ConfigError> {
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
    serde_json::from_slice(&text).map_err(|source| ConfigError::Json {
        path: path.to_owned(),
        source,
    })
}

impl VmConfig {
    /// Reads a configuration file, of [`MAX_FILE_SIZE`] at most, and checks it.
    ///
    /// # Errors
    /// `Read`, `TooLong`, `Json`, and those of [`VmConfig::validate`].
    pub fn from_file(path: &Path) -> Result<Self, ConfigError> {
        let mut config: Self = read_json(path)?;
        if let Some(CpuConfigSource::File(path)) = &config.cpu_config {
            config.cpu_config = Some(CpuConfigSource::Given(read_json(path)?));
        }
        config.machine_config = config.machine_config.without_none();
        config.validate()?;
        Ok(config)
    }

    /// What the guest shares of its RAM: nothing where that is in huge pages of hugetlbfs, which are mapped whole or
    /// not at all.
    pub fn share_mode(&self) -> ShareMode {
        if self.machine_config.has_hugetlbfs() {
            ShareMode::Off
        } else {
            self.sharing.mode
        }
    }

    /// `PUT /machine-config`. As with Firecracker, a CPU template stays unless another one, or `None`, is given.
    pub fn set_machine(&mut self, mut machine: MachineConfig) {
        if machine.cpu_template.is_some() {
            self.cpu_config = None;
        }
        machine.cpu_template = machine.cpu_template.or(self.machine_config.cpu_template);
        self.machine_config = machine.without_none();
    }

    /// `PATCH /machine-config`: see [`MachineConfig::updated`].
    ///
    /// # Errors
    /// Those of [`MachineConfig::updated`].
    pub fn update_machine(&mut self, update: &Value) -> Result<(), ConfigError> {
        let updated = self.machine_config.updated(update)?;
        if update
            .get("cpu_template")
            .is_some_and(|template| !template.is_null())
        {
            self.cpu_config = None;
        }
        self.machine_config = updated.without_none();
        Ok(())
    }

    /// `PUT /cpu-config`. It takes the place of a static template.
    pub fn set_cpu(&mut self, template: CpuConfig) {
        self.machine_config.cpu_template = None;
        self.cpu_config = Some(CpuConfigSource::Given(template));
    }

    /// What the guest's CPU has otherwise than the host's, where that is given bit by bit.
    pub fn custom_cpu(&self) -> Option<&CpuConfig> {
        match &self.cpu_config {
            Some(CpuConfigSource::Given(template)) => Some(template),
            Some(CpuConfigSource::File(_)) | None => None,
        }
    }

    /// Checks every field by itself and all of them together. Opens no file: see [`VmConfig::check_files`].
    ///
    /// # Errors
    /// `Unsupported`, `Invalid`, `DuplicateId`, `SecondRoot`, `TooManyDevices`.
    pub fn validate(&self) -> Result<(), ConfigError> {
        if let Some(boot_source) = &self.boot_source {
            boot_source.validate()?;
        }
        self.machine_config.validate()?;
        self.validate_cpu()?;
        self.sharing.validate()?;
        let mut ids = BTreeSet::new();
        let mut root: Option<&str> = None;
        for device in self.devices() {
            device.validate(&self.machine_config)?;
            let (field, id) = (device.field(), device.id().unwrap_or_default());
            if !ids.insert((field, id)) {
                return Err(ConfigError::DuplicateId {
                    field,
                    id: id.to_owned(),
                });
            }
            if device.is_root()
                && let Some(first) = root.replace(id)
            {
                return Err(ConfigError::SecondRoot {
                    field,
                    id: id.to_owned(),
                    first: first.to_owned(),
                });
            }
        }
        network_interface::check_distinct(&self.network_interfaces)?;
        if let Some(mmds) = &self.mmds_config {
            mmds.validate(&self.network_interfaces)?;
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
        let devices = self.devices().count();
        if devices > limits::MAX_VIRTIO_DEVICES {
            return Err(ConfigError::TooManyDevices { found: devices });
        }
        Ok(())
    }

    fn validate_cpu(&self) -> Result<(), ConfigError> {
        if let Some(CpuConfigSource::File(path)) = &self.cpu_config {
            let expected = "a CPU template: only a configuration file can name a file that has one";
            return Err(ConfigError::invalid(
                "cpu-config",
                &path.display(),
                expected,
            ));
        }
        if self.cpu_config.is_some() && self.machine_config.has_cpu_template() {
            return Err(ConfigError::Together {
                fields: ["machine-config.cpu_template", "cpu-config"],
            });
        }
        Ok(())
    }

    /// Checks that the kernel, the initrd and the files of every device can be opened as they are going to be.
    ///
    /// # Errors
    /// `File` and `NotAFile`, `Invalid`.
    pub fn check_files(&self) -> Result<(), ConfigError> {
        if let Some(boot_source) = &self.boot_source {
            boot_source.check_files()?;
        }
        self.check_devices()
    }

    /// Checks that what each device opens of the host's files can be opened.
    ///
    /// # Errors
    /// `File` and `NotAFile`, `Invalid`.
    pub fn check_devices(&self) -> Result<(), ConfigError> {
        self.devices().try_for_each(DeviceConfig::check_files)
    }

    /// The first field that is set and describes the guest: any but the log, the metrics and the serial console.
    pub fn of_a_guest(&self) -> Option<&'static str> {
        let is_set = [
            (self.boot_source.is_some(), "boot-source"),
            (
                self.machine_config != MachineConfig::default(),
                "machine-config",
            ),
            (self.cpu_config.is_some(), "cpu-config"),
            (self.sharing != SharingConfig::default(), "sharing"),
            (self.mmds_config.is_some(), "mmds-config"),
        ];
        let set = is_set
            .iter()
            .find_map(|(is_set, field)| is_set.then_some(*field));
        set.or_else(|| self.devices().next().map(DeviceConfig::field))
    }

    /// Makes the paths of devices mean the same in any folder.
    ///
    /// # Errors
    /// `Read`, where the working directory of this process does not exist any more.
    pub fn make_paths_absolute(&mut self) -> Result<(), ConfigError> {
        for path in self.devices_mut().flat_map(DeviceConfig::paths_mut) {
            *path = std::path::absolute(&*path).map_err(|source| ConfigError::Read {
                path: path.clone(),
                source,
            })?;
        }
        Ok(())
    }

    /// The file of a drive, or of the pmem device where no drive has the id.
    pub fn disk_mut(&mut self, id: &str) -> Option<&mut PathBuf> {
        let drive = self.drives.iter_mut().find(|drive| drive.drive_id == id);
        let pmem = self.pmem.iter_mut().find(|pmem| pmem.id == id);
        let drive = drive.map(|drive| &mut drive.path_on_host);
        drive.or(pmem.map(|pmem| &mut pmem.path_on_host))
    }

    /// Gives a drive, or the pmem device where no drive has the id, another file, which is a VHDX.
    pub fn set_vhdx(&mut self, id: &str, path: &Path) {
        let format = Some(DriveFormat::Vhdx);
        if let Some(drive) = self.drives.iter_mut().find(|drive| drive.drive_id == id) {
            (drive.path_on_host, drive.format) = (path.to_owned(), format);
        } else if let Some(pmem) = self.pmem.iter_mut().find(|pmem| pmem.id == id) {
            (pmem.path_on_host, pmem.format) = (path.to_owned(), format);
        }
    }
}

#[cfg(test)]
mod tests;
