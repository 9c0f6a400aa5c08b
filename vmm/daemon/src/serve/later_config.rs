//! The later settings of a guest: what the operator has changed over the guest's own API, as far as it is to outlive
//! the guest's process. That is the guest's configuration and its metadata.
//!
//! ```text
//! request ──> applied to the settings on record ──> passed on to the guest's process ── done
//!         ──> vm.json ──> response to the caller
//! ```
//!
//! So every change that a caller was told is done is in the settings that the guest is started with from then on, in
//! whichever process. They are made of the operator's requests alone: the process is asked whether it has accepted a
//! request, and never what its configuration is, since a guest may have taken it over. Where the process gives no
//! answer, the request counts as accepted, as the operator has asked for it. Actions of the process (to pause, to save,
//! to work on a disk) are not kept; the disks that a guest has after those are recorded by `pending` and `commits`.

use std::path::PathBuf;
use std::sync::Arc;

use axum::http::StatusCode;
use serde_json::Value;

use super::daemon::Daemon;
use super::fault::Fault;
use super::identity::OWN_PART;
use super::record::{Interfaces, LaterConfig};
use super::vm::Vm;
use config::VmConfig;
use control::api::{DiskEffect, GuestOperation, GuestSettings};
use host::report::chain;

/// What a request makes of the settings of a guest, where the guest's process accepts it.
#[derive(Debug)]
pub struct ProposedChange {
    later: LaterConfig,
    /// Images that the configuration names.
    images: Vec<String>,
    /// The drive or pmem device that is given a disk.
    disk: Option<String>,
}

/// Whether a request that is kept gives a drive or a pmem device another disk than it has.
fn gives_disk(effect: DiskEffect, body: &[u8]) -> bool {
    match effect {
        DiskEffect::Changes => true,
        DiskEffect::MayReplace => {
            let body: Value = serde_json::from_slice(body).unwrap_or_default();
            body.get("path_on_host").is_some_and(|path| !path.is_null())
        }
        DiskEffect::None | DiskEffect::DriveChild | DiskEffect::PmemChild | DiskEffect::Merge => {
            false
        }
    }
}

impl Daemon {
    /// Works out what a request makes of the settings of a guest. The caller has locked `reconfiguring`.
    ///
    /// # Errors
    /// `Guest` where the request is wrong, as the guest's process would refuse it; those of
    /// [`VmSpec::named`](super::record::VmSpec::named).
    pub fn propose(
        &self,
        vm: &Vm,
        (operation, name): (&GuestOperation, &str),
        body: &[u8],
    ) -> Result<ProposedChange, Fault> {
        let later = vm.now().later.clone();
        let config = vm.spec.named(&later, &self.templates(), &vm.folder)?;
        let metadata = later.metadata.clone();
        let metadata = metadata.or_else(|| vm.spec.metadata.clone());
        let before = GuestSettings {
            config,
            metadata: metadata.unwrap_or_default(),
        };
        let mut after = operation
            .applied_to(&before, name, body)
            .map_err(|error| Fault::Guest(StatusCode::BAD_REQUEST, chain(&error).to_string()))?;
        after.metadata.remove(OWN_PART);
        let images = self.images_of(&after.config)?;
        let later = LaterConfig {
            config: (after.config != before.config)
                .then(|| Box::new(after.config))
                .or(later.config),
            metadata: (after.metadata != before.metadata)
                .then_some(after.metadata)
                .or(later.metadata),
        };
        let disk = gives_disk(operation.disk, body).then(|| name.to_owned());
        Ok(ProposedChange {
            later,
            images,
            disk,
        })
    }

    /// Has a guest that waits have what its interfaces get by a change. Gives what they had before.
    ///
    /// # Errors
    /// `Network`; the guest is as before then.
    pub fn plan_interfaces(&self, vm: &Vm, proposed: &ProposedChange) -> Result<Interfaces, Fault> {
        let vms = self.vms();
        let before = vm.now().interfaces.clone();
        if let Some(config) = &proposed.later.config {
            let own = (&before, &Interfaces::new());
            let others = Self::others_in_networks(&vm.id, &vms);
            let planned = self.networks.plan(&vm.id, config, own, &others)?;
            vm.change(|now| now.interfaces = planned);
        }
        Ok(before)
    }

    /// Ends what [`Daemon::plan_interfaces`] began: the guest has either what that gave it, or what it had `before`.
    pub fn settle_interfaces(&self, vm: &Vm, before: &Interfaces, is_done: bool) {
        if is_done {
            let now = vm.now().interfaces.clone();
            self.networks.give_back(before, &now);
        } else {
            let planned = vm.change(|now| std::mem::replace(&mut now.interfaces, before.clone()));
            self.networks.give_back(&planned, before);
        }
    }

    /// Records a change that the process of a guest has accepted.
    ///
    /// # Errors
    /// `Store`; the next record of the guest has it.
    pub async fn accept(
        self: &Arc<Self>,
        vm: &Arc<Vm>,
        proposed: ProposedChange,
    ) -> Result<(), Fault> {
        let ProposedChange {
            later,
            images,
            disk,
        } = proposed;
        let is_changed = vm.change(|now| {
            let is_changed = now.later != later;
            (now.later, now.images) = (later, images);
            // The configuration says which disk it is from now on.
            let replaced = disk.and_then(|disk| now.disks.remove(disk.as_str()));
            is_changed || replaced.is_some()
        });
        if is_changed {
            self.try_save(vm).await?;
        }
        Ok(())
    }

    /// The configuration on record of a guest, with the whole paths of the disks that it has.
    ///
    /// # Errors
    /// Those of [`Daemon::config_of`].
    pub fn config_with_whole_paths(&self, vm: &Vm) -> Result<VmConfig, Fault> {
        let mut config = self.config_of(vm)?;
        let drives = config
            .drives
            .iter_mut()
            .map(|drive| &mut drive.path_on_host);
        let pmem = config.pmem.iter_mut().map(|pmem| &mut pmem.path_on_host);
        let whole = |path: &mut PathBuf| *path = vm.folder.join(&path);
        drives.chain(pmem).for_each(whole);
        Ok(config)
    }
}

#[cfg(test)]
mod tests {
    use control::api::find_operation;

    use super::*;

    #[test]
    fn other_limits_leave_the_disk_on_record_and_another_file_does_not() {
        let gives = |method, path, body: &str| {
            let (operation, _) = find_operation(method, path).unwrap();
            gives_disk(operation.disk, body.as_bytes())
        };
        let limits = r#"{"drive_id": "a", "rate_limiter": {}, "path_on_host": null}"#;
        assert!(!gives("PATCH", "/drives/a", limits));
        let file = r#"{"drive_id": "a", "rate_limiter": {}, "path_on_host": "/d"}"#;
        assert!(gives("PATCH", "/drives/a", file));
        assert!(gives("PUT", "/drives/a", file));
        assert!(!gives(
            "PATCH",
            "/pmem/a",
            r#"{"id": "a", "rate_limiter": {}}"#
        ));
    }
}
