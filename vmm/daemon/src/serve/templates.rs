//! Templates: guests that were saved once, and that any number of guests start as clones of. How one is made and
//! deleted is in `template_creation`.
//!
//! ```text
//! DIR/templates/NAME/state          the state of the guest without its memory
//!                   /memory         its memory, which every clone maps
//!                   /disk-DRIVE     a disk that was the guest's own, under a second name
//!                   /template.json  without it, the next daemon removes the folder
//! ```

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::fault::Fault;
use super::own_disks::{is_free_disk_of, own_disk};
use super::store::{self, VSOCK_SOCKET};
use super::vm::Vm;
use config::{DeviceId, DriveOverride, LoadSnapshot, VmConfig, VsockOverride};
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
}

/// All templates.
#[derive(Debug, Default)]
pub struct Templates(BTreeMap<String, Template>);

impl Templates {
    /// Those of a state folder. The folders of templates that were half made or half deleted are removed.
    ///
    /// # Errors
    /// The host's error.
    pub fn load(folder: &Path) -> io::Result<Self> {
        let mut templates = BTreeMap::new();
        for entry in fs::read_dir(folder)? {
            let path = entry?.path();
            match store::read::<Template>(&path.join("template.json")) {
                Ok(Some(template)) => {
                    templates.insert(template.id.clone(), template);
                }
                Ok(None) => {
                    tracing::info!(path = %path.display(), "what was left of a template is removed");
                    fs::remove_dir_all(&path)?;
                }
                Err(error) => {
                    tracing::error!(path = %path.display(), error = %chain(&error), "a template cannot be understood, and stays as it is");
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

    /// The template whose disk is the parent of `disk`, the one that the guest's drive has: the daemon gives such disks
    /// names by which it knows them.
    pub fn parent_of(&self, vm: &Vm, drive: &DeviceId, disk: &Path) -> Option<&str> {
        let of_drive = self.0.values().filter(|t| t.disks.contains_key(drive));
        let mut parents = of_drive.filter(|t| {
            let is_clone = vm.spec.template.as_deref() == Some(&*t.id);
            let after = format!("after-{}", t.id);
            is_clone && disk == own_disk(&vm.folder, drive, &t.id)
                || t.vm == vm.id && is_free_disk_of(disk, &vm.folder, drive, &after)
        });
        parents.next().map(|template| &*template.id)
    }

    /// A template whose memory is a delta of that one's.
    pub fn child_of(&self, id: &str) -> Option<&str> {
        let child = self.0.values().find(|t| t.parent.as_deref() == Some(id));
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

    #[test]
    fn an_incomplete_template_is_removed_and_a_complete_one_is_found() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["half", "whole"] {
            fs::create_dir(folder.path().join(name)).unwrap();
            fs::write(folder.path().join(name).join("memory"), [1]).unwrap();
        }
        let whole = Template {
            id: "whole".into(),
            ..template()
        };
        store::write(&folder.path().join("whole/template.json"), &whole, true).unwrap();
        let templates = Templates::load(folder.path()).unwrap();
        assert_eq!(templates.list().len(), 1);
        assert_eq!(templates.get("whole").unwrap().disks, whole.disks);
        assert!(matches!(templates.get("half"), Err(Fault::NoTemplate(_))));
        assert!(!folder.path().join("half").exists());
    }
}
