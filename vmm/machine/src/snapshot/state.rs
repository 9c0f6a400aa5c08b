//! Everything that is saved of a guest but its memory.

use std::collections::BTreeMap;
use std::sync::Arc;

use devices::device_list::DeviceStates;
use serde::{Deserialize, Serialize};
use storage::Disk;

use super::disks::{DiskIdentity, DiskOf, DriveState};
use super::error::SnapshotError;
use super::memory::MemoryState;
use config::VmConfig;
use kvm::vm::{VcpuState, VmState};

/// Everything that is saved of a guest but its memory.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct GuestState {
    /// What it was started with, and has been changed to since.
    pub config: VmConfig,
    pub vm: VmState,
    pub vcpus: Vec<VcpuState>,
    pub devices: DeviceStates,
    pub drives: Vec<DriveState>,
    /// By id. Absent in snapshots of versions that did not save these identities.
    #[serde(default)]
    pub pmem: BTreeMap<String, DiskIdentity>,
    pub memory: MemoryState,
}

impl GuestState {
    /// Checks that a disk is the one that the device had. A device without a saved identity may have any disk.
    ///
    /// # Errors
    /// `OtherDisk`.
    pub(crate) fn check_disk(
        &self,
        device: DiskOf<'_>,
        disk: &Arc<dyn Disk>,
    ) -> Result<(), SnapshotError> {
        let saved = match device {
            DiskOf::Drive(id) => {
                let drive = self.drives.iter().find(|drive| drive.drive_id == id);
                drive.map(|drive| &drive.disk)
            }
            DiskOf::Pmem(id) => self.pmem.get(id),
        };
        let Some(saved) = saved else {
            return Ok(());
        };
        let found = DiskIdentity::of(disk);
        if found.as_ref() == Some(saved) {
            return Ok(());
        }
        Err(SnapshotError::OtherDisk {
            device: device.to_string(),
            saved: saved.to_string(),
            found: found.map_or_else(|| "unknown".to_owned(), |found| found.to_string()),
        })
    }

    /// Removes the identity of a device's disk, because the device gets a new one.
    pub(super) fn forget_disk(&mut self, device: DiskOf<'_>) {
        match device {
            DiskOf::Drive(id) => self.drives.retain(|drive| drive.drive_id != id),
            DiskOf::Pmem(id) => drop(self.pmem.remove(id)),
        }
    }
}
