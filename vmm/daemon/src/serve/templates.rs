//! Templates: guests that were saved once, and that any number of guests begin as.
//!
//! ```text
//! DIR/templates/NAME/state          what the guest was, but for its memory
//!                   /memory         its memory, which every clone maps
//!                   /disk-DRIVE     a disk that was the guest's own, under a second name
//!                   /template.json  without it, the next daemon removes the folder
//! ```
//!
//! It is made in the folder of its guest, which may write nowhere else, and moved when it is whole. What is begun is noted before: see `pending`.
//!
//! A guest that becomes a template is paused, saved, and goes on: each disk that it writes to stays as it is for the clones, and the guest has a child
//! of it from then on, as every clone has. So does a clone that becomes a template in its turn, of whose memory only the news are saved.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use axum::http::Method;
use serde::{Deserialize, Serialize};
use serde_json::json;
use utoipa::ToSchema;

use super::Daemon;
use super::events::EventKind;
use super::fault::Fault;
use super::identity;
use super::jail;
use super::lifecycle::blocking;
use super::own_disks::{free_disk, is_free_disk_of, link_inside, own_disk};
use super::pending::{Becoming, unfinished};
use super::proxy;
use super::status::{State, now_ms};
use super::store;
use super::told::answered;
use super::vm::Vm;
use config::VmConfig;
use config::is_guest_id;

/// The body of `POST /templates`.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TemplateSpec {
    /// Its name: 1 to 63 lower case letters, digits and dashes.
    #[schema(pattern = "^[a-z0-9-]{1,63}$")]
    pub id: String,
    /// The guest, which runs or is paused, and goes on afterwards.
    pub vm: String,
}

/// A template.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Template {
    /// Its name.
    pub id: String,
    /// The guest that it was made of.
    pub vm: String,
    /// Who made it.
    pub uid: u32,
    /// When, in ms since 1970.
    pub created_ms: u64,
    /// The template whose memory this one's is the news of.
    #[serde(default)]
    pub parent: Option<String>,
    /// RAM of its guests.
    pub mem_size_mib: u32,
    /// vCPUs of its guests.
    pub vcpus: u8,
    /// What its memory file takes of the host's disk.
    pub memory_bytes: u64,
    /// What its guests are started with once they have ended.
    #[schema(value_type = VmConfig)]
    pub config: VmConfig,
    /// Disks that guests write to, by drive or pmem device: each clone has a child of it.
    #[schema(value_type = BTreeMap<String, String>)]
    pub disks: BTreeMap<String, PathBuf>,
}

/// All templates.
#[derive(Debug, Default)]
pub struct Templates(BTreeMap<String, Template>);

impl Templates {
    /// Those of a state folder. What is left of one that was half made or half deleted goes.
    ///
    /// # Errors
    /// What the host says.
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
                    tracing::error!(path = %path.display(), %error, "a template cannot be understood, and stays as it is");
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

    /// All of them.
    pub fn list(&self) -> Vec<Template> {
        self.0.values().cloned().collect()
    }

    /// The template whose disk that of a guest's drive is a child of, by the names that the daemon has given.
    pub(super) fn below(&self, vm: &Vm, drive: &str, disk: &Path) -> Option<&str> {
        let of_drive = self.0.values().filter(|t| t.disks.contains_key(drive));
        let mut below = of_drive.filter(|t| {
            let is_clone = vm.spec.template.as_deref() == Some(&*t.id);
            let after = format!("after-{}", t.id);
            is_clone && disk == own_disk(&vm.folder, drive, &t.id)
                || t.vm == vm.id && is_free_disk_of(disk, &vm.folder, drive, &after)
        });
        below.next().map(|template| &*template.id)
    }

    /// One that was made of another.
    fn child_of(&self, id: &str) -> Option<&str> {
        let child = self.0.values().find(|t| t.parent.as_deref() == Some(id));
        child.map(|template| &*template.id)
    }
}

