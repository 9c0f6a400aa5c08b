//! Saves a machine that stands still, and gives the devices of another their state.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use devices::legacy::{CmosRtc, I8042, SerialConsole};
use devices::persist::RestoreError;
use devices::virtio::balloon::VirtioBalloon;
use devices::virtio::block::VirtioBlock;
use devices::virtio::mmio::MmioTransport;
use devices::virtio::rng::VirtioRng;
use devices::virtio::vsock::VirtioVsock;
use devices::vmgenid::VmGenId;

use super::{Machine, lock};
use crate::pmem::Pmem;
use crate::snapshot::{
    self, DevicesState, DiskIdentity, DiskOf, DriveState, GuestState, MemoryState, SnapshotError,
};
use config::VmConfig;
use config::{CreateSnapshot, SnapshotType};

/// The devices that a state is of.
pub(super) struct Devices<'a> {
    pub(super) serial: &'a SerialConsole,
    pub(super) keyboard: &'a Mutex<I8042>,
    pub(super) rtc: &'a Mutex<CmosRtc>,
    pub(super) generation: &'a mut VmGenId,
    pub(super) drives: &'a BTreeMap<String, Arc<Mutex<VirtioBlock>>>,
    pub(super) pmem: BTreeMap<&'a str, &'a Pmem>,
    pub(super) entropy: Option<&'a Mutex<VirtioRng>>,
    pub(super) balloon: Option<&'a Mutex<VirtioBalloon>>,
    pub(super) vsock: Option<&'a Mutex<VirtioVsock>>,
    pub(super) transports: &'a [Arc<Mutex<MmioTransport>>],
}

/// Why a saved set of devices is not the present one.
fn differ(what: &str) -> SnapshotError {
    SnapshotError::Contradiction(format!(
        "the devices are others than those configured: {what}"
    ))
}

/// Gives the members of one set the states of the members with the same names in another.
fn restore_each<S, D: ?Sized>(
    what: &str,
    saved: &BTreeMap<String, S>,
    present: impl ExactSizeIterator<Item = (String, impl std::ops::Deref<Target = D>)>,
    restore: impl Fn(&D, &S) -> Result<(), RestoreError>,
) -> Result<(), super::StartError> {
    if saved.len() != present.len() {
        return Err(differ(what).into());
    }
    for (id, device) in present {
        let state = saved.get(&id).ok_or_else(|| differ(what))?;
        restore(&device, state)?;
    }
    Ok(())
}

impl Machine {
    /// The state of its devices, which stand still.
    fn devices_state(&self) -> DevicesState {
        let machine = self;
        let drives = machine.drives.iter();
        let pmem = machine.pmem.iter();
        DevicesState {
            serial: machine.console.save(),
            keyboard: lock(&machine.keyboard).save(),
            rtc: lock(&machine.rtc).save(),
            generation: machine.generation.save(),
            drives: drives
                .map(|(id, drive)| (id.clone(), lock(drive).save()))
                .collect(),
            pmem: pmem
                .map(|(id, pmem)| (id.clone(), lock(pmem.device()).save()))
                .collect(),
            entropy: machine.entropy.as_ref().map(|device| lock(device).save()),
            balloon: machine.balloon.as_ref().map(|device| lock(device).save()),
            vsock: machine
                .vsock
                .as_ref()
                .map(|vsock| lock(&vsock.device).save()),
            transports: machine.transports.iter().map(|t| lock(t).save()).collect(),
        }
    }
}

impl Devices<'_> {
    /// Gives devices that have just been made their state; they are paused then.
    pub(super) fn restore(&mut self, state: &DevicesState) -> Result<(), super::StartError> {
        self.serial.restore(&state.serial)?;
        lock(self.keyboard).restore(&state.keyboard)?;
        lock(self.rtc).restore(&state.rtc)?;
        self.generation.restore(&state.generation)?;
        let drives = self.drives.iter().map(|(id, drive)| (id.clone(), &**drive));
        restore_each("drives", &state.drives, drives, |drive, state| {
            lock(drive).restore(state)
        })?;
        let pmem = self.pmem.iter().map(|(id, pmem)| ((*id).to_owned(), *pmem));
        restore_each("pmem", &state.pmem, pmem, |pmem, state| {
            lock(pmem.device()).restore(state)
        })?;
        match (self.entropy, &state.entropy) {
            (Some(device), Some(state)) => lock(device).restore(state)?,
            (None, None) => {}
            (Some(_), None) | (None, Some(_)) => return Err(differ("entropy").into()),
        }
        match (self.balloon, &state.balloon) {
            (Some(device), Some(state)) => lock(device).restore(state)?,
            (None, None) => {}
            (Some(_), None) | (None, Some(_)) => return Err(differ("balloon").into()),
        }
        match (self.vsock, &state.vsock) {
            (Some(device), Some(state)) => lock(device).restore(state)?,
            (None, None) => {}
            (Some(_), None) | (None, Some(_)) => return Err(differ("vsock").into()),
        }
        if self.transports.len() != state.transports.len() {
            return Err(differ("virtio transports").into());
        }
        for (transport, state) in self.transports.iter().zip(&state.transports) {
            lock(transport).restore(state)?;
        }
        Ok(())
    }
}

impl Machine {
    /// Saves the guest, which is paused and was started with `config`.
    ///
    /// # Errors
    /// [`SnapshotError`]; then there is no new file, and the guest can go on all the same.
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
        let (drives, pmem) = self.identify_disks()?;
        let (vm, vcpus) = self.vcpus.save()?;
        let devices = self.devices_state();
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
            // A difference to what had that name would be laid upon what has it now.
            Some(base) if is_replaced(base) => self.go_on_from(state.memory),
            None if config.machine_config.track_dirty_pages && request.is_base => {
                self.go_on_from(state.memory)
            }
            Some(_) | None => Ok(()),
        }
    }

    /// Brings to the disks all that the guest has written, and notes which they are.
    fn identify_disks(
        &self,
    ) -> Result<(Vec<DriveState>, BTreeMap<String, DiskIdentity>), SnapshotError> {
        let drives = self.drives.iter().map(|(id, drive)| {
            Ok(DriveState {
                drive_id: id.clone(),
                disk: DiskOf::Drive(id).identify(lock(drive).disk())?,
            })
        });
        let pmem = self.pmem.iter().map(|(id, pmem)| {
            // The pages that the guest wrote are its own, and no part of RAM: the disk has to have them before it is noted.
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

    /// Puts the saved memory in place of the guest's, which is the same, so that what the guest writes from now on can be told from it.
    fn go_on_from(&mut self, saved: MemoryState) -> Result<(), SnapshotError> {
        saved
            .clone()
            .open(None, false)?
            .rebase(self.shared_memory())?;
        self.base = Some(saved);
        // No page is left that another process gives.
        self.served = None;
        Ok(())
    }

    /// Raises what was pending in a state from a snapshot, and tells the guest that it is another now.
    pub(super) fn raise_pending(&self) {
        self.console.raise_pending();
        lock(&self.keyboard).raise_pending();
        self.generation.notify();
    }
}
