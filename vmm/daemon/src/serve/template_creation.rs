//! How a guest becomes a template, and how a template is deleted.
//!
//! ```text
//! paused ─> state and memory saved in the guest's folder ─> copies begun ─> each disk has a child ─> resumed
//!        ─> bytes copied ─> template.json written: there is a template
//! ```
//!
//! The guest's process saves in a folder in the guest's own, as it may write nowhere else. The record of the guest says
//! that before it begins: see `pending`. What becomes the template is a copy of it, in new inodes: see
//! `template_files`. The open files are what is copied, so all that was begun on the guest is ended before that takes
//! its time. A template that the daemon does not come to complete has no `template.json`, and the next daemon removes
//! its folder.
//!
//! From then on the guest has a child of each disk that it wrote to, as every clone has of the copies. A clone can
//! become a template in its turn, of whose memory only the delta to its own template is saved.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use axum::http::Method;
use serde_json::json;

use super::daemon::Daemon;
use super::events::EventKind;
use super::fault::Fault;
use super::file_copy::CopyProgress;
use super::jail;
use super::own_disks::free_disk;
use super::proxy;
use super::record::{PendingTemplate, State};
use super::status::now_ms;
use super::store::{self, is_missing};
use super::task::blocking;
use super::template_files::{Places, TemplateFiles};
use super::templates::{self, Template, TemplateSpec};
use super::vm::Vm;
use config::{DeviceId, VmConfig, is_guest_id};
use host::report::chain;

/// The pmem devices that a guest writes to.
fn written_pmem(config: &VmConfig) -> impl Iterator<Item = &str> {
    let written = config.pmem.iter().filter(|pmem| pmem.mode().keeps());
    written.map(|pmem| &*pmem.id)
}

/// Checks that no disk that a guest writes to confines where its parents are: the copy that clones stand on would be
/// outside.
fn anywhere_on_the_host(config: &VmConfig) -> Result<(), Fault> {
    let drives = config.drives.iter().filter(|drive| !drive.is_read_only);
    let drives = drives.map(|drive| &drive.parents);
    let pmem = config.pmem.iter().filter(|pmem| pmem.mode().keeps());
    let mut confined = drives.chain(pmem.map(|pmem| &pmem.parents)).flatten();
    match confined.next() {
        None => Ok(()),
        Some(parents) => Err(Fault::Invalid {
            field: "parents",
            value: parents.display().to_string(),
            expected: "left out, as the clones of a template stand on copies in the daemon's folder",
        }),
    }
}

