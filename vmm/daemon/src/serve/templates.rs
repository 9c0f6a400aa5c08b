//! Templates: guests that were saved once, and that any number of guests start as clones of. How one is made and
//! deleted is in `template_creation`.
//!
//! ```text
//! DIR/templates/NAME/state          the state of the guest without its memory
//!                   /memory         its memory, which every clone maps
//!                   /disk-DRIVE     a disk that the guest wrote to
//!                   /disk-DRIVE-parent-N   a disk that this one stands on, and that a guest could write to
//!                   /template.json  with an authentication code; without it, the next daemon removes the folder
//! ```
//!
//! All of these are new inodes that no guest's process has ever had: see `template_files`. Only those of a template
//! that an older daemon made are names of the guest's own files.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::fault::Fault;
use super::own_disks::{is_free_disk_of, own_disk};
use super::record::Interfaces;
use super::record_key::{FoundKey, RecordKey, SealedRecord};
use super::store::{self, TEMPLATE, VSOCK_SOCKET};
use super::template_files::digest_of;
use super::vm::Vm;
use config::{DeviceId, DriveOverride, LoadSnapshot, Sha256Digest, VmConfig, VsockOverride};
use host::report::chain;

/// The body of `POST /templates`.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TemplateSpec {
    /// Its name: 1 to 63 lower case letters, digits and dashes.
    #[schema(pattern = "^[a-z0-9-]{1,63}$")]
    pub id: String,
    /// The guest, which runs or is paused, and is in the same state afterwards.
    pub vm: String,
}

/// A template.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Template {
    /// Its name.
    pub id: String,
    /// The guest that it was made of.
    pub vm: String,
    /// The user who made it.
    pub uid: u32,
    /// When it was made, in ms since 1970.
    pub created_ms: u64,
    /// The template that this one's memory is a delta of: the guest was a clone of that.
    #[serde(default)]
    pub parent: Option<String>,
    /// RAM of its guests.
    pub mem_size_mib: u32,
    /// vCPUs of its guests.
    pub vcpus: u8,
    /// Bytes that its memory file takes on the host's disk.
    pub memory_bytes: u64,
    /// The configuration that its clones boot with once they have ended.
    #[schema(value_type = VmConfig)]
    pub config: VmConfig,
    /// Disks that guests write to, by drive or pmem device: each clone has a child of it.
    #[schema(value_type = BTreeMap<String, String>)]
    pub disks: BTreeMap<DeviceId, PathBuf>,
    /// What its guest had in networks, by interface: clones have the same addresses and Ethernet addresses for
    /// themselves.
    #[serde(default, skip_serializing_if = "Interfaces::is_empty")]
    #[schema(value_type = Object)]
    pub interfaces: Interfaces,
    /// Other templates, on whose disks these stand.
    #[serde(default)]
    pub stands_on: BTreeSet<String>,
    /// Whether its files are copies that no guest's process has ever had open. Those of a template that an older
    /// version made are the guest's own: make it again.
    #[serde(default)]
    pub is_copy: bool,
    /// The SHA-256 of its state file, which clones compare.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub state_sha256: Option<Sha256Digest>,
}

/// All templates.
#[derive(Debug, Default)]
pub struct Templates(BTreeMap<String, Template>);

/// The record is that of another folder.
#[derive(Debug, thiserror::Error)]
#[error("it is the record of template {0:.80?}, and lies in the folder of another: move it back")]
struct Misplaced(String);

/// Reads the record of the template in `folder`; `None` where there is none. With a new key, it is taken for what it
/// says, and gets a code.
fn read(folder: &Path, key: &FoundKey) -> io::Result<Option<Template>> {
    let path = folder.join(TEMPLATE);
    let sealed = store::read::<SealedRecord>(&path);
    let found = match (key, sealed) {
        (_, Ok(None)) => return Ok(None),
        (FoundKey::Kept(key), sealed) => {
            let sealed = sealed?;
            let opened = sealed.map(|sealed| key.open::<Template>(&sealed));
            opened.transpose().map_err(store::named(&path))?
        }
        (FoundKey::New(..), Ok(Some(sealed))) => Some(sealed.unchecked()?),
        // A record of a daemon that had no key.
        (FoundKey::New(..), Err(_)) => store::read(&path)?,
    };
    let Some(mut template) = found else {
        return Ok(None);
    };
    if folder.file_name().and_then(|name| name.to_str()) != Some(&*template.id) {
        let error = io::Error::new(io::ErrorKind::InvalidData, Misplaced(template.id));
        return Err(store::named(&path)(error));
    }
    if let FoundKey::New(key, _) = key {
        template.state_sha256 = Some(digest_of(&folder.join("state"))?);
        write(folder, &template, key)?;
        tracing::info!(template = %template.id, "the record of a template is taken for what it says, and gets an authentication code");
    }
    Ok(Some(template))
}

