//! What is under way with a guest, told by its record before it begins: so that it is ended, however far it came, by whoever is there then. That is the
//! one who began it, where the guest's process is killed or answers too late; or the next daemon, where this one is killed.
//!
//! ```text
//! template: noted ──> guest paused ──> saved ──> disks given children ──> folder moved ──> resumed, the rest removed, struck off
//! child:    noted ──> made by the guest's process, which goes on with it ──> noted as its disk, struck off
//! commit:   see `commits`
//! start:    see `waiting`
//! ```
//!
//! A disk that has become the parent of another must never be written to again, so which of the two the guest has must not be forgotten. As long as its
//! process is there, that is what it says. Afterwards it is the child if that is whole: the process makes it while nothing is written to the parent.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::http::Method;
use hyper::body::Bytes;
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::time::sleep;

use super::Daemon;
use super::commits::Commit;
use super::fault::Fault;
use super::lifecycle::blocking;
use super::proxy::{self, Answer};
use super::status::State;
use super::store;
use super::vm::{Now, Vm};
use config::VmConfig;

/// Between looks at a process that does not answer.
const AGAIN: Duration = Duration::from_millis(50);
const LATER: Duration = Duration::from_secs(5);
/// What a VHDX begins with ([MS-VHDX] 2.2.1). It is the last that is written to a new one.
const SIGNATURE: &[u8; 8] = b"vhdxfile";

/// What is under way with a guest.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pending {
    /// The template that is being made of it.
    #[serde(default)]
    pub template: Option<Becoming>,
    /// Disks that are being made as children of its own, by drive. They were not there before.
    #[serde(default)]
    pub children: BTreeMap<String, PathBuf>,
    /// Disks that are being committed, by drive.
    #[serde(default)]
    pub commits: BTreeMap<String, Commit>,
    /// The process that it was configured in gives way to the one that it runs in.
    #[serde(default)]
    pub start: bool,
}

impl Pending {
    /// The drives and pmem devices whose disk is about to become another.
    pub(super) fn disks(&self) -> impl Iterator<Item = &String> {
        self.children.keys().chain(self.commits.keys())
    }
}

/// A template that is being made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Becoming {
    /// Its name.
    pub id: String,
    /// Whether the guest ran, and is to go on.
    pub resume: bool,
}

/// The folder that a template is made in: in the guest's own, as its process may not see another.
pub fn unfinished(folder: &Path, template: &str) -> PathBuf {
    folder.join(format!("template-{template}"))
}

/// Whether nothing has that name.
///
/// # Errors
/// What the host says.
pub fn is_missing(path: &Path) -> io::Result<bool> {
    match fs::symlink_metadata(path) {
        Ok(_) => Ok(false),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(true),
        Err(error) => Err(error),
    }
}

/// Whether a disk that a process has begun is whole. What lies there may be anything: no link is followed, and nothing waited for.
pub(super) fn is_whole(path: &Path) -> bool {
    let looked =
        || -> io::Result<bool> {
            let mut options = File::options();
            let options = options
                .read(true)
                .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK);
            let mut file = options.open(path)?;
            let mut found = [0; SIGNATURE.len()];
            Ok(file.metadata()?.is_file()
                && file.read_exact(&mut found).is_ok()
                && found == *SIGNATURE)
        };
    looked().unwrap_or(false)
}

/// Asks a guest until it answers; `None` where its process is gone, or is about to.
pub(super) async fn ask(
    vm: &Vm,
    method: Method,
    path: &str,
    body: &Bytes,
) -> Result<Option<Answer>, Fault> {
    let gone = |now: &Now| now.process.is_none() || now.state == State::Deleting;
    let begun = Instant::now();
    loop {
        let asked = tokio::select! {
            biased;
            () = vm.until(gone) => return Ok(None),
            asked = proxy::ask(vm, method.clone(), path, body.clone(), proxy::ACTION) => asked,
        };
        match asked {
            Ok(answer) => return Ok(Some(answer)),
            Err(fault) if begun.elapsed() >= proxy::ACTION => return Err(fault),
            // It may have been killed a moment ago, which is told soon.
            Err(_) => sleep(AGAIN).await,
        }
    }
}

impl Daemon {
    /// Writes what is known of a guest. Where that fails, the guest goes on, and the next daemon knows less of it.
    pub async fn save(self: &Arc<Self>, vm: &Arc<Vm>) {
        if let Err(error) = self.try_save(vm).await {
            tracing::error!(vm = %vm.id, %error, "the state of a guest is not on the disk");
        }
    }

    /// As [`Daemon::save`].
    ///
    /// # Errors
    /// `Store`.
    pub(super) async fn try_save(self: &Arc<Self>, vm: &Arc<Vm>) -> Result<(), Fault> {
        let _saving = vm.saving.lock().await;
        if !self.knows(vm) {
            return Ok(());
        }
        let (daemon, id, record) = (self.clone(), vm.id.clone(), vm.record());
        let saved = blocking(move || daemon.store.save(&id, &record)).await?;
        saved.map_err(Fault::Store)
    }

    /// Notes what is about to begin. Where it cannot be noted, it must not.
    ///
    /// # Errors
    /// `Store`.
    pub(super) async fn begin(
        self: &Arc<Self>,
        vm: &Arc<Vm>,
        change: impl FnOnce(&mut Pending),
    ) -> Result<(), Fault> {
        let before = vm.change(|now| {
            let before = now.pending.clone();
            change(&mut now.pending);
            before
        });
        self.try_save(vm)
            .await
            .inspect_err(|_| vm.change(|now| now.pending = before))
    }

