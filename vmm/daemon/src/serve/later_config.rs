//! The later configuration of a guest: what the operator has changed over the guest's own API, as far as it is to
//! outlive the guest's process. That is the guest's configuration and its metadata.
//!
//! ```text
//! request ── passed on ──> the guest's process ── done ──> asked for its whole configuration
//!                                                              ──> vm.json ──> response to the caller
//! ```
//!
//! So every change that a caller was told is done is in the configuration that the guest is started with from then on,
//! in whichever process. Only the process knows what a change comes to, so the daemon asks it for the outcome, and does
//! not work that out again. Actions of the process (to pause, to save, to work on a disk) are not kept; the disks that
//! a guest has after those are recorded by `pending` and `commits`.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Map, Value};
use tokio::time::sleep;

use super::daemon::Daemon;
use super::fault::Fault;
use super::identity::OWN_PART;
use super::proxy;
use super::store;
use super::task::blocking;
use super::vm::Vm;
use config::VmConfig;
use host::report::chain;

/// Between two requests to a process that does not answer.
const RETRY: Duration = Duration::from_secs(5);

/// The files of a configuration that may be images, by their use.
fn files(config: &mut VmConfig) -> Vec<((&'static str, String), &mut PathBuf)> {
    let mut files = Vec::new();
    if let Some(source) = &mut config.boot_source {
        let kernel = &mut source.kernel_image_path;
        files.push((("kernel", String::new()), kernel));
        let initrd = source.initrd_path.as_mut();
        files.extend(initrd.map(|path| (("initrd", String::new()), path)));
    }
    for drive in &mut config.drives {
        files.push((("drive", drive.drive_id.clone()), &mut drive.path_on_host));
    }
    for pmem in &mut config.pmem {
        files.push((("pmem", pmem.id.clone()), &mut pmem.path_on_host));
    }
    files
}

/// Replaces files in `config` by the names of images that they have in `named`, as far as they still are the files of
/// `given`, the same configuration with paths. Gives the names.
fn name_images(config: &mut VmConfig, mut given: VmConfig, mut named: VmConfig) -> Vec<String> {
    let (given, named) = (files(&mut given), files(&mut named));
    let mut names = BTreeSet::new();
    for (what, path) in files(config) {
        let of = |files: &[((&str, String), &mut PathBuf)]| {
            let found = files.iter().find(|(other, _)| *other == what);
            found.map(|(_, path)| (*path).clone())
        };
        let (Some(was), Some(name)) = (of(&given), of(&named)) else {
            continue;
        };
        let image = name.to_str().and_then(|name| name.strip_prefix("image:"));
        if let Some(image) = image.filter(|_| was == *path) {
            names.insert(image.to_owned());
            *path = name;
        }
    }
    names.into_iter().collect()
}

impl Daemon {
    /// Asks the process of a guest for the guest's configuration, and records it. The caller has locked
    /// `reconfiguring`, so that it does not change meanwhile.
    ///
    /// # Errors
    /// Where the process does not answer; `Store`.
    pub async fn record_later_config(self: &Arc<Self>, vm: &Arc<Vm>) -> Result<(), Fault> {
        // The disks of these drives are recorded where their operations end.
        let mut under_way: BTreeSet<String> = vm.now().pending.disks().cloned().collect();
        let mut config: VmConfig = proxy::get(vm, "/vm/config").await?;
        let mut metadata: Map<String, Value> = proxy::get(vm, "/mmds").await?;
        metadata.remove(OWN_PART);
        let path = vm.folder.join("config.json");
        let given = blocking(move || store::read::<VmConfig>(&path)).await?;
        let given = given.map_err(Fault::Store)?.unwrap_or_default();
        let paths = config.clone();
        let is_as_given = config == given;
        let named = match (&vm.now().later.config, &vm.spec.config) {
            (Some(later), _) => (**later).clone(),
            (None, Some(config)) => serde_json::from_value(config.clone())?,
            (None, None) => VmConfig::default(),
        };
        let images = name_images(&mut config, given, named);
        let is_changed = vm.change(|now| {
            let before = (now.later.clone(), now.disks.clone());
            if now.later.config.is_some() || !is_as_given {
                now.later.config = Some(Box::new(config));
                now.images = images;
            }
            let as_made = vm.spec.metadata.clone().unwrap_or_default();
            if now.later.metadata.is_some() || metadata != as_made {
                now.later.metadata = Some(metadata);
            }
            under_way.extend(now.pending.disks().cloned());
            let mut paths = paths;
            for (id, disk) in &mut now.disks {
                if let Some(path) = paths.disk_mut(id).filter(|_| !under_way.contains(id)) {
                    *disk = vm.folder.join(path);
                }
            }
            if let Some(vsock) = &paths.vsock {
                now.cid = vsock.guest_cid.or(now.cid).or(Some(vsock.cid()));
            }
            before != (now.later.clone(), now.disks.clone())
        });
        if is_changed {
            self.try_save(vm).await?;
        }
        Ok(())
    }

    /// As [`Daemon::record_later_config`], after a change that was made, or may have been. Where it fails, it is tried
    /// again as long as the guest has a process.
    pub async fn keep_later_config(self: &Arc<Self>, vm: &Arc<Vm>) {
        let Err(fault) = self.record_later_config(vm).await else {
            return;
        };
        tracing::warn!(vm = %vm.id, fault = %chain(&fault), "a change of a guest's configuration is not in its record yet");
        let (daemon, vm) = (self.clone(), vm.clone());
        tokio::spawn(async move {
            loop {
                sleep(RETRY).await;
                let _reconfiguring = vm.reconfiguring.lock().await;
                if vm.now().process.is_none() || daemon.record_later_config(&vm).await.is_ok() {
                    return;
                }
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use config::DriveConfig;

    #[test]
    fn an_image_keeps_its_name_until_its_place_is_taken_by_a_file() {
        let with = |root: &str, data: &str| {
            let mut config = VmConfig::default();
            config.set_drive(DriveConfig::new("root", root));
            config.set_drive(DriveConfig::new("data", data));
            config
        };
        let (named, given) = (
            with("image:debian", "image:data"),
            with("/debian.vhdx", "/d"),
        );
        let mut config = with("/debian.vhdx", "/other");
        config.set_drive(DriveConfig::new("new", "/d"));
        let mut expected = with("image:debian", "/other");
        expected.set_drive(DriveConfig::new("new", "/d"));
        assert_eq!(name_images(&mut config, given, named), ["debian"]);
        assert_eq!(config, expected);
    }
}
