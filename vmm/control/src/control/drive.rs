//! The drives of a guest, before and after its start.

use std::path::{Path, PathBuf};

use super::{Control, ControlError, Life};
use config::{
    ConfiguredDevice, DeviceConfig, DriveConfig, DriveFormat, DriveUpdate, PmemConfig, PmemUpdate,
    VmConfig,
};
use jail::Layer;
use machine::{DriveParent, DriveTask, JobStatus, MachineError};

/// The drive that an update is about, with the update.
pub(crate) fn updated_drive(
    config: &VmConfig,
    update: DriveUpdate,
) -> Result<DriveConfig, ControlError> {
    let id = &update.drive_id;
    let present = config.drives.iter().find(|drive| drive.drive_id == *id);
    let present = present.ok_or_else(|| ControlError::NoDrive(id.clone()))?;
    Ok(update.applied_to(present)?)
}

/// The pmem device that an update is about, with the update.
pub(crate) fn updated_pmem(
    config: &VmConfig,
    update: PmemUpdate,
) -> Result<PmemConfig, ControlError> {
    let present = config.pmem.iter().find(|pmem| pmem.id == update.id);
    match present {
        Some(present) => Ok(update.applied_to(present)),
        None => Err(MachineError::NoPmem(update.id).into()),
    }
}

impl Control {
    /// Takes the files of drives into the configuration to which commits have moved them since the last call.
    pub(super) fn note_commits(&mut self) {
        let Life::Started { guest, .. } = &self.life else {
            return;
        };
        for drive in &mut self.config.drives {
            if let Ok(JobStatus {
                path_on_host: Some(path),
                ..
            }) = guest.job(&drive.drive_id)
                && self.noted.get(&drive.drive_id) != Some(&path)
            {
                drive.path_on_host.clone_from(&path);
                drive.format = Some(DriveFormat::Vhdx);
                self.noted.insert(drive.drive_id.clone(), path);
            }
        }
    }

    /// `PATCH /drives/{id}`: gives a drive of a started guest another file, or other limits.
    ///
    /// # Errors
    /// `BeforeStart`, `Ended`, `NoDrive`, `Config`, `Jailed`, `Machine`; what comes before it may be done, and the file
    /// comes before the limits.
    pub fn update_drive(&mut self, update: &DriveUpdate) -> Result<(), ControlError> {
        self.guest()?;
        self.note_commits();
        // All of it is checked before any of it is done.
        updated_drive(&self.config, update.clone())?;
        if update.path_on_host.is_some() {
            self.replace_drive(DriveUpdate {
                rate_limiter: None,
                ..update.clone()
            })?;
        }
        let Some(limiter) = update.rate_limiter else {
            return Ok(());
        };
        let (guest, _) = self.guest()?;
        guest.limit_drive(&update.drive_id, limiter.update())?;
        let limits = DriveUpdate {
            path_on_host: None,
            ..update.clone()
        };
        updated_drive(&self.config, limits)?.store(&mut self.config);
        Ok(())
    }

    fn replace_drive(&mut self, update: DriveUpdate) -> Result<(), ControlError> {
        let drive = updated_drive(&self.config, update)?;
        let seen = drive.check_files();
        if self.jail.contains(Layer::Tree) {
            seen.map_err(ControlError::Jailed)?;
        } else {
            seen?;
        }
        self.guest()?.0.replace_drive(&drive)?;
        drive.store(&mut self.config);
        Ok(())
    }

    /// `PATCH /pmem/{id}`: gives a pmem device of a started guest other limits.
    ///
    /// # Errors
    /// `BeforeStart`, `Ended`, `Machine`.
    pub fn update_pmem(&mut self, update: PmemUpdate) -> Result<(), ControlError> {
        self.guest()?;
        let limiter = update.rate_limiter.unwrap_or_default();
        let pmem = updated_pmem(&self.config, update)?;
        self.guest()?.0.limit_pmem(&pmem.id, limiter.update())?;
        pmem.store(&mut self.config);
        Ok(())
    }