/// What a guest was started with and what has become of it, with the disks that it has.
pub(super) async fn configuration(vm: &Vm) -> Result<VmConfig, Fault> {
    let mut config: VmConfig = answered(vm, "/vm/config").await?;
    // Relative to the folder that the process works in.
    for path in config
        .drives
        .iter_mut()
        .map(|drive| &mut drive.path_on_host)
    {
        *path = vm.folder.join(&path);
    }
    for path in config.pmem.iter_mut().map(|pmem| &mut pmem.path_on_host) {
        *path = vm.folder.join(&path);
    }
    Ok(config)
}

/// The pmem devices that a guest writes to.
fn written_pmem(config: &VmConfig) -> impl Iterator<Item = &str> {
    let written = config.pmem.iter().filter(|pmem| pmem.mode().keeps());
    written.map(|pmem| &*pmem.id)
}

fn has_drive(config: &VmConfig, id: &str) -> bool {
    config.drives.iter().any(|drive| drive.drive_id == id)
}

/// Disks that a guest has come to are noted by these names.
fn of_no_drive(config: &VmConfig, id: &str) -> Result<(), Fault> {
    if has_drive(config, id) {
        return Err(Fault::Invalid {
            field: "pmem.id",
            value: id.to_owned(),
            expected: "one that no drive has, too, as its disk could not be told from that of the drive",
        });
    }
    Ok(())
}

/// Checks that a pmem device of a guest can be given another disk.
///
/// # Errors
/// `Invalid`, and what the guest's process answers.
pub(super) async fn expect_own_name(vm: &Vm, pmem: &str) -> Result<(), Fault> {
    of_no_drive(&configuration(vm).await?, pmem)
}

/// A comma in a path is written twice.
fn escaped(path: &Path) -> String {
    path.display().to_string().replace(',', ",,")
}

impl Template {
    /// What its clone `vm` is started with when it starts anew: with the disks that it has then.
    pub fn config_of(&self, folder: &Path) -> VmConfig {
        let mut config = self.config.clone();
        if let Some(vsock) = &mut config.vsock {
            // Its clones are not the guest that it was.
            (vsock.guest_cid, vsock.uds_path) = (None, Some(identity::SOCKET.into()));
        }
        for id in self.disks.keys() {
            if let Some(path) = config.disk_mut(id) {
                *path = own_disk(folder, id, &self.id);
            }
        }
        config
    }

    /// The value of `--restore` for a clone in `folder`, with the identifier `cid` if it has a vsock device.
    pub fn restore(&self, own: &Path, folder: &Path, resume: bool, cid: Option<u32>) -> String {
        let mut value = format!(
            "{},memory={},trust",
            escaped(&own.join("state")),
            escaped(&own.join("memory"))
        );
        if !resume {
            value.push_str(",paused");
        }
        if let Some(cid) = cid {
            // Writing to a string does not fail.
            let _ = write!(value, ",vsock={},cid={cid}", identity::SOCKET);
        }
        for (drive, disk) in &self.disks {
            let clone = own_disk(folder, drive, &self.id);
            // Writing to a string does not fail.
            let _ = write!(
                value,
                ",disk.{drive}={},clone.{drive}={}",
                escaped(disk),
                escaped(&clone)
            );
        }
        value
    }
}

