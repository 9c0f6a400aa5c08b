//! Virtual disks.

use std::path::PathBuf;

use memshare::ShareMode;
use serde::de::IgnoredAny;
use serde::{Deserialize, Serialize};
use storage::io::EngineKind;

use super::error::{check_disk, check_id, check_path};
use super::{ConfigError, DeviceConfig, DriveFormat, HostFile, MachineConfig, RateLimiterConfig};

/// Bytes of a serial number that a guest can see (VIRTIO 1.2, 5.2.6 `VIRTIO_BLK_T_GET_ID`).
const SERIAL_MAX: usize = 20;
/// The most request queues: one for each vCPU that a guest can have.
const QUEUES_MAX: u16 = crate::limits::MAX_VCPUS as u16;

/// Firecracker's drive, with additional fields.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DriveConfig {
    /// Name of the drive: 1 to 64 letters, digits and underscores.
    pub drive_id: String,
    /// The file, or a block device of the host.
    #[schema(value_type = String)]
    pub path_on_host: PathBuf,
    /// The guest mounts this drive as its root: it becomes the first disk, and `root=` is added to the command line.
    pub is_root_device: bool,
    /// The partition to mount as root, by its unique ID, instead of the whole disk.
    #[serde(default)]
    pub partuuid: Option<String>,
    /// The guest cannot write, and the file may be shared with other guests that cannot either.
    #[serde(default)]
    pub is_read_only: bool,
    /// Whether a guest's flush reaches the medium. With Coppice it always does, so both values have the same effect.
    #[serde(default)]
    pub cache_type: CacheType,
    /// How requests are executed.
    #[serde(default)]
    pub io_engine: IoEngine,
    /// Limits requests, and the bytes of reads and writes; nothing where absent.
    #[serde(default, deserialize_with = "crate::object::optional")]
    pub rate_limiter: Option<RateLimiterConfig>,
    /// A vhost-user socket. Not supported: refused unless `null`.
    #[serde(default, skip_serializing)]
    #[schema(ignore)]
    pub socket: Option<IgnoredAny>,
    /// The format of the file; found by its signature where absent. Name it for a raw disk that a guest may write: a
    /// guest decides what such a disk begins with. Not in Firecracker.
    #[serde(default)]
    pub format: Option<DriveFormat>,
    /// Serial number, up to 20 printable ASCII characters; the `drive_id` where absent. Not in Firecracker.
    #[serde(default)]
    pub serial: Option<String>,
    /// Number of request queues, 1 to 32. Not in Firecracker.
    #[serde(default = "one")]
    pub num_queues: u16,
    /// Space that the guest frees stays with the file, for its next blocks, rather than go back to the host. Not in
    /// Firecracker.
    #[serde(default)]
    pub keep_space: bool,
    /// The folder that the parents of a differencing disk have to lie in, or below; anywhere where absent. Not in
    /// Firecracker.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub parents: Option<PathBuf>,
    /// Whether its pages are shared, `off` or `read`; by the guest's mode of sharing where absent. Not in Firecracker.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub share: Option<ShareMode>,
}

const fn one() -> u16 {
    1
}

/// Firecracker's `cache_type`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub enum CacheType {
    /// Flushes need not reach the medium; with Coppice they do.
    Unsafe,
    /// Flushes reach the medium.
    #[default]
    Writeback,
}

/// Firecracker's `io_engine`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub enum IoEngine {
    /// A worker thread.
    Sync,
    /// `io_uring` where the host allows it, else a worker thread.
    #[default]
    Async,
}

impl From<IoEngine> for EngineKind {
    fn from(engine: IoEngine) -> Self {
        match engine {
            IoEngine::Sync => Self::Worker,
            IoEngine::Async => Self::Auto,
        }
    }
}

