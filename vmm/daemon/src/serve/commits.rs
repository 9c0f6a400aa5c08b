//! Commits: guests' disks that are merged into their parents. That takes long, and the record of the guest says which
//! disk the guest has all the while.
//!
//! ```text
//! disk and parent recorded ──> the guest's process merges ──> over: the guest's new disk recorded,
//!                                                                    commit off the record
//! ```
//!
//! While the process runs, it is asked which disk that is. After its end the files tell, see [`DriveTask::Commit`]: a
//! disk that was merged must never be written to again, as it lacks what the guest has written since.
//!
//! [`DriveTask::Commit`]: machine::DriveTask::Commit

use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use axum::http::{Method, StatusCode};
use hyper::body::Bytes;
use serde::Deserialize;
use tokio::time::sleep;

use super::daemon::Daemon;
use super::fault::Fault;
use super::own_disks::is_whole;
use super::proxy::{self, ask_until_answered};
use super::record::PendingCommit;
use super::store::is_missing;
use super::task::blocking;
use super::vm::Vm;
use config::{DeviceId, VmConfig};
use host::report::chain;
use machine::{DriveParent, JobState, commit_child};

/// Between two questions how far a commit is: the first comes soon, as most commits are short.
const SOON: Duration = Duration::from_millis(50);
const LATE: Duration = Duration::from_secs(5);

/// Longest answer in bytes that names the parent of a disk.
const LONGEST_PARENT: usize = 16 << 10;

/// The report of a guest's process on the last job of a drive.
#[derive(Deserialize)]
struct Job {
    operation: String,
    state: JobState,
}

/// How far a commit is.
enum Progress {
    /// Not over.
    Running,
    /// Over; the drive has this file.
    Over(Option<PathBuf>),
}

/// The disk of a drive after a commit whose process has ended, as the files tell it. A half-made child is removed, if
/// `may_remove`.
fn disk_after(commit: &PendingCommit, may_remove: bool) -> io::Result<Option<PathBuf>> {
    let child = commit_child(&commit.top);
    if is_whole(&child) {
        return Ok(Some(child));
    }
    if !is_missing(&commit.top)? {
        if may_remove {
            // Most often there is none.
            let _ = fs::remove_file(&child);
        }
        return Ok(Some(commit.top.clone()));
    }
    Ok(commit.base.clone())
}

/// The file of a drive, where the guest works in `folder`.
fn path_of(config: &VmConfig, drive: &DeviceId, folder: &Path) -> Option<PathBuf> {
    let drive = config.drives.iter().find(|d| d.drive_id == **drive)?;
    Some(folder.join(&drive.path_on_host))
}

/// The parent of a drive's disk; `None` where the process says that there is none, for which it will refuse the commit,
/// too.
async fn parent(vm: &Vm, drive: &DeviceId) -> Result<Option<PathBuf>, Fault> {
    let path = format!("/drives/{drive}/parent");
    match proxy::get::<DriveParent>(vm, &path, LONGEST_PARENT).await {
        Ok(parent) => Ok(Some(vm.folder.join(parent.path_on_host))),
        Err(Fault::Guest(StatusCode::BAD_REQUEST, _)) => Ok(None),
        Err(fault) => Err(fault),
    }
}

impl PendingCommit {
    /// Whether a drive can have this disk once the commit is over. The guest's process may name any.
    fn can_leave(&self, disk: &Path) -> bool {
        disk == self.top || disk == commit_child(&self.top) || Some(disk) == self.base.as_deref()
    }
}

