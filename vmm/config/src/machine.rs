//! Memory and vCPUs.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::ConfigError;
use crate::limits::MAX_VCPUS;

/// The range of RAM of a guest in MiB: the boot structures take the first MiB, and no host has more than 16 TiB.
const MEM_MIB: std::ops::RangeInclusive<u32> = 2..=(1 << 24);

/// Firecracker's `machine-config`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MachineConfig {
    /// vCPUs, 1 to 32.
    pub vcpu_count: u8,
    /// RAM in MiB.
    pub mem_size_mib: u32,
    /// Not supported: refused unless `false`.
    #[serde(default)]
    pub smt: bool,
    /// Not supported: refused unless `None`.
    #[serde(default)]
    pub cpu_template: Option<CpuTemplate>,
    /// After a full snapshot the guest goes on from its memory file, so that it can be saved as a difference to that.
    #[serde(default)]
    pub track_dirty_pages: bool,
    /// How RAM is backed; `2M` is not supported.
    #[serde(default)]
    pub huge_pages: HugePageConfig,
}

/// Firecracker's static CPU templates.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub enum CpuTemplate {
    /// The host's CPU.
    #[default]
    None,
    /// Not supported.
    C3,
    /// Not supported.
    T2,
    /// Not supported.
    T2S,
    /// Not supported.
    T2CL,
    /// Not supported.
    T2A,
}

/// Firecracker's `huge_pages`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub enum HugePageConfig {
    /// Pages of 4 KiB: a guest is charged for what it touches.
    #[default]
    None,
    /// Huge pages where the host gives them: fewer faults and TLB misses, more RAM.
    Transparent,
    /// Not supported.
    #[serde(rename = "2M")]
    Hugetlbfs2M,
}

impl Default for MachineConfig {
    fn default() -> Self {
        Self {
            vcpu_count: 1,
            mem_size_mib: 128,
            smt: false,
            cpu_template: None,
            track_dirty_pages: false,
            huge_pages: HugePageConfig::None,
        }
    }
}

impl MachineConfig {
    /// Checks the fields.
    ///
    /// # Errors
    /// `Unsupported`, `Invalid`.
    pub fn validate(&self) -> Result<(), ConfigError> {
        if !(1..=MAX_VCPUS).contains(&self.vcpu_count) {
            let expected = format!("1 to {MAX_VCPUS}");
            return Err(ConfigError::invalid(
                "machine-config.vcpu_count",
                &self.vcpu_count,
                expected,
            ));
        }
        if !MEM_MIB.contains(&self.mem_size_mib) {
            let expected = format!("{} to {}", MEM_MIB.start(), MEM_MIB.end());
            return Err(ConfigError::invalid(
                "machine-config.mem_size_mib",
                &self.mem_size_mib,
                expected,
            ));
        }
        let unsupported = [
            (self.smt, "machine-config.smt"),
            (
                self.cpu_template.unwrap_or_default() != CpuTemplate::None,
                "machine-config.cpu_template",
            ),
            (
                self.huge_pages == HugePageConfig::Hugetlbfs2M,
                "machine-config.huge_pages",
            ),
        ];
        match unsupported.into_iter().find(|(asked, _)| *asked) {
            Some((_, field)) => Err(ConfigError::Unsupported { field }),
            None => Ok(()),
        }
    }

    /// This configuration with the fields of `update` that are set. `null` sets nothing.
    ///
    /// # Errors
    /// `Shape`, `EmptyUpdate`, and those of [`MachineConfig::validate`].
    pub fn updated(&self, update: &Value) -> Result<Self, ConfigError> {
        let mut merged = serde_json::to_value(self).map_err(ConfigError::Shape)?;
        let mut changed = false;
        if let (Value::Object(merged), Value::Object(update)) = (&mut merged, update) {
            for (field, value) in update.iter().filter(|(_, value)| !value.is_null()) {
                merged.insert(field.clone(), value.clone());
                changed = true;
            }
        }
        if !changed {
            return Err(ConfigError::EmptyUpdate);
        }
        let updated: Self = serde_json::from_value(merged).map_err(ConfigError::Shape)?;
        updated.validate()?;
        Ok(updated)
    }
}
