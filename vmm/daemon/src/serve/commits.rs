//! Commits of guests' disks into what they stand on, which take their time: which disk a guest has is told by its record all the while.
//!
//! ```text
//! noted with the disk and its parent ──> the guest's process merges ──> over: the disk that the guest has then is noted, and the commit struck off
//! ```
//!
//! As long as the process is there, it says which disk that is. Afterwards the files do, see [`DriveTask::Commit`]: a disk that was merged must never be
//! written to again, as what the guest wrote since is not in it.
//!
//! [`DriveTask::Commit`]: machine::DriveTask::Commit

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use axum::http::{Method, StatusCode};
use hyper::body::Bytes;
use serde::{Deserialize, Serialize};
use tokio::time::sleep;

use super::Daemon;
use super::fault::Fault;
use super::lifecycle::blocking;
use super::pending::{ask, is_missing, is_whole};
use super::proxy;
use super::templates::configuration;
use super::told::answered;
use super::vm::Vm;
use config::VmConfig;
use machine::{DriveParent, JobState, commit_child};

/// Between looks at a commit: soon at first, as most are short.
const SOON: Duration = Duration::from_millis(50);
const LATE: Duration = Duration::from_secs(5);

/// A disk that is being merged into its parent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Commit {
    /// The file that the drive had when that began.
    pub top: PathBuf,
    /// The file of the parent, where it has one.
    #[serde(default)]
    pub base: Option<PathBuf>,
}

/// What the process says of the last job of a drive.
#[derive(Deserialize)]
struct Job {
    operation: String,
    state: JobState,
}

/// Where a commit is.
enum Progress {
    /// At work.
    Running,
    /// Over; the drive has this file.
    Over(Option<PathBuf>),
}

impl Commit {
    /// The disk of a drive whose process is gone. What is half made goes, if it `may_remove` that.
    fn left(&self, may_remove: bool) -> io::Result<Option<PathBuf>> {
        let child = commit_child(&self.top);
        if is_whole(&child) {
            return Ok(Some(child));
        }
        if !is_missing(&self.top)? {
            if may_remove {
                // It was not even begun, most likely.
                let _ = fs::remove_file(&child);
            }
            return Ok(Some(self.top.clone()));
        }
        Ok(self.base.clone())
    }
}

/// The file of a drive, where the guest works in `folder`.
fn path_of(config: &VmConfig, drive: &str, folder: &Path) -> Option<PathBuf> {
    let drive = config.drives.iter().find(|d| d.drive_id == drive)?;
    Some(folder.join(&drive.path_on_host))
}

/// What the disk of a drive stands on; `None` where the process says that it has no parent, for which it refuses the commit, too.
async fn parent(vm: &Vm, drive: &str) -> Result<Option<PathBuf>, Fault> {
    let path = format!("/drives/{drive}/parent");
    match answered::<DriveParent>(vm, &path).await {
        Ok(parent) => Ok(Some(vm.folder.join(parent.path_on_host))),
        Err(Fault::Guest(StatusCode::BAD_REQUEST, _)) => Ok(None),
        Err(fault) => Err(fault),
    }
}

impl Daemon {
    /// Notes that the disk of a drive is about to be committed; gives what was noted of the drive before.
    ///
    /// # Errors
    /// `OnTemplate`, `Store`, and what the process answers.
    pub(super) async fn begin_commit(
        self: &Arc<Self>,
        vm: &Arc<Vm>,
        drive: &str,
    ) -> Result<Option<Commit>, Fault> {
        let config = configuration(vm).await?;
        let before = vm.now().pending.commits.get(drive).cloned();
        let Some(top) = path_of(&config, drive, &vm.folder) else {
            // For the guest to refuse.
            return Ok(before);
        };
        if let Some(template) = self.templates().below(vm, drive, &top) {
            return Err(Fault::OnTemplate {
                drive: drive.to_owned(),
                template: template.to_owned(),
            });
        }
        if before.as_ref().is_none_or(|commit| commit.top != top) {
            // Now, as a process that is killed amid it tells nothing any more.
            let base = parent(vm, drive).await?;
            let commit = Commit { top, base };
            self.begin(vm, |pending| {
                pending.commits.insert(drive.to_owned(), commit);
            })
            .await?;
        }
        Ok(before)
    }