    /// The file of a drive of a started guest.
    fn drive_path(&mut self, id: &str) -> Result<PathBuf, ControlError> {
        self.guest()?;
        self.note_commits();
        let drive = self.config.drives.iter().find(|drive| drive.drive_id == id);
        drive
            .map(|drive| drive.path_on_host.clone())
            .ok_or_else(|| ControlError::NoDrive(id.to_owned()))
    }

    /// `PUT /drives/{id}/snapshot`: the disk goes on in a new file, and the old one stays as it is.
    ///
    /// # Errors
    /// `BeforeStart`, `Ended`, `NoDrive`, `Machine`.
    pub fn snapshot_drive(&mut self, id: &str, new: &Path) -> Result<(), ControlError> {
        let path = self.drive_path(id)?;
        self.guest()?.0.snapshot_drive(id, &path, new)?;
        self.config.set_vhdx(id, new);
        Ok(())
    }

    /// `PUT /pmem/{id}/snapshot`: the disk goes on in a new file, and the old one stays as it is.
    ///
    /// # Errors
    /// `BeforeStart`, `Ended`, `Machine`.
    pub fn snapshot_pmem(&mut self, id: &str, new: &Path) -> Result<(), ControlError> {
        self.guest()?;
        let pmem = self.config.pmem.iter().find(|pmem| pmem.id == id);
        let path = pmem.map(|pmem| pmem.path_on_host.clone());
        let path = path.ok_or_else(|| MachineError::NoPmem(id.to_owned()))?;
        self.guest()?.0.snapshot_pmem(id, &path, new)?;
        for pmem in &mut self.config.pmem {
            if pmem.id == id {
                new.clone_into(&mut pmem.path_on_host);
                pmem.format = Some(DriveFormat::Vhdx);
            }
        }
        Ok(())
    }

    /// `GET /drives/{id}/parent`: what its disk stands on.
    ///
    /// # Errors
    /// `BeforeStart`, `Ended`, `NoDrive`, `Machine`.
    pub fn drive_parent(&mut self, id: &str) -> Result<DriveParent, ControlError> {
        let path = self.drive_path(id)?;
        Ok(self.guest()?.0.drive_parent(id, &path)?)
    }

    /// `PUT /drives/{id}/resize`: makes the disk larger.
    ///
    /// # Errors
    /// `BeforeStart`, `Ended`, `NoDrive`, `Machine`.
    pub fn resize_drive(&mut self, id: &str, size: u64) -> Result<(), ControlError> {
        self.drive_path(id)?;
        Ok(self.guest()?.0.resize_drive(id, size)?)
    }

    /// `PUT /drives/{id}/compact`: starts the job.
    ///
    /// # Errors
    /// `BeforeStart`, `Ended`, `NoDrive`, `Machine`.
    pub fn compact_drive(&mut self, id: &str, find_zeros: bool) -> Result<(), ControlError> {
        self.drive_path(id)?;
        let task = DriveTask::Compact { find_zeros };
        Ok(self.guest()?.0.start_job(id, task)?)
    }

    /// `PUT /drives/{id}/commit`: starts the job.
    ///
    /// # Errors
    /// `BeforeStart`, `Ended`, `NoDrive`, `Machine`.
    pub fn commit_drive(&mut self, id: &str) -> Result<(), ControlError> {
        let top = self.drive_path(id)?;
        self.noted.remove(id);
        Ok(self.guest()?.0.start_job(id, DriveTask::Commit { top })?)
    }

    /// `GET /drives/{id}/job`: the last job of the drive.
    ///
    /// # Errors
    /// `BeforeStart`, `Ended`, `NoDrive`, `Machine`.
    pub fn job(&mut self, id: &str) -> Result<JobStatus, ControlError> {
        self.drive_path(id)?;
        Ok(self.guest()?.0.job(id)?)
    }

    /// `PUT /drives/{id}/job`: asks the job to stop.
    ///
    /// # Errors
    /// `BeforeStart`, `Ended`, `NoDrive`, `Machine`.
    pub fn cancel_job(&mut self, id: &str) -> Result<(), ControlError> {
        self.drive_path(id)?;
        Ok(self.guest()?.0.cancel_job(id)?)
    }
}