    /// Notes that the disk of a drive is about to be given a child. A file that is there already is no child that is being made, and is for the
    /// guest to refuse.
    ///
    /// # Errors
    /// `Store`.
    pub(super) async fn begin_child(
        self: &Arc<Self>,
        vm: &Arc<Vm>,
        drive: &str,
        child: &Path,
    ) -> Result<(), Fault> {
        let at = child.to_owned();
        if blocking(move || is_missing(&at)).await?.unwrap_or(false) {
            let (drive, child) = (drive.to_owned(), child.to_owned());
            self.begin(vm, |pending| _ = pending.children.insert(drive, child))
                .await?;
        }
        Ok(())
    }

    /// Notes whether the guest has a child as its disk now; `None` where its process has not said so, which is looked at once more then.
    pub(super) async fn end_child(
        self: &Arc<Self>,
        vm: &Arc<Vm>,
        drive: &str,
        child: &Path,
        has_it: Option<bool>,
    ) {
        let Some(has_it) = has_it else {
            self.mend_later(vm);
            return;
        };
        vm.change(|now| {
            if now.pending.children.get(drive).is_some_and(|c| c == child) {
                now.pending.children.remove(drive);
            }
            if has_it {
                now.disks.insert(drive.to_owned(), child.to_owned());
            }
        });
        self.save(vm).await;
    }

    /// Ends what is under way, however far it came, and once more later where the process does not answer. The operation of the guest is held.
    pub(super) async fn mend(self: &Arc<Self>, vm: &Arc<Vm>) {
        if let Err(fault) = self.try_mend(vm).await {
            tracing::warn!(vm = %vm.id, %fault, "what was begun with a guest is not ended");
            self.mend_later(vm);
        }
    }

    fn mend_later(self: &Arc<Self>, vm: &Arc<Vm>) {
        let (daemon, vm) = (self.clone(), vm.clone());
        tokio::spawn(async move {
            loop {
                let operation = vm.operation.lock().await;
                let telling = vm.telling.lock().await;
                if !daemon.knows(&vm) || daemon.try_mend(&vm).await.is_ok() {
                    return;
                }
                drop((telling, operation));
                sleep(LATER).await;
            }
        });
    }

    async fn try_mend(self: &Arc<Self>, vm: &Arc<Vm>) -> Result<(), Fault> {
        let Pending {
            template, children, ..
        } = vm.now().pending.clone();
        if template.as_ref().is_some_and(|template| template.resume) {
            let body = json!({"state": "Resumed"}).to_string().into();
            if let Some(answer) = ask(vm, Method::PATCH, "/vm", &body).await?
                && !answer.status.is_success()
            {
                // It has ended, and whoever watches it tells why.
                let fault = proxy::refusal(&answer);
                tracing::warn!(vm = %vm.id, %fault, "a guest that was saved does not go on");
            }
        }
        let mut is_changed = template.is_some();
        if !children.is_empty() {
            is_changed |= self.find_children(vm, children).await?;
        }
        if let Some(template) = template {
            let folder = unfinished(&vm.folder, &template.id);
            let removed = blocking(move || store::remove_folder(&folder));
            if let Err(error) = removed.await? {
                tracing::error!(vm = %vm.id, template = %template.id, %error, "a template that could not be made is not gone");
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

    /// Finds out which disks a guest has that were being given children; whether that is known of any of them now.
    async fn find_children(
        &self,
        vm: &Arc<Vm>,
        children: BTreeMap<String, PathBuf>,
    ) -> Result<bool, Fault> {
        let told = ask(vm, Method::GET, "/vm/config", &Bytes::new()).await?;
        let known: Vec<_> = match told {
            Some(told) if told.status.is_success() => {
                let mut config: VmConfig = serde_json::from_slice(&told.body)?;
                let mut has = |id: &str, child: &Path| {
                    let path = config.disk_mut(id);
                    path.is_some_and(|path| vm.folder.join(path) == child)
                };
                // One that it has not may be yet to come, by a request that waits there; it stays noted.
                let given = children
                    .into_iter()
                    .filter(|(drive, child)| has(drive, child));
                given.map(|(drive, child)| (drive, child, true)).collect()
            }
            Some(told) => return Err(proxy::refusal(&told)),
            None if vm.now().process.is_some() => return Ok(false),
            None => {
                // A guest in a jail may have put anything in the place of a folder but its own.
                let may_remove = vm.now().jail.is_none();
                let folder = vm.folder.clone();
                blocking(move || {
                    let looked = children.into_iter().map(|(drive, child)| {
                        let whole = is_whole(&child);
                        let is_own = child.parent() == Some(&*folder);
                        if !whole && (is_own || may_remove) {
                            // Most were not even begun.
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
                    now.disks.insert(drive.clone(), child.clone());
                }
            }
        });
        Ok(!known.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_whole_when_its_first_bytes_are_there_which_are_written_last() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("child.vhdx");
        assert!(is_missing(&path).unwrap() && !is_whole(&path));
        fs::write(&path, [0; 64]).unwrap();
        assert!(!is_missing(&path).unwrap() && !is_whole(&path));
        fs::write(&path, SIGNATURE).unwrap();
        assert!(is_whole(&path));
        let link = folder.path().join("link.vhdx");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert!(!is_missing(&link).unwrap() && !is_whole(&link));
        assert!(!is_whole(folder.path()));
    }
}