impl Daemon {
    /// Makes a template of a guest.
    ///
    /// # Errors
    /// Whatever is in the way; then there is no template, and the guest goes on.
    pub async fn create_template(
        self: Arc<Self>,
        spec: TemplateSpec,
        uid: u32,
    ) -> Result<Template, Fault> {
        if !is_guest_id(&spec.id) {
            return Err(Fault::Invalid {
                field: "id",
                value: spec.id,
                expected: "1 to 63 lower case letters, digits and dashes",
            });
        }
        let vm = self.vm(&spec.vm)?;
        let _making = self.templating.lock().await;
        if self.templates().0.contains_key(&spec.id) {
            return Err(Fault::TemplateExists(spec.id));
        }
        let _operation = vm.operation.clone().lock_owned().await;
        let was_running = match vm.state() {
            State::Running => true,
            State::Paused => false,
            state => {
                return Err(Fault::WrongState {
                    id: vm.id.clone(),
                    state,
                    advice: "only one that runs or is paused can become a template",
                });
            }
        };
        // Its disks change, and nobody else is to change them meanwhile.
        let _telling = vm.telling.lock().await;
        let config = configuration(&vm).await?;
        written_pmem(&config).try_for_each(|id| of_no_drive(&config, id))?;
        let children = self.children_of(&vm, &config, &spec.id).await?;
        self.begin(&vm, |pending| {
            pending.children.extend(children.clone());
            pending.template = Some(Becoming {
                id: spec.id.clone(),
                resume: was_running,
            });
        })
        .await?;
        let saved = async {
            self.clear(&vm, &spec.id).await?;
            if was_running {
                proxy::act(&vm, Method::PATCH, "/vm", &json!({"state": "Paused"})).await?;
            }
            self.save_template(&vm, &spec, uid, config, children).await
        };
        let saved = saved.await;
        self.mend(&vm).await;
        let template = saved?;
        self.templates()
            .0
            .insert(template.id.clone(), template.clone());
        let text = Some(format!("template {}", template.id));
        self.events
            .tell(EventKind::TemplateCreated, Some(&vm.id), text);
        Ok(template)
    }

    /// Disks for a guest to go on with, by drive, none of which is there yet; where there is no template of that name.
    async fn children_of(
        &self,
        vm: &Vm,
        config: &VmConfig,
        template: &str,
    ) -> Result<BTreeMap<String, PathBuf>, Fault> {
        let drives = config.drives.iter().filter(|drive| !drive.is_read_only);
        let drives = drives.map(|drive| &*drive.drive_id);
        let drives = drives.chain(written_pmem(config)).map(str::to_owned);
        let drives: Vec<_> = drives.collect();
        let (folder, kept) = (vm.folder.clone(), self.store.template(template));
        let id = template.to_owned();
        let found = blocking(move || -> io::Result<_> {
            if kept.join("template.json").try_exists()? {
                return Ok(None);
            }
            let mut children = BTreeMap::new();
            for drive in drives {
                let child = free_disk(&folder, &drive, &format!("after-{id}"))?;
                children.insert(drive, child);
            }
            Ok(Some(children))
        });
        // One that this daemon cannot understand may be what guests go on from all the same.
        let found = found.await?.map_err(Fault::Store)?;
        found.ok_or_else(|| Fault::TemplateExists(template.to_owned()))
    }

    /// Makes the folder that a template is made in, and removes what is left of another.
    async fn clear(&self, vm: &Vm, template: &str) -> Result<(), Fault> {
        let made = unfinished(&vm.folder, template);
        let (kept, jail) = (self.store.template(template), vm.now().jail.clone());
        let cleared = blocking(move || {
            for left in [&made, &kept] {
                store::remove_folder(left).map_err(store::named(left))?;
            }
            jail::make_folder(&made, jail.as_ref())
        });
        cleared.await?.map_err(Fault::Store)
    }