impl Daemon {
    /// Records that the disk of a drive is about to be committed; gives the commit of the drive that was on record
    /// before.
    ///
    /// # Errors
    /// `OnTemplate`, `Store`, and those of [`Daemon::config_of`].
    pub async fn begin_commit(
        self: &Arc<Self>,
        vm: &Arc<Vm>,
        drive: &DeviceId,
    ) -> Result<Option<PendingCommit>, Fault> {
        let config = self.config_of(vm)?;
        let before = vm.now().pending.commits.get(drive).cloned();
        let Some(top) = path_of(&config, drive, &vm.folder) else {
            // There is no such drive, for which the guest's process refuses the request.
            return Ok(before);
        };
        if let Some(template) = self.templates().parent_of(vm, drive, &top) {
            return Err(Fault::OnTemplate {
                drive: drive.to_string(),
                template: template.to_owned(),
            });
        }
        if before.as_ref().is_none_or(|commit| commit.top != top) {
            // Asked now, as a process that is killed while it merges cannot be asked any more.
            let base = parent(vm, drive).await?;
            let base = base.filter(|base| self.can_be_base(vm, drive, base));
            if let Some(base) = &base {
                self.guarded_files.release(&vm.id, base);
            }
            let commit = PendingCommit { top, base };
            self.begin(vm, |pending| {
                pending.commits.insert(drive.clone(), commit);
            })
            .await?;
        }
        Ok(before)
    }

    /// Whether a file that the guest's process names as the parent of a disk can become the disk of that drive, where
    /// the guest is in a jail: it is the one that the operator gave the drive, or that a drive has had before, or lies
    /// in the guest's folder, or below a path that the operator gives all guests. It is opened as any disk of the guest
    /// is, by the guest's user.
    fn can_be_base(&self, vm: &Vm, drive: &DeviceId, base: &Path) -> bool {
        let is_plain = base
            .components()
            .all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
        let is_asked_for = || {
            let asked = self.config_as_asked(vm).ok()?;
            let path = path_of(&asked, drive, &vm.folder)?;
            Some(path == base || path.canonicalize().is_ok_and(|path| path == base))
        };
        vm.now().jail.is_none()
            || is_plain
                && (base.parent() == Some(&*vm.folder)
                    || self
                        .jails
                        .allowed()
                        .iter()
                        .any(|path| base.starts_with(path))
                    || vm.now().former_disks.contains(base)
                    || is_asked_for().unwrap_or(false))
    }

    /// Follows a commit after its request: `accepted` is `None` where the process did not answer. Where it was refused,
    /// the record is as `before` again.
    pub async fn follow_commit(
        self: &Arc<Self>,
        vm: &Arc<Vm>,
        drive: &DeviceId,
        before: Option<PendingCommit>,
        accepted: Option<bool>,
    ) {
        if accepted == Some(false) {
            vm.change(|now| match before {
                Some(commit) => drop(now.pending.commits.insert(drive.clone(), commit)),
                None => drop(now.pending.commits.remove(drive)),
            });
            self.save(vm).await;
            self.follow_commits(vm);
            return;
        }
        // A short commit may be over already.
        if let Err(fault) = self.find_commits(vm).await {
            tracing::warn!(vm = %vm.id, fault = %chain(&fault), "it is not known how far a commit is");
        }
        self.follow_commits(vm);
    }

    /// Starts a task that follows the commits of a guest until all are over, if there is none yet.
    pub fn follow_commits(self: &Arc<Self>, vm: &Arc<Vm>) {
        let is_needed = vm.change(|now| {
            !now.pending.commits.is_empty() && !std::mem::replace(&mut now.is_followed, true)
        });
        if !is_needed {
            return;
        }
        let (daemon, vm) = (self.clone(), vm.clone());
        tokio::spawn(async move {
            let mut pause = SOON;
            loop {
                sleep(pause).await;
                pause = (pause * 2).min(LATE);
                let _operation = vm.operation.lock().await;
                // Without this lock, a commit could be on record whose request the process has not received, and look
                // as if it were over.
                let _reconfiguring = vm.reconfiguring.lock().await;
                // Where the guest was deleted, another guest of that name may have files of the same names.
                let is_there = daemon.knows(&vm);
                if is_there && let Err(fault) = daemon.find_commits(&vm).await {
                    tracing::warn!(vm = %vm.id, fault = %chain(&fault), "it is not known how far a commit is");
                }
                let is_over = vm.change(|now| {
                    let is_over = !is_there || now.pending.commits.is_empty();
                    now.is_followed = !is_over;
                    is_over
                });
                if is_over {
                    return;
                }
            }
        });
    }

