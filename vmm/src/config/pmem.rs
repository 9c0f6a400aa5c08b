//! Disks as memory.

use std::path::PathBuf;

use serde::de::IgnoredAny;
use serde::{Deserialize, Serialize};

use super::error::{check_file, check_id, check_path};
use super::{ConfigError, DriveFormat};

/// Firecracker's pmem device, and what Coppice knows beyond it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PmemConfig {
    /// Name of the device: 1 to 64 letters, digits and underscores.
    pub id: String,
    /// The file.
    pub path_on_host: PathBuf,
    /// The guest's kernel is told to mount this device as its root: it becomes the first pmem device, and `root=` is added to the command line.
    #[serde(default)]
    pub root_device: bool,
    /// The guest cannot write, and the file may be shared with other guests that cannot either.
    #[serde(default)]
    pub read_only: bool,
    /// Not supported: refused unless `null`.
    #[serde(default, skip_serializing)]
    pub rate_limiter: Option<IgnoredAny>,
    /// What comes of what the guest writes; by `read_only`, `ro` or `rw`, where absent. Not in Firecracker.
    #[serde(default)]
    pub mode: Option<PmemMode>,
    /// The format of the file; found by its signature where absent. Not in Firecracker.
    #[serde(default)]
    pub format: Option<DriveFormat>,
    /// The folder that the parents of a differencing disk have to lie in, or below; anywhere where absent. Not in Firecracker.
    #[serde(default)]
    pub parents: Option<PathBuf>,
}

/// What comes of what a guest writes to a pmem device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PmemMode {
    /// It is dropped. The file is shared with other guests.
    Ro,
    /// It is the guest's own, and forgotten at its end. The file is shared with other guests.
    Cow,
    /// It is on the disk when the guest has flushed.
    Rw,
}

impl PmemMode {
    /// Whether the disk changes.
    pub fn keeps(self) -> bool {
        match self {
            Self::Ro | Self::Cow => false,
            Self::Rw => true,
        }
    }
}

impl PmemConfig {
    /// A device with nothing else set.
    pub fn new(id: impl Into<String>, path_on_host: impl Into<PathBuf>, mode: PmemMode) -> Self {
        Self {
            id: id.into(),
            path_on_host: path_on_host.into(),
            root_device: false,
            read_only: mode == PmemMode::Ro,
            rate_limiter: None,
            mode: Some(mode),
            format: None,
            parents: None,
        }
    }

    /// What comes of what the guest writes.
    pub fn mode(&self) -> PmemMode {
        match self.mode {
            Some(mode) => mode,
            None if self.read_only => PmemMode::Ro,
            None => PmemMode::Rw,
        }
    }

    /// Checks the fields, but no file.
    ///
    /// # Errors
    /// `Unsupported`, `Invalid`.
    pub fn validate(&self) -> Result<(), ConfigError> {
        check_id("pmem.id", &self.id)?;
        check_path("pmem.path_on_host", &self.path_on_host)?;
        if let Some(parents) = &self.parents {
            check_path("pmem.parents", parents)?;
        }
        if self.rate_limiter.is_some() {
            return Err(ConfigError::Unsupported {
                field: "pmem.rate_limiter",
            });
        }
        if self.read_only && self.mode().keeps() {
            return Err(ConfigError::invalid(
                "pmem.mode",
                &"rw",
                "ro or cow, as read_only is set",
            ));
        }
        Ok(())
    }

    /// Checks that the file can be opened as the device will open it.
    ///
    /// # Errors
    /// `File`, `NotAFile`.
    pub fn check_file(&self) -> Result<(), ConfigError> {
        check_file("pmem.path_on_host", &self.path_on_host, self.mode().keeps())
    }
}