/// Writes the record of a template, which is complete from then on.
///
/// # Errors
/// The host's error.
pub fn write(folder: &Path, template: &Template, key: &RecordKey) -> io::Result<()> {
    store::write(&folder.join(TEMPLATE), &key.seal(template)?, true)
}

impl Templates {
    /// Those of a state folder. The folders of templates that were half made or half deleted are removed, and those
    /// whose record has not the code of the key stay as they are, as do those that cannot be understood.
    ///
    /// # Errors
    /// The host's error.
    pub fn load(folder: &Path, key: &FoundKey) -> io::Result<Self> {
        let mut templates = BTreeMap::new();
        for entry in fs::read_dir(folder)? {
            let path = entry?.path();
            match read(&path, key) {
                Ok(Some(template)) => {
                    templates.insert(template.id.clone(), template);
                }
                Ok(None) => {
                    tracing::info!(path = %path.display(), "what was left of a template is removed");
                    store::remove_folder(&path)?;
                }
                Err(error) => {
                    tracing::error!(path = %path.display(), error = %chain(&error), "a template is not used, and stays as it is");
                }
            }
        }
        Ok(Self(templates))
    }

    /// A template.
    ///
    /// # Errors
    /// `NoTemplate`.
    pub fn get(&self, id: &str) -> Result<Template, Fault> {
        let found = self.0.get(id).cloned();
        found.ok_or_else(|| Fault::NoTemplate(id.to_owned()))
    }

    /// The templates that the memory of one is a difference to, the lowest first.
    pub fn below(&self, template: &Template) -> Vec<&Template> {
        let parent_of = |template: &&Template| self.0.get(template.parent.as_ref()?);
        let first = template.parent.as_ref().and_then(|id| self.0.get(id));
        let mut below: Vec<_> = std::iter::successors(first, parent_of)
            .take(self.0.len())
            .collect();
        below.reverse();
        below
    }

    /// Whether there is one of that name.
    pub fn has(&self, id: &str) -> bool {
        self.0.contains_key(id)
    }

    /// Adds one.
    pub fn insert(&mut self, template: Template) {
        self.0.insert(template.id.clone(), template);
    }

    /// Forgets one. Its folder stays.
    pub fn remove(&mut self, id: &str) {
        self.0.remove(id);
    }

    /// All of them.
    pub fn list(&self) -> Vec<Template> {
        self.0.values().cloned().collect()
    }

    /// Folders of templates that were made of a guest, and have files that no guest's process had.
    pub fn copies_of(&self, vm: &Vm, folder: &Path) -> Vec<PathBuf> {
        let is_of = |t: &&Template| t.is_copy && t.vm == vm.id && t.created_ms >= vm.created_ms;
        let made = self.0.values().filter(is_of);
        made.map(|template| folder.join(&template.id)).collect()
    }

    /// The template whose disk is the parent of `disk`, the one that the guest's drive has: the daemon gives such disks
    /// names by which it knows them. A guest that became a template stands on its own disk, unless an older daemon made
    /// the template.
    pub fn parent_of(&self, vm: &Vm, drive: &DeviceId, disk: &Path) -> Option<&str> {
        let of_drive = self.0.values().filter(|t| t.disks.contains_key(drive));
        let mut parents = of_drive.filter(|t| {
            let is_clone = vm.spec.template.as_deref() == Some(&*t.id);
            let after = format!("after-{}", t.id);
            is_clone && disk == own_disk(&vm.folder, drive, &t.id)
                || !t.is_copy && t.vm == vm.id && is_free_disk_of(disk, &vm.folder, drive, &after)
        });
        parents.next().map(|template| &*template.id)
    }

