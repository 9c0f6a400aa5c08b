//! pmem devices: disks that the guest sees as memory.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::error::{check_file, check_id, check_path};
use super::{ConfigError, DeviceConfig, DriveFormat, HostFile, MachineConfig, RateLimiterConfig};

/// Firecracker's pmem device, with additional fields.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PmemConfig {
    /// Name of the device: 1 to 64 letters, digits and underscores.
    pub id: String,
    /// The file.
    #[schema(value_type = String)]
    pub path_on_host: PathBuf,
    /// The guest mounts this device as its root: it becomes the first pmem device, and `root=` is added to the command
    /// line.
    #[serde(default)]
    pub root_device: bool,
    /// The guest cannot write, and the file may be shared with other guests that cannot either.
    #[serde(default)]
    pub read_only: bool,
    /// Limits flushes, and the bytes that they write to the disk; nothing where absent.
    #[serde(default, deserialize_with = "crate::object::optional")]
    pub rate_limiter: Option<RateLimiterConfig>,
    /// What becomes of the guest's writes; `ro` or `rw` by `read_only` where absent. Not in Firecracker.
    #[serde(default)]
    pub mode: Option<PmemMode>,
    /// The format of the file; found by its signature where absent. Not in Firecracker.
    #[serde(default)]
    pub format: Option<DriveFormat>,
    /// The folder that the parents of a differencing disk have to lie in, or below; anywhere where absent. Not in
    /// Firecracker.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub parents: Option<PathBuf>,
}

/// What becomes of a guest's writes to a pmem device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum PmemMode {
    /// Writes are dropped. The file is shared with other guests.
    Ro,
    /// Written pages are the guest's own, and are dropped at its end. The file is shared with other guests.
    Cow,
    /// Writes are on the disk when the guest has flushed them.
    Rw,
}

/// The fields of a pmem device that can change while its guest runs.
#[derive(Clone, Debug, PartialEq, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PmemUpdate {
    /// The device.
    pub id: String,
    /// What changes of its rate limiter.
    #[serde(default, deserialize_with = "crate::object::optional")]
    pub rate_limiter: Option<RateLimiterConfig>,
}

impl PmemUpdate {
    /// `pmem` with this update.
    #[must_use]
    pub fn applied_to(self, pmem: &PmemConfig) -> PmemConfig {
        let mut updated = pmem.clone();
        if let Some(limiter) = self.rate_limiter {
            updated.rate_limiter = limiter.applied_to(pmem.rate_limiter);
        }
        updated
    }
}

impl PmemMode {
    /// Whether the guest's writes change the disk.
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

    /// What becomes of the guest's writes: `mode`, or its default by `read_only`.
    pub fn mode(&self) -> PmemMode {
        match self.mode {
            Some(mode) => mode,
            None if self.read_only => PmemMode::Ro,
            None => PmemMode::Rw,
        }
    }
}

impl DeviceConfig for PmemConfig {
    fn field(&self) -> &'static str {
        "pmem"
    }

    fn id(&self) -> Option<&str> {
        Some(&self.id)
    }

    fn is_root(&self) -> bool {
        self.root_device
    }

    fn validate(&self, _: &MachineConfig) -> Result<(), ConfigError> {
        check_id("pmem.id", &self.id)?;
        check_path("pmem.path_on_host", &self.path_on_host)?;
        if let Some(parents) = &self.parents {
            check_path("pmem.parents", parents)?;
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

    fn check_files(&self) -> Result<(), ConfigError> {
        check_file("pmem.path_on_host", &self.path_on_host, self.mode().keeps())
    }

    fn host_files(&self) -> Vec<HostFile<'_>> {
        vec![HostFile::Disk {
            path: &self.path_on_host,
            format: self.format,
            is_written: self.mode().keeps(),
        }]
    }

    fn paths_mut(&mut self) -> Vec<&mut PathBuf> {
        let own = std::iter::once(&mut self.path_on_host);
        own.chain(self.parents.as_mut()).collect()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::VmConfig;

    fn parse(value: serde_json::Value) -> Result<VmConfig, String> {
        let config: VmConfig = serde_json::from_value(value).map_err(|error| error.to_string())?;
        config.validate().map_err(|error| error.to_string())?;
        Ok(config)
    }

    fn pmem(id: &str) -> serde_json::Value {
        json!({"id": id, "path_on_host": "/disk"})
    }

    #[test]
    fn the_mode_follows_from_read_only_where_it_is_absent() {
        let mode = |value: serde_json::Value| {
            let mut one = pmem("a");
            for (field, value) in value.as_object().unwrap() {
                one[field] = value.clone();
            }
            parse(json!({"pmem": [one]})).map(|config| config.pmem[0].mode())
        };
        assert_eq!(mode(json!({})), Ok(PmemMode::Rw));
        assert_eq!(mode(json!({"read_only": true})), Ok(PmemMode::Ro));
        assert_eq!(mode(json!({"mode": "ro"})), Ok(PmemMode::Ro));
        assert_eq!(
            mode(json!({"mode": "cow", "read_only": true})),
            Ok(PmemMode::Cow)
        );
        let error = mode(json!({"mode": "rw", "read_only": true})).unwrap_err();
        assert!(error.contains("pmem.mode"), "{error}");
    }

    #[test]
    fn a_configuration_with_pmem_is_written_as_it_was_read() {
        let config = parse(json!({"pmem": [{
            "id": "a", "path_on_host": "/disk", "root_device": true, "read_only": true, "rate_limiter": null,
            "mode": "cow", "format": "vhdx", "parents": "/bases"
        }]}))
        .unwrap();
        assert_eq!(
            parse(serde_json::to_value(&config).unwrap()).unwrap(),
            config
        );
    }

    #[test]
    fn devices_have_names_of_their_own_an_interrupt_line_each_and_one_root_with_the_drives() {
        let root = |id: &str| json!({"id": id, "path_on_host": "/disk", "root_device": true});
        let drive = |id: String, is_root: bool| json!({"drive_id": id, "path_on_host": "/disk", "is_root_device": is_root});
        for (config, named) in [
            (json!({"pmem": [pmem("a"), pmem("a")]}), "id a"),
            (json!({"pmem": [pmem("../a")]}), "pmem.id"),
            (
                json!({"pmem": [{"id": "a", "path_on_host": ""}]}),
                "pmem.path_on_host",
            ),
            (
                json!({"pmem": [root("a"), root("b")]}),
                "pmem: b is to be the root device, but a is the root",
            ),
            (
                json!({"pmem": [root("b")], "drives": [drive("a".into(), true)]}),
                "pmem: b is to be the root device, but a is the root",
            ),
        ] {
            let error = parse(config.clone()).expect_err(&config.to_string());
            assert!(error.contains(named), "{config}: {error}");
        }
        let drives = |count: usize| {
            (0..count)
                .map(|n| drive(format!("d{n}"), false))
                .collect::<Vec<_>>()
        };
        let limit = crate::limits::MAX_VIRTIO_DEVICES;
        parse(json!({"drives": drives(limit - 1), "pmem": [pmem("d0")]})).unwrap();
        parse(json!({"drives": drives(limit), "pmem": [pmem("a")]})).unwrap_err();
    }
}