/// The fields of a drive that can change while its guest runs.
#[derive(Clone, Debug, PartialEq, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DriveUpdate {
    /// The drive.
    pub drive_id: String,
    /// Its new file; that which it has already, where that has another size now.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub path_on_host: Option<PathBuf>,
    /// What changes of its rate limiter.
    #[serde(default, deserialize_with = "crate::object::optional")]
    pub rate_limiter: Option<RateLimiterConfig>,
}

impl DriveUpdate {
    /// `drive` with this update.
    ///
    /// # Errors
    /// `EmptyUpdate`, `Invalid`.
    pub fn applied_to(self, drive: &DriveConfig) -> Result<DriveConfig, ConfigError> {
        if self.path_on_host.is_none() && self.rate_limiter.is_none() {
            return Err(ConfigError::EmptyUpdate);
        }
        let mut updated = drive.clone();
        if let Some(path_on_host) = self.path_on_host {
            updated.path_on_host = path_on_host;
        }
        if let Some(limiter) = self.rate_limiter {
            updated.rate_limiter = limiter.applied_to(drive.rate_limiter);
        }
        updated.validate(&MachineConfig::default())?;
        Ok(updated)
    }
}

impl DriveConfig {
    /// A writable drive with nothing else set.
    pub fn new(drive_id: impl Into<String>, path_on_host: impl Into<PathBuf>) -> Self {
        Self {
            drive_id: drive_id.into(),
            path_on_host: path_on_host.into(),
            is_root_device: false,
            partuuid: None,
            is_read_only: false,
            cache_type: CacheType::default(),
            io_engine: IoEngine::default(),
            rate_limiter: None,
            socket: None,
            format: None,
            serial: None,
            num_queues: one(),
            keep_space: false,
            parents: None,
            share: None,
        }
    }
}

impl DeviceConfig for DriveConfig {
    fn field(&self) -> &'static str {
        "drives"
    }

    fn id(&self) -> Option<&str> {
        Some(&self.drive_id)
    }

    fn is_root(&self) -> bool {
        self.is_root_device
    }

    fn validate(&self, _: &MachineConfig) -> Result<(), ConfigError> {
        check_id("drives.drive_id", &self.drive_id)?;
        check_path("drives.path_on_host", &self.path_on_host)?;
        if let Some(parents) = &self.parents {
            check_path("drives.parents", parents)?;
        }
        if self.socket.is_some() {
            return Err(ConfigError::Unsupported {
                field: "drives.socket",
            });
        }
        if let Some(uuid) = &self.partuuid
            && (uuid.is_empty()
                || uuid.len() > 36
                || !uuid.chars().all(|c| c == '-' || c.is_ascii_alphanumeric()))
        {
            // The text is put into the kernel command line, so only a UUID is accepted.
            return Err(ConfigError::invalid(
                "drives.partuuid",
                &format_args!("{uuid:.80?}"),
                "a partition's unique ID",
            ));
        }
        if let Some(serial) = &self.serial
            && (serial.len() > SERIAL_MAX || !serial.chars().all(|c| c.is_ascii_graphic()))
        {
            return Err(ConfigError::invalid(
                "drives.serial",
                &format_args!("{serial:.80?}"),
                format!("up to {SERIAL_MAX} printable ASCII characters"),
            ));
        }
        if !(1..=QUEUES_MAX).contains(&self.num_queues) {
            return Err(ConfigError::invalid(
                "drives.num_queues",
                &self.num_queues,
                format!("1 to {QUEUES_MAX}"),
            ));
        }
        Ok(())
    }

    fn check_files(&self) -> Result<(), ConfigError> {
        check_disk(
            "drives.path_on_host",
            &self.path_on_host,
            !self.is_read_only,
        )
    }

    fn host_files(&self) -> Vec<HostFile<'_>> {
        vec![HostFile::Disk {
            path: &self.path_on_host,
            format: self.format,
            is_written: !self.is_read_only,
        }]
    }

    fn paths_mut(&mut self) -> Vec<&mut PathBuf> {
        let own = std::iter::once(&mut self.path_on_host);
        own.chain(self.parents.as_mut()).collect()
    }
}