/// The error of a template's files: what cannot be a part of a template is in the way of the guest alone.
fn of_files(error: io::Error) -> Fault {
    match error.kind() {
        io::ErrorKind::InvalidData => Fault::NotForTemplate(error),
        _ => Fault::Store(error),
    }
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
        let operation = vm.operation.clone().lock_owned().await;
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
        let reconfiguring = vm.reconfiguring.lock().await;
        // A commit that is over, but not recorded yet, has given a drive another disk.
        self.find_commits(&vm).await?;
        let config = self.config_with_whole_paths(&vm)?;
        written_pmem(&config).try_for_each(|id| of_no_drive(&config, id))?;
        anywhere_on_the_host(&config)?;
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
            self.make_template_folders(&vm, &spec.id).await?;
            if was_running {
                proxy::act(&vm, Method::PATCH, "/vm", &json!({"state": "Paused"})).await?;
            }
            self.save_template(&vm, &spec, uid, config, children).await
        };
        let saved = saved.await;
        self.reconcile(&vm).await;
        drop((reconfiguring, operation));
        let made = match saved {
            Ok((template, files)) => self.fill_template(&vm, template, files).await,
            Err(fault) => Err(fault),
        };
        if made.is_err() {
            let folder = self.store.template(&spec.id);
            let removed = blocking(move || store::remove_template(&folder)).await?;
            if let Err(error) = removed {
                tracing::error!(template = %spec.id, error = %chain(&error), "a template that could not be made is not removed");
            }
        }
        made
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

    /// Makes the folder that a guest is saved in, and that of the template.
    async fn make_template_folders(&self, vm: &Vm, template: &str) -> Result<(), Fault> {
        let saved = store::unfinished_template(&vm.folder, template);
        let (kept, jail) = (self.store.template(template), vm.now().jail.clone());
        let templates = self.store.templates();
        let made = blocking(move || {
            // What is left of an earlier attempt.
            store::remove_folder(&saved).map_err(store::named(&saved))?;
            jail::make_folder(&saved, jail.as_ref())?;
            // Clones open the disks in it.
            let made = fs::DirBuilder::new().mode(0o755).create(&kept);
            made.map_err(store::named(&kept))?;
            store::sync_folder(&templates)
        });
        made.await?.map_err(Fault::Store)
    }

    /// Where the files of a guest and of its templates are.
    fn places_of(&self, vm: &Vm, config: &VmConfig) -> Result<Places, Fault> {
        let source = config.boot_source.iter();
        let boot = source.flat_map(|source| {
            let kernel = std::iter::once(&source.kernel_image_path);
            kernel.chain(&source.initrd_path)
        });
        let drives = config.drives.iter().filter(|drive| drive.is_read_only);
        let drives = drives.map(|drive| &drive.path_on_host);
        let pmem = config.pmem.iter().filter(|pmem| !pmem.mode().keeps());
        let pmem = pmem.map(|pmem| &pmem.path_on_host);
        let shared = boot.chain(drives).chain(pmem).cloned().collect();
        let asked = self.config_as_asked(vm)?;
        let drives = asked.drives.iter().filter(|drive| !drive.is_read_only);
        let drives = drives.map(|drive| &drive.path_on_host);
        let pmem = asked.pmem.iter().filter(|pmem| pmem.mode().keeps());
        let pmem = pmem.map(|pmem| &pmem.path_on_host);
        let asked = drives.chain(pmem).map(|path| vm.folder.join(path));
        let now = vm.now();
        let later = now.disks.values().chain(&now.former_disks).cloned();
        Ok(Places {
            vms: self.store.vms(),
            templates: self.store.templates(),
            allowed: self.jails.allowed().to_vec(),
            own_disks: asked.chain(later).collect(),
            earlier: self.templates().copies_of(vm, &self.store.templates()),
            shared,
            uid: now.jail.as_ref().and_then(|jail| jail.uid),
        })
    }

    async fn save_template(
        self: &Arc<Self>,
        vm: &Arc<Vm>,
        spec: &TemplateSpec,
        uid: u32,
        mut config: VmConfig,
        children: BTreeMap<DeviceId, PathBuf>,
    ) -> Result<(Template, TemplateFiles), Fault> {
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
                // The files are removed when they are copied, so the guest's next delta must not refer to them.
                "is_base": false,
            }),
        )
        .await?;
        let mut disks = BTreeMap::new();
        for id in children.keys() {
            if let Some(disk) = config.disk_mut(id) {
                disks.insert(id.clone(), disk.clone());
            }
        }
        // A full disk is found before the guest's disks have children.
        let (kept, places) = (self.store.template(&spec.id), self.places_of(vm, &config)?);
        let begin = move || TemplateFiles::begin(&kept, &made, &disks, &places);
        let files = blocking(begin).await?.map_err(of_files)?;
        for (id, own) in children {
            let body = json!({"path_on_host": own});
            let kind = if has_drive(&config, &id) {
                "drives"
            } else {
                "pmem"
            };
            let path = format!("/{kind}/{id}/snapshot");
            proxy::act(vm, Method::PUT, &path, &body).await?;
            vm.change(|now| {
                now.pending.children.remove(&id);
                now.set_disk(&id, own);
            });
        }
        files.lock().map_err(of_files)?;
        let machine = &config.machine_config;
        let template = Template {
            id: spec.id.clone(),
            vm: vm.id.clone(),
            uid,
            created_ms: now_ms(),
            parent,
            mem_size_mib: machine.mem_size_mib,
            vcpus: machine.vcpu_count,
            memory_bytes: 0,
            disks: files.tops().clone(),
            interfaces: vm.now().interfaces.clone(),
            stands_on: files.stands_on().clone(),
            is_copy: true,
            state_sha256: None,
            config,
        };
        Ok((template, files))
    }

    /// Copies the files of a template, and completes it.
    async fn fill_template(
        self: &Arc<Self>,
        vm: &Vm,
        template: Template,
        files: TemplateFiles,
    ) -> Result<Template, Fault> {
        let (begun, bytes) = (Instant::now(), files.bytes());
        let progress = Arc::new(CopyProgress::new(bytes));
        vm.change(|now| now.copying = Some((template.id.clone(), progress.clone())));
        let (daemon, kept) = (self.clone(), self.store.template(&template.id));
        let fill = move || {
            let filled = files.fill(&progress)?;
            let template = Template {
                memory_bytes: filled.memory_bytes,
                state_sha256: Some(filled.state_sha256),
                ..template
            };
            templates::write(&kept, &template, &daemon.key)?;
            Ok((template, filled))
        };
        let filled = blocking(fill).await;
        vm.change(|now| now.copying = None);
        let (template, filled) = filled?.map_err(of_files)?;
        let text = format!(
            "template {}: {bytes} bytes {} in {} ms",
            template.id,
            if filled.is_reflink {
                "shared (reflink)"
            } else {
                "copied"
            },
            begun.elapsed().as_millis()
        );
        self.templates().insert(template.clone());
        self.events
            .tell(EventKind::TemplateCreated, Some(&vm.id), Some(text));
        Ok(template)
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
        let removed = blocking(move || store::remove_template(&folder));
        self.templates().remove(&id);
        removed.await?.map_err(Fault::Store)?;
        let text = Some(format!("template {id}"));
        self.events.tell(EventKind::TemplateDeleted, None, text);
        Ok(())
    }
}
