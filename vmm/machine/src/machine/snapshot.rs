//! Saves a machine that is paused.

use std::collections::BTreeMap;

use devices::virtio::block::VirtioBlock;

use super::{Machine, lock};
use crate::snapshot::{
    self, DiskIdentity, DiskOf, DriveState, GivenLayers, GuestState, MemoryState, SnapshotError,
};
use config::{CreateSnapshot, SnapshotType, VmConfig};

impl Machine {
    /// Saves the guest, which is paused and was started with `config`.
    ///
    /// # Errors
    /// [`SnapshotError`]; then there is no new file, and the guest can be resumed.
    pub fn snapshot(
        &mut self,
        request: &CreateSnapshot,
        config: &VmConfig,
    ) -> Result<(), SnapshotError> {
        let unsupported = |what: String| Err(SnapshotError::Unsupported(what));
        if self.served.is_some() && request.snapshot_type == SnapshotType::Diff {
            return Err(SnapshotError::NoFileBelow);
        }
        for (id, job) in &self.jobs {
            if !job.is_over() {
                return unsupported(format!(
                    "drive {id}: {} is under way; wait for it, or cancel it",
                    job.name()
                ));
            }
        }
        // Huge pages are not mapped from files, so nothing tells which of them differ from a file: a difference has
        // them all.
        let in_huge_pages = config.machine_config.has_hugetlbfs();
        let whole = CreateSnapshot {
            snapshot_type: SnapshotType::Full,
            ..request.clone()
        };
        let request = if in_huge_pages { &whole } else { request };
        let (drives, pmem) = self.identify_disks()?;
        let (vm, vcpus) = self.vcpus.save()?;
        let devices = self.devices.save()?;
        let windows = self.pmem.iter().map(|(id, pmem)| (&**id, pmem.memory()));
        let ram = self.shared_memory();
        let (memory, file) = snapshot::write_memory(ram, windows, request, self.base.as_ref())?;
        let own = file.path().to_owned();
        let state = GuestState {
            config: config.clone(),
            vm,
            vcpus,
            devices,
            drives,
            pmem,
            memory,
        };
        snapshot::write_state(&request.snapshot_path, &state, file)?;
        let is_replaced = |base: &MemoryState| base.layers.iter().any(|layer| layer.path == own);
        match &self.base {
            // The new file has replaced one that the guest's memory is a delta to, so the delta is to be to the new
            // file from now on.
            Some(base) if is_replaced(base) => self.go_on_from(state.memory),
            None if config.machine_config.track_dirty_pages
                && request.is_base
                && !in_huge_pages =>
            {
                self.go_on_from(state.memory)
            }
            Some(_) | None => Ok(()),
        }
    }

    /// Writes to the disks all that the guest has written, and returns their identities.
    fn identify_disks(
        &self,
    ) -> Result<(Vec<DriveState>, BTreeMap<String, DiskIdentity>), SnapshotError> {
        let drives = self.devices.all::<VirtioBlock>();
        let drives = drives.map(|(id, drive)| {
            Ok(DriveState {
                drive_id: id.to_owned(),
                disk: DiskOf::Drive(id).identify(lock(&drive).disk())?,
            })
        });
        let pmem = self.pmem.iter().map(|(id, pmem)| {
            // The pages that the guest wrote are no part of RAM, so they have to be on the disk before its identity is
            // taken.
            pmem.write_back()
                .map_err(|source| SnapshotError::Writeback {
                    pmem: id.clone(),
                    source,
                })?;
            Ok((id.clone(), DiskOf::Pmem(id).identify(&pmem.disk())?))
        });
        Ok((
            drives.collect::<Result<_, SnapshotError>>()?,
            pmem.collect::<Result<_, SnapshotError>>()?,
        ))
    }

    /// Maps the saved memory in place of the guest's, which holds the same, so that the guest's later writes can be
    /// distinguished from it.
    fn go_on_from(&mut self, saved: MemoryState) -> Result<(), SnapshotError> {
        saved
            .clone()
            .open(GivenLayers::default(), false)?
            .rebase(self.shared_memory())?;
        self.base = Some(saved);
        // No page is left that the page-fault handler has to provide.
        self.served = None;
        Ok(())
    }
}
