//! Pending operations: those that change a guest in several steps are recorded before they begin, and reconciled,
//! however far they came. That is done by this daemon, where the guest's process is killed or answers too late, or by
//! the next one, where this daemon is killed.
//!
//! ```text
//! template: recorded ──> guest paused ──> saved ──> disks given children ──> resumed, off the record ──> files copied
//! child:    recorded ──> made by the guest's process, which uses it from then on ──> the guest's disk, off the record
//! commit:   see `commits`
//! start:    see `waiting`
//! ```
//!
//! A disk that has become the parent of another must never be written to again, so the daemon must always know which of
//! the two the guest has. While the guest's process runs, it is asked. After its end it is the child if that is whole:
//! nothing is written to the parent while the process makes the child.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use axum::http::Method;
use hyper::body::Bytes;
use serde_json::json;
use tokio::time::sleep;

use super::daemon::Daemon;
use super::fault::Fault;
use super::own_disks::is_whole;
use super::proxy::{self, ask_until_answered};
use super::record::Pending;
use super::store::{self, is_missing};
use super::task::blocking;
use super::vm::Vm;
use config::{DeviceId, VmConfig};
use host::report::chain;

/// Between two attempts to reconcile a guest.
const RETRY: Duration = Duration::from_secs(5);

impl Daemon {
    /// Records that the disk of a drive is about to be given a child. Where a file of that name exists, nothing is
    /// recorded, as the guest's process will refuse to make it.
    ///
    /// # Errors
    /// `Store`.
    pub async fn begin_child(
        self: &Arc<Self>,
        vm: &Arc<Vm>,
        drive: &DeviceId,
        child: &Path,
    ) -> Result<(), Fault> {
        let at = child.to_owned();
        if blocking(move || is_missing(&at)).await?.unwrap_or(false) {
            let (drive, child) = (drive.clone(), child.to_owned());
            self.begin(vm, |pending| _ = pending.children.insert(drive, child))
                .await?;
        }
        Ok(())
    }

    /// Records whether the guest has a child as its disk now. `has_it` is `None` where its process has not answered,
    /// which is reconciled later then.
    pub async fn end_child(
        self: &Arc<Self>,
        vm: &Arc<Vm>,
        drive: &DeviceId,
        child: &Path,
        has_it: Option<bool>,
    ) {
        let Some(has_it) = has_it else {
            self.reconcile_later(vm);
            return;
        };
        vm.change(|now| {
            if now.pending.children.get(drive).is_some_and(|c| c == child) {
                now.pending.children.remove(drive);
            }
            if has_it {
                now.set_disk(drive, child.to_owned());
            }
        });
        self.save(vm).await;
    }

    /// Reconciles the pending operations of a guest, and tries again later where its process does not answer. The
    /// caller has locked `operation`.
    pub async fn reconcile(self: &Arc<Self>, vm: &Arc<Vm>) {
        if let Err(fault) = self.try_reconcile(vm).await {
            tracing::warn!(vm = %vm.id, fault = %chain(&fault), "the pending operations of a guest cannot be reconciled yet");
            self.reconcile_later(vm);
        }
    }

    fn reconcile_later(self: &Arc<Self>, vm: &Arc<Vm>) {
        let (daemon, vm) = (self.clone(), vm.clone());
        tokio::spawn(async move {
            loop {
                let operation = vm.operation.lock().await;
                let reconfiguring = vm.reconfiguring.lock().await;
                if !daemon.knows(&vm) || daemon.try_reconcile(&vm).await.is_ok() {
                    return;
                }
                drop((reconfiguring, operation));
                sleep(RETRY).await;
            }
        });
    }

    async fn try_reconcile(self: &Arc<Self>, vm: &Arc<Vm>) -> Result<(), Fault> {
        let Pending {
            template, children, ..
        } = vm.now().pending.clone();
        if template.as_ref().is_some_and(|template| template.resume) {
            let body = json!({"state": "Resumed"}).to_string().into();
            if let Some(response) = ask_until_answered(vm, Method::PATCH, "/vm", body).await?
                && !response.status.is_success()
            {
                // The guest has ended. Its supervision finds out why.
                let fault = proxy::refusal(&response);
                tracing::warn!(vm = %vm.id, fault = %chain(&fault), "a guest that was saved cannot be resumed");
            }
        }
        let mut is_changed = template.is_some();
        if !children.is_empty() {
            is_changed |= self.find_children(vm, children).await?;
        }
        if let Some(template) = template {
            let folder = store::unfinished_template(&vm.folder, &template.id);
            let removed = blocking(move || store::remove_folder(&folder));
            if let Err(error) = removed.await? {
                tracing::error!(vm = %vm.id, template = %template.id, error = %chain(&error), "a template that could not be made is not removed");
            }
            vm.change(|now| now.pending.template = None);
        }
        if is_changed {
            self.save(vm).await;
        }
        self.find_commits(vm).await?;
        self.follow_commits(vm);
        Ok(())
    }

    /// Finds out which of the children that were being made have become disks of a guest, and records those. Gives
    /// whether that changed the record.
    async fn find_children(
        &self,
        vm: &Arc<Vm>,
        children: BTreeMap<DeviceId, PathBuf>,
    ) -> Result<bool, Fault> {
        let asked = ask_until_answered(vm, Method::GET, "/vm/config", Bytes::new());
        let known: Vec<_> = match asked.await? {
            Some(response) if response.status.is_success() => {
                let mut config: VmConfig = proxy::parse(vm, &response)?;
                let mut has = |id: &DeviceId, child: &Path| {
                    let path = config.disk_mut(id);
                    path.is_some_and(|path| vm.folder.join(path) == child)
                };
                // A child that is not its disk may become that by a request that the process has not begun, and stays
                // on record.
                let given = children
                    .into_iter()
                    .filter(|(drive, child)| has(drive, child));
                given.map(|(drive, child)| (drive, child, true)).collect()
            }
            Some(response) => return Err(proxy::refusal(&response)),
            None if vm.now().process.is_some() => return Ok(false),
            None => {
                // A guest in a jail may have replaced any folder that it may write to, except its own, by a link:
                // nothing is removed there.
                let may_remove = vm.now().jail.is_none();
                let folder = vm.folder.clone();
                blocking(move || {
                    let looked = children.into_iter().map(|(drive, child)| {
                        let whole = is_whole(&child);
                        let is_own = child.parent() == Some(&*folder);
                        if !whole && (is_own || may_remove) {
                            // Most often there is no such file.
                            let _ = fs::remove_file(&child);
                        }
                        (drive, child, whole)
                    });
                    looked.collect()
                })
                .await?
            }
        };
        vm.change(|now| {
            for (drive, child, has_it) in &known {
                now.pending.children.remove(drive);
                if *has_it {
                    now.set_disk(drive, child.clone());
                }
            }
        });
        Ok(!known.is_empty())
    }
}