    /// Looks after a commit whose request was answered, or was not; `before` is noted again where it was refused.
    pub(super) async fn follow_commit(
        self: &Arc<Self>,
        vm: &Arc<Vm>,
        drive: &str,
        before: Option<Commit>,
        accepted: Option<bool>,
    ) {
        if accepted == Some(false) {
            vm.change(|now| match before {
                Some(commit) => drop(now.pending.commits.insert(drive.to_owned(), commit)),
                None => drop(now.pending.commits.remove(drive)),
            });
            self.save(vm).await;
            self.follow_commits(vm);
            return;
        }
        // Where it ends, as long as the process can be asked.
        if let Err(fault) = self.find_commits(vm).await {
            tracing::warn!(vm = %vm.id, %fault, "it is not known where a commit is");
        }
        self.follow_commits(vm);
    }

    /// Looks after the commits of a guest until all are over, if nobody does already.
    pub(super) fn follow_commits(self: &Arc<Self>, vm: &Arc<Vm>) {
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
                // A request for a commit that is under way is noted before the process knows of it.
                let _telling = vm.telling.lock().await;
                // Another guest of that name may be there, with files of the same names.
                let is_there = daemon.knows(&vm);
                if is_there && let Err(fault) = daemon.find_commits(&vm).await {
                    tracing::warn!(vm = %vm.id, %fault, "it is not known where a commit is");
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

    /// Finds out which disks a guest has that were being committed, and notes it.
    pub(super) async fn find_commits(self: &Arc<Self>, vm: &Arc<Vm>) -> Result<(), Fault> {
        let commits = vm.now().pending.commits.clone();
        for (drive, commit) in commits {
            let is_changed = match Self::look_at_commit(vm, &drive, &commit).await? {
                Progress::Running => false,
                Progress::Over(disk) => vm.change(|now| {
                    // Another may have begun since.
                    let known = now.pending.commits.get(&drive);
                    if known.is_none_or(|known| known.top != commit.top) {
                        return false;
                    }
                    now.pending.commits.remove(&drive);
                    if let Some(disk) = disk {
                        now.disks.insert(drive.clone(), disk);
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

    async fn look_at_commit(vm: &Vm, drive: &str, commit: &Commit) -> Result<Progress, Fault> {
        let path = format!("/drives/{drive}/job");
        if let Some(told) = ask(vm, Method::GET, &path, &Bytes::new()).await? {
            if told.status.is_success() {
                let job: Job = serde_json::from_slice(&told.body)?;
                if job.operation == "commit" && job.state == JobState::Running {
                    return Ok(Progress::Running);
                }
            } else if told.status != StatusCode::BAD_REQUEST {
                return Err(proxy::refusal(&told));
            }
            // No commit is at work, so that the configuration has its outcome.
            if let Some(told) = ask(vm, Method::GET, "/vm/config", &Bytes::new()).await? {
                let config: VmConfig = serde_json::from_slice(&told.body)?;
                return Ok(Progress::Over(path_of(&config, drive, &vm.folder)));
            }
        }
        if vm.now().process.is_some() {
            // It is about to be deleted.
            return Ok(Progress::Running);
        }
        // A guest in a jail may have put anything in the place of a folder but its own.
        let is_own = commit.top.parent() == Some(&*vm.folder);
        let may_remove = is_own || vm.now().jail.is_none();
        let (left, top) = (commit.clone(), commit.top.clone());
        let disk = blocking(move || left.left(may_remove)).await?;
        let disk = disk.map_err(Fault::Store)?;
        if disk.is_none() {
            tracing::error!(vm = %vm.id, drive, top = %top.display(), "what this disk was merged into is not known");
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
        let commit = Commit {
            top: top.clone(),
            base: Some(base.clone()),
        };
        let left = || commit.left(true).unwrap();
        fs::write(&top, "vhdxfile").unwrap();
        assert_eq!(left(), Some(top.clone()));
        // Half made, and what the guest has had since it was whole.
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