    /// A template whose memory is a delta of that one's, or whose disks stand on that one's.
    pub fn child_of(&self, id: &str) -> Option<&str> {
        let is_child = |t: &&Template| t.parent.as_deref() == Some(id) || t.stands_on.contains(id);
        let child = self.0.values().find(is_child);
        child.map(|template| &*template.id)
    }
}

impl Template {
    /// The configuration that its clone in `folder` boots with, with the disks that the clone has then.
    pub fn config_of(&self, folder: &Path) -> VmConfig {
        let mut config = self.config.clone();
        if let Some(vsock) = &mut config.vsock {
            // A clone has an identifier and a socket of its own.
            (vsock.guest_cid, vsock.uds_path) = (None, Some(VSOCK_SOCKET.into()));
        }
        for interface in &mut config.network_interfaces {
            // A port of the host leads to one guest.
            interface.publish.clear();
        }
        for id in self.disks.keys() {
            config.set_vhdx(id, &own_disk(folder, id, &self.id));
        }
        config
    }

    /// The snapshot that a clone in `folder` goes on from, with the identifier `cid` if it has a vsock device. `own` is
    /// the template's folder, and `lower` are the memory files that its own is a difference to.
    pub fn snapshot(
        &self,
        (own, lower): (&Path, Vec<PathBuf>),
        folder: &Path,
        resume: bool,
        cid: Option<u32>,
    ) -> LoadSnapshot {
        let disks = || self.disks.iter();
        let moved = disks().map(|(id, disk)| DriveOverride {
            drive_id: id.to_string(),
            path_on_host: disk.clone(),
            clone: false,
        });
        let cloned = disks().map(|(id, _)| DriveOverride {
            drive_id: id.to_string(),
            path_on_host: own_disk(folder, id, &self.id),
            clone: true,
        });
        LoadSnapshot {
            mem_file_path: Some(own.join("memory")),
            lower_mem_files: lower,
            state_sha256: self.state_sha256,
            resume_vm: resume,
            // The template's files are the daemon's alone.
            verify_memory: false,
            // A disk is cloned from where it is now, so all moves are before the clones.
            drives: moved.chain(cloned).collect(),
            vsock_override: cid.map(|cid| VsockOverride {
                uds_path: Some(VSOCK_SOCKET.into()),
                guest_cid: Some(cid),
            }),
            ..LoadSnapshot::new(own.join("state"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use config::{ConfiguredDevice, DriveConfig};

    fn template() -> Template {
        let mut config = VmConfig::default();
        DriveConfig::new("root", "/d/root.vhdx").store(&mut config);
        DriveConfig::new("base", "/d/base.vhdx").store(&mut config);
        Template {
            id: "t".into(),
            vm: "a".into(),
            uid: 0,
            created_ms: 0,
            parent: None,
            mem_size_mib: 128,
            vcpus: 1,
            memory_bytes: 0,
            config,
            disks: BTreeMap::from([(DeviceId::new("root").unwrap(), "/d/root.vhdx".into())]),
            interfaces: Interfaces::new(),
            stands_on: BTreeSet::new(),
            is_copy: true,
            state_sha256: Some(Sha256Digest::from([5; 32])),
        }
    }

    #[test]
    fn a_clone_has_a_child_of_each_disk_that_is_written_to_and_the_others_as_they_are() {
        let config = template().config_of(Path::new("/vms/b"));
        let paths: Vec<_> = config.drives.iter().map(|d| &*d.path_on_host).collect();
        assert_eq!(
            paths,
            [
                Path::new("/vms/b/disk-root-t.vhdx"),
                Path::new("/d/base.vhdx")
            ]
        );
        let clone = |resume, cid| {
            template().snapshot(
                (Path::new("/t,s"), vec!["/t/p/memory".into()]),
                Path::new("/vms/b"),
                resume,
                cid,
            )
        };
        let paused = clone(false, None);
        assert_eq!(paused.snapshot_path, Path::new("/t,s/state"));
        assert_eq!(paused.mem_file_path, Some("/t,s/memory".into()));
        assert_eq!(paused.lower_mem_files, [Path::new("/t/p/memory")]);
        assert_eq!(paused.state_sha256, template().state_sha256);
        assert!(!paused.verify_memory && !paused.resume_vm && paused.vsock_override.is_none());
        let drives = paused.drives.iter();
        let drives = drives.map(|d| (&*d.drive_id, &*d.path_on_host, d.clone));
        assert_eq!(
            drives.collect::<Vec<_>>(),
            [
                ("root", Path::new("/d/root.vhdx"), false),
                ("root", Path::new("/vms/b/disk-root-t.vhdx"), true)
            ]
        );
        let running = clone(true, Some(4));
        assert!(running.resume_vm);
        let vsock = running.vsock_override.unwrap();
        assert_eq!(vsock.uds_path, Some(VSOCK_SOCKET.into()));
        assert_eq!(vsock.guest_cid, Some(4));
    }

    /// A folder with two templates, and a half-made one, whose records are as an older daemon has written them.
    fn older() -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for name in ["half", "whole", "second"] {
            fs::create_dir(folder.path().join(name)).unwrap();
            fs::write(folder.path().join(name).join("state"), name).unwrap();
            if name == "half" {
                continue;
            }
            let template = Template {
                id: name.into(),
                is_copy: false,
                state_sha256: None,
                ..template()
            };
            store::write(&folder.path().join(name).join(TEMPLATE), &template, true).unwrap();
        }
        folder
    }

    fn ids(templates: &Templates) -> Vec<String> {
        templates.list().into_iter().map(|t| t.id).collect()
    }

    #[test]
    fn an_incomplete_template_is_removed_and_a_complete_one_is_found() {
        let folder = older();
        let key = FoundKey::read(&folder.path().join("key")).unwrap();
        let templates = Templates::load(folder.path(), &key).unwrap();
        assert_eq!(ids(&templates), ["second", "whole"]);
        assert_eq!(templates.get("whole").unwrap().disks, template().disks);
        assert!(matches!(templates.get("half"), Err(Fault::NoTemplate(_))));
        assert!(!folder.path().join("half").exists());
    }

    #[test]
    fn records_of_a_daemon_without_a_key_are_taken_over_once_and_forged_ones_never() {
        let folder = older();
        let path = folder.path().join("the key");
        let FoundKey::New(first, at) = FoundKey::read(&path).unwrap() else {
            panic!("there is none yet");
        };
        // A daemon that is killed before its key is saved leaves codes that the next one replaces.
        for _ in 0..2 {
            let new = FoundKey::read(&path).unwrap();
            let taken = Templates::load(folder.path(), &new).unwrap();
            assert_eq!(ids(&taken), ["second", "whole"]);
        }
        let new = FoundKey::New(first, at.clone());
        let taken = Templates::load(folder.path(), &new).unwrap();
        let FoundKey::New(key, _) = new else {
            unreachable!("it was made above");
        };
        key.save(&at).unwrap();
        let whole = taken.get("whole").unwrap();
        let state = folder.path().join("whole/state");
        assert_eq!(whole.state_sha256, Some(digest_of(&state).unwrap()));
        assert!(!whole.is_copy);

        let load = || Templates::load(folder.path(), &FoundKey::read(&path).unwrap()).unwrap();
        assert_eq!(ids(&load()), ["second", "whole"]);
        let record = folder.path().join("whole").join(TEMPLATE);
        let sealed = fs::read_to_string(&record).unwrap();
        let unsealed = serde_json::to_string(&whole).unwrap();
        let other = serde_json::to_string(
            &match FoundKey::read(Path::new("/nonexistent/key")).unwrap() {
                FoundKey::New(other, _) | FoundKey::Kept(other) => other,
            }
            .seal(&whole)
            .unwrap(),
        );
        let renamed = fs::read_to_string(folder.path().join("second").join(TEMPLATE)).unwrap();
        for forged in [
            sealed.replace("/d/root.vhdx", "/d/evil.vhdx"),
            unsealed,
            other.unwrap(),
            renamed,
        ] {
            fs::write(&record, &forged).unwrap();
            assert_eq!(ids(&load()), ["second"], "{forged}");
            // It stays as it is, for people to look at.
            assert_eq!(fs::read_to_string(&record).unwrap(), forged);
        }
        fs::write(&record, sealed).unwrap();
        assert_eq!(ids(&load()), ["second", "whole"]);
    }
}
