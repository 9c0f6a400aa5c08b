//! What a guest was told over its own API that is to outlive its process: its configuration, and its metadata.
//!
//! ```text
//! request ── passed on ──> the guest's process ── done ──> asked for all that it knows ──> vm.json ──> answered
//! ```
//!
//! So what its API has answered to is what the guest is started with from then on, in whichever process. Which change means what is the process's to
//! say, and is not told twice. What only the process itself can be asked to do (to pause, to save, to work on a disk) is not kept; which
//! disks a guest has come to by that is noted by `pending` and `commits`, which know more of it.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use axum::http::Method;
use hyper::body::Bytes;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use tokio::time::sleep;

use super::Daemon;
use super::fault::Fault;
use super::identity::OWN_PART;
use super::lifecycle::blocking;
use super::proxy;
use super::store;
use super::vm::Vm;
use config::VmConfig;

/// Between looks at a process that does not answer.
const LATER: Duration = Duration::from_secs(5);

/// What a guest was told over its own API.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Told {
    /// In place of the configuration that it was made with. Images have their names here, too.
    #[serde(default)]
    pub config: Option<Box<VmConfig>>,
    /// In place of the metadata that it was made with, without the daemon's own part.
    #[serde(default)]
    pub metadata: Option<Map<String, Value>>,
}

impl Told {
    /// The socket of the vsock device, from the guest's folder.
    pub fn socket(&self) -> Option<&Path> {
        let vsock = self.config.as_ref()?.vsock.as_ref()?;
        vsock.uds_path.as_deref()
    }

    /// The configuration, as it is shown.
    pub fn shown(&self) -> Option<Value> {
        serde_json::to_value(self.config.as_ref()?).ok()
    }
}

/// Whether a change of the guest's API at `place`, its path without slashes around it, is kept.
pub fn is_kept(place: &str) -> bool {
    let mut segments = place.split('/');
    match (segments.next(), segments.next(), segments.next()) {
        (Some("drives" | "pmem"), Some(_), None)
        | (Some("balloon"), Some("statistics") | None, None)
        | (Some("mmds"), Some("config") | None, None)
        | (
            Some(
                "boot-source" | "machine-config" | "sharing" | "entropy" | "vsock" | "serial"
                | "logger" | "metrics",
            ),
            None,
            None,
        ) => true,
        (_, _, _) => false,
    }
}

/// The files of a configuration that may be images, by what they are for.
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

/// Gives the files of `config` that are those of `given` the names of images that they have in `named`. Tells the names.
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

/// What a process answers to a `GET`, as a `T`; its refusal is an error.
pub(super) async fn answered<T: DeserializeOwned>(vm: &Vm, path: &str) -> Result<T, Fault> {
    let told = proxy::ask(vm, Method::GET, path, Bytes::new(), proxy::LOOK).await?;
    if !told.status.is_success() {
        return Err(proxy::refusal(&told));
    }
    Ok(serde_json::from_slice(&told.body)?)
}

impl Daemon {
    /// Notes what the process of a guest was told. What it is told meanwhile waits: `telling` is held.
    ///
    /// # Errors
    /// Where the process does not say; `Store`.
    pub(super) async fn note_told(self: &Arc<Self>, vm: &Arc<Vm>) -> Result<(), Fault> {
        // Which disks those are is not the process's alone to say.
        let mut under_way: BTreeSet<String> = vm.now().pending.disks().cloned().collect();
        let mut config: VmConfig = answered(vm, "/vm/config").await?;
        let mut metadata: Map<String, Value> = answered(vm, "/mmds").await?;
        metadata.remove(OWN_PART);
        let path = vm.folder.join("config.json");
        let given = blocking(move || store::read::<VmConfig>(&path)).await?;
        let given = given.map_err(Fault::Store)?.unwrap_or_default();
        let paths = config.clone();
        let is_as_given = config == given;
        let named = match (&vm.now().told.config, &vm.spec.config) {
            (Some(told), _) => (**told).clone(),
            (None, Some(config)) => serde_json::from_value(config.clone())?,
            (None, None) => VmConfig::default(),
        };
        let images = name_images(&mut config, given, named);
        let is_changed = vm.change(|now| {
            let before = (now.told.clone(), now.disks.clone());
            if now.told.config.is_some() || !is_as_given {
                now.told.config = Some(Box::new(config));
                now.images = images;
            }
            let as_made = vm.spec.metadata.clone().unwrap_or_default();
            if now.told.metadata.is_some() || metadata != as_made {
                now.told.metadata = Some(metadata);
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
            before != (now.told.clone(), now.disks.clone())
        });
        if is_changed {
            self.try_save(vm).await?;
        }
        Ok(())
    }

    /// As [`Daemon::note_told`], of a change that was made, or may have been; again where that fails, as long as there is a process to ask.
    pub(super) async fn keep_told(self: &Arc<Self>, vm: &Arc<Vm>) {
        let Err(fault) = self.note_told(vm).await else {
            return;
        };
        tracing::warn!(vm = %vm.id, %fault, "what a guest was told is not in its record yet");
        let (daemon, vm) = (self.clone(), vm.clone());
        tokio::spawn(async move {
            loop {
                sleep(LATER).await;
                let _telling = vm.telling.lock().await;
                if vm.now().process.is_none() || daemon.note_told(&vm).await.is_ok() {
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

    #[test]
    fn what_configures_a_guest_is_kept_and_what_it_is_to_do_is_not() {
        for place in ["drives/a", "balloon/statistics", "mmds", "mmds/config"] {
            assert!(is_kept(place), "{place}");
        }
        for place in ["drives/a/commit", "balloon/hinting/start", "vm", "actions"] {
            assert!(!is_kept(place), "{place}");
        }
    }
}
