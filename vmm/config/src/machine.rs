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
    /// Whether each core has two threads. The number of vCPUs is 1 or even then.
    #[serde(default)]
    pub smt: bool,
    /// The CPU that the guest sees; the host's where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_template: Option<CpuTemplate>,
    /// After a full snapshot the guest goes on from its memory file, so that it can be saved as a difference to that.
    #[serde(default)]
    pub track_dirty_pages: bool,
    /// How RAM is backed.
    #[serde(default)]
    pub huge_pages: HugePageConfig,
}

/// Firecracker's static CPU templates: the features that a processor has in common with others, so that a guest can go
/// on from its snapshot on any of them. Each is for certain processors, and a guest does not start on others.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub enum CpuTemplate {
    /// The host's CPU.
    #[default]
    None,
    /// For Intel Skylake, Cascade Lake and Ice Lake: as EC2's C3 instances.
    C3,
    /// For Intel Skylake, Cascade Lake and Ice Lake: as EC2's T2 instances.
    T2,
    /// For Intel Skylake and Cascade Lake: T2, with the mitigations that both need.
    T2S,
    /// For Intel Cascade Lake and Ice Lake: as AMD Milan with T2A.
    T2CL,
    /// For AMD Milan: as Intel Cascade Lake with T2CL.
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
    /// Huge pages of 2 MiB that the host has reserved (hugetlbfs). RAM is then no file's page, so that it is not shared
    /// with other guests, whatever `sharing` says.
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
        if self.smt && self.vcpu_count > 1 && !self.vcpu_count.is_multiple_of(2) {
            return Err(ConfigError::invalid(
                "machine-config.vcpu_count",
                &self.vcpu_count,
                "1 or even, as machine-config.smt is true",
            ));
        }
        if self.has_hugetlbfs() && !self.mem_size_mib.is_multiple_of(2) {
            return Err(ConfigError::invalid(
                "machine-config.mem_size_mib",
                &self.mem_size_mib,
                "a multiple of 2, as machine-config.huge_pages is 2M",
            ));
        }
        Ok(())
    }

    /// Whether RAM is in huge pages that the host has reserved.
    pub fn has_hugetlbfs(&self) -> bool {
        self.huge_pages == HugePageConfig::Hugetlbfs2M
    }

    /// Whether there is a template other than `None`.
    pub(crate) fn has_cpu_template(&self) -> bool {
        self.cpu_template.unwrap_or_default() != CpuTemplate::None
    }

    /// The same without the template `None`, which Firecracker does not show either.
    pub(crate) fn without_none(self) -> Self {
        let cpu_template = self.cpu_template.filter(|_| self.has_cpu_template());
        Self {
            cpu_template,
            ..self
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