    async fn save_template(
        self: &Arc<Self>,
        vm: &Arc<Vm>,
        spec: &TemplateSpec,
        uid: u32,
        mut config: VmConfig,
        children: BTreeMap<String, PathBuf>,
    ) -> Result<Template, Fault> {
        let made = unfinished(&vm.folder, &spec.id);
        let loaded = vm.now().loaded;
        let parent = vm.spec.template.clone().filter(|_| loaded);
        proxy::act(
            vm,
            Method::PUT,
            "/snapshot/create",
            &json!({
                "snapshot_type": if parent.is_some() { "Diff" } else { "Full" },
                "snapshot_path": made.join("state"),
                "mem_file_path": made.join("memory"),
                // It is moved, and may be deleted while the guest goes on.
                "is_base": false,
            }),
        )
        .await?;
        let mut disks = BTreeMap::new();
        for (id, own) in children {
            let Some(disk) = config.disk_mut(&id) else {
                continue;
            };
            let disk = disk.clone();
            let body = json!({"path_on_host": own});
            let kind = if has_drive(&config, &id) {
                "drives"
            } else {
                "pmem"
            };
            let path = format!("/{kind}/{id}/snapshot");
            proxy::act(vm, Method::PUT, &path, &body).await?;
            disks.insert(id.clone(), disk);
            vm.change(|now| {
                now.pending.children.remove(&id);
                now.disks.insert(id, own);
            });
        }
        let (owned, jail) = (vm.folder.clone(), vm.now().jail.clone());
        let kept = self.store.template(&spec.id);
        let machine = &config.machine_config;
        let mut template = Template {
            id: spec.id.clone(),
            vm: vm.id.clone(),
            uid,
            created_ms: now_ms(),
            parent,
            mem_size_mib: machine.mem_size_mib,
            vcpus: machine.vcpu_count,
            memory_bytes: 0,
            config,
            disks,
        };
        let finish = move || {
            for (drive, disk) in &mut template.disks {
                if let Ok(inside) = disk.strip_prefix(&owned) {
                    // It goes with the guest's folder; under this name it stays.
                    let name = format!("disk-{drive}");
                    let second = made.join(&name);
                    link_inside(&owned, inside, &second).map_err(store::named(&second))?;
                    *disk = kept.join(name);
                }
            }
            jail::take_back(&made, jail.as_ref(), "disk-").map_err(store::named(&made))?;
            let memory = fs::symlink_metadata(made.join("memory"));
            template.memory_bytes = memory.map_err(store::named(&made))?.blocks() * 512;
            store::write(&made.join("template.json"), &template, true)?;
            store::rename(&made, &kept)
                .inspect_err(|_| {
                    // It is none, also for the next daemon.
                    let _ = store::remove_folder(&kept);
                })
                .map_err(store::named(&kept))?;
            Ok(template)
        };
        blocking(finish).await?.map_err(Fault::Store)
    }

    /// Deletes a template that no guest, and no other template, needs.
    ///
    /// # Errors
    /// `NoTemplate`, `TemplateUsed`, `Store`.
    pub async fn delete_template(self: Arc<Self>, id: String) -> Result<(), Fault> {
        let _making = self.templating.lock().await;
        self.templates().get(&id)?;
        let used = |by: String| Fault::TemplateUsed {
            template: id.clone(),
            by,
        };
        if let Some(child) = self.templates().child_of(&id) {
            return Err(used(format!("template {child}")));
        }
        let clone = self
            .all()
            .into_iter()
            .find(|vm| vm.spec.template.as_deref() == Some(&id));
        if let Some(vm) = clone {
            return Err(used(format!("guest {}", vm.id)));
        }
        let folder = self.store.template(&id);
        let removed = blocking(move || {
            // First what makes it one: what else is gone after a power cut is missed by nobody then.
            fs::remove_file(folder.join("template.json"))?;
            store::sync_folder(&folder)?;
            fs::remove_dir_all(folder)
        });
        self.templates().0.remove(&id);
        removed.await?.map_err(Fault::Store)?;
        let text = Some(format!("template {id}"));
        self.events.tell(EventKind::TemplateDeleted, None, text);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use config::DriveConfig;

    fn template() -> Template {
        let mut config = VmConfig::default();
        config.set_drive(DriveConfig::new("root", "/d/root.vhdx"));
        config.set_drive(DriveConfig::new("base", "/d/base.vhdx"));
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
            disks: BTreeMap::from([("root".into(), "/d/root.vhdx".into())]),
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
        let restore = template().restore(Path::new("/t,s"), Path::new("/vms/b"), false, None);
        assert_eq!(
            restore,
            "/t,,s/state,memory=/t,,s/memory,trust,paused,disk.root=/d/root.vhdx,clone.root=/vms/b/disk-root-t.vhdx"
        );
        let named = template().restore(Path::new("/t"), Path::new("/vms/b"), true, Some(4));
        assert!(named.contains(",vsock=vsock.sock,cid=4,"), "{named}");
        let parsed: cli::RestoreArgument = restore.parse().unwrap();
        assert_eq!(parsed.0.drives.len(), 2);
    }

    #[test]
    fn what_is_left_of_a_template_goes_and_a_whole_one_is_found() {
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