    /// Finds out which commits of a guest are over, and records the disks that the guest has then.
    pub async fn find_commits(self: &Arc<Self>, vm: &Arc<Vm>) -> Result<(), Fault> {
        let commits = vm.now().pending.commits.clone();
        for (drive, commit) in commits {
            let is_changed = match Self::look_at_commit(vm, &drive, &commit).await? {
                Progress::Running => false,
                Progress::Over(disk) => vm.change(|now| {
                    // Another commit of the drive may have begun since.
                    let known = now.pending.commits.get(&drive);
                    if known.is_none_or(|known| known.top != commit.top) {
                        return false;
                    }
                    now.pending.commits.remove(&drive);
                    if let Some(disk) = disk {
                        now.set_disk(&drive, disk);
                    }
                    true
                }),
            };
            if is_changed {
                self.save(vm).await;
            }
        }
        Ok(())
    }

    async fn look_at_commit(
        vm: &Vm,
        drive: &DeviceId,
        commit: &PendingCommit,
    ) -> Result<Progress, Fault> {
        let path = format!("/drives/{drive}/job");
        if let Some(response) = ask_until_answered(vm, Method::GET, &path, Bytes::new()).await? {
            if response.status.is_success() {
                let job: Job = proxy::parse(vm, &response)?;
                if job.operation == "commit" && job.state == JobState::Running {
                    return Ok(Progress::Running);
                }
            } else if response.status != StatusCode::BAD_REQUEST {
                return Err(proxy::refusal(&response));
            }
            // The commit is over, so the configuration has the disk that it has left.
            let config = ask_until_answered(vm, Method::GET, "/vm/config", Bytes::new());
            if let Some(response) = config.await? {
                let config: VmConfig = proxy::parse(vm, &response)?;
                let disk = path_of(&config, drive, &vm.folder);
                return Ok(Progress::Over(disk.filter(|disk| commit.can_leave(disk))));
            }
        }
        if vm.now().process.is_some() {
            // It is about to be deleted.
            return Ok(Progress::Running);
        }
        // A guest in a jail may have replaced any folder that it may write to, except its own, by a link: nothing is
        // removed there.
        let is_own = commit.top.parent() == Some(&*vm.folder);
        let may_remove = is_own || vm.now().jail.is_none();
        let (ended, top) = (commit.clone(), commit.top.clone());
        let disk = blocking(move || disk_after(&ended, may_remove)).await?;
        let disk = disk.map_err(Fault::Store)?;
        if disk.is_none() {
            tracing::error!(vm = %vm.id, %drive, top = %top.display(), "the disk that this one was merged into is not known");
        }
        Ok(Progress::Over(disk))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_files_that_a_commit_leaves_tell_which_disk_the_guest_had() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let (top, child, base) = (path("d"), path("d.commit"), path("base"));
        let commit = PendingCommit {
            top: top.clone(),
            base: Some(base.clone()),
        };
        let left = || disk_after(&commit, true).unwrap();
        fs::write(&top, "vhdxfile").unwrap();
        assert_eq!(left(), Some(top.clone()));
        // A half-made child, and then a whole one, which the guest has used since.
        fs::write(&child, [0; 64]).unwrap();
        assert_eq!(left(), Some(top.clone()));
        assert!(!child.exists());
        fs::write(&child, "vhdxfile").unwrap();
        assert_eq!(left(), Some(child.clone()));
        fs::remove_file(&top).unwrap();
        assert_eq!(left(), Some(child.clone()));
        fs::remove_file(&child).unwrap();
        assert_eq!(left(), Some(base));
    }
}
