//! How a guest becomes a template, and how a template is deleted.
//!
//! A template is made in the folder of its guest, as the guest's process may write nowhere else, and moved when it is
//! complete. The record of the guest says that before it begins: see `pending`.
//!
//! A guest that becomes a template is paused, saved, and resumed. Each disk that it writes to stays as it is for the
//! clones, and from then on the guest has a child of that disk, as every clone does. A clone can become a template in
//! its turn, of whose memory only the delta to its own template is saved.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::Arc;

use axum::http::Method;
use serde_json::json;

use super::daemon::Daemon;
use super::events::EventKind;
use super::fault::Fault;
use super::jail;
use super::own_disks::{free_disk, link_inside};
use super::proxy;
use super::record::{PendingTemplate, State};
use super::status::now_ms;
use super::store::{self, is_missing};
use super::task::blocking;
use super::templates::{Template, TemplateSpec};
use super::vm::Vm;
use config::{DeviceId, VmConfig, is_guest_id};

/// The pmem devices that a guest writes to.
fn written_pmem(config: &VmConfig) -> impl Iterator<Item = &str> {
    let written = config.pmem.iter().filter(|pmem| pmem.mode().keeps());
    written.map(|pmem| &*pmem.id)
}

fn has_drive(config: &VmConfig, id: &str) -> bool {
    config.drives.iter().any(|drive| drive.drive_id == id)
}

/// Checks that a pmem device does not have the name of a drive, too: the record of a guest has the disks of both by
/// these names.
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

impl Daemon {
    /// Checks that a pmem device of a guest can be given another disk.
    ///
    /// # Errors
    /// `Invalid`, and those of [`Daemon::config_of`].
    pub fn expect_own_name(&self, vm: &Vm, pmem: &str) -> Result<(), Fault> {
        of_no_drive(&self.config_of(vm)?, pmem)
    }

    /// Makes a template of a guest.
    ///
    /// # Errors
    /// Where that cannot be done; then there is no template, and the guest is as before.
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
        // One whose record cannot be read has a folder, and keeps its name.
        let folder = self.store.template(&spec.id);
        let is_free = blocking(move || is_missing(&folder))
            .await?
            .unwrap_or(false);
        if self.templates().has(&spec.id) || !is_free {
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
        // Its disks are replaced, and no request over its own API may change them meanwhile.
        let _reconfiguring = vm.reconfiguring.lock().await;
        // A commit that is over, but not recorded yet, has given a drive another disk.
        self.find_commits(&vm).await?;
        let config = self.config_with_whole_paths(&vm)?;
        written_pmem(&config).try_for_each(|id| of_no_drive(&config, id))?;
        let children = self.children_of(&vm, &config, &spec.id).await?;
        self.begin(&vm, |pending| {
            pending.children.extend(children.clone());
            pending.template = Some(PendingTemplate {
                id: spec.id.clone(),
                resume: was_running,
            });
        })
        .await?;
        let saved = async {
            self.make_template_folder(&vm, &spec.id).await?;
            if was_running {
                proxy::act(&vm, Method::PATCH, "/vm", &json!({"state": "Paused"})).await?;
            }
            self.save_template(&vm, &spec, uid, config, children).await
        };
        let saved = saved.await;
        self.reconcile(&vm).await;
        let template = saved?;
        self.templates().insert(template.clone());
        let text = Some(format!("template {}", template.id));
        self.events
            .tell(EventKind::TemplateCreated, Some(&vm.id), text);
        Ok(template)
    }

    /// Paths for the disks that a guest has after it was saved, by drive. No such file exists yet.
    ///
    /// # Errors
    /// `TemplateExists`, also where the folder of that template cannot be read; `Store`.
    async fn children_of(
        &self,
        vm: &Vm,
        config: &VmConfig,
        template: &str,
    ) -> Result<BTreeMap<DeviceId, PathBuf>, Fault> {
        let drives = config.drives.iter().filter(|drive| !drive.is_read_only);
        let drives = drives.map(|drive| &*drive.drive_id);
        let drives = drives.chain(written_pmem(config)).map(DeviceId::new);
        let drives: Vec<_> = drives.collect::<Result<_, _>>()?;
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
        // A template that this daemon cannot read may have clones all the same.
        let found = found.await?.map_err(Fault::Store)?;
        found.ok_or_else(|| Fault::TemplateExists(template.to_owned()))
    }

    /// Makes the folder that a template is made in, and removes what is left of an earlier attempt.
    async fn make_template_folder(&self, vm: &Vm, template: &str) -> Result<(), Fault> {
        let made = store::unfinished_template(&vm.folder, template);
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
        children: BTreeMap<DeviceId, PathBuf>,
    ) -> Result<Template, Fault> {
        let made = store::unfinished_template(&vm.folder, &spec.id);
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
                // The template's folder is renamed, and may be deleted while the guest runs, so the guest's next delta
                // must not refer to it.
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
                now.set_disk(&id, own);
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
                    // Under this second name it outlives the guest's folder.
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
                    // The caller is told that there is no template, so the next daemon must not find one either.
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
        let clone = self.all().into_iter().find(|vm| vm.may_use_template(&id));
        if let Some(vm) = clone {
            return Err(used(format!("guest {}", vm.id)));
        }
        let folder = self.store.template(&id);
        let removed = blocking(move || {
            // First the file that makes it a template, so that no half-deleted one is left by a power cut.
            fs::remove_file(folder.join("template.json"))?;
            store::sync_folder(&folder)?;
            fs::remove_dir_all(folder)
        });
        self.templates().remove(&id);
        removed.await?.map_err(Fault::Store)?;
        let text = Some(format!("template {id}"));
        self.events.tell(EventKind::TemplateDeleted, None, text);
        Ok(())
    }
}
