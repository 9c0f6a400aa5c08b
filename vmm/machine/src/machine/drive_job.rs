//! Jobs on the disk of a running guest: compaction and commits. Snapshots and new sizes are done at once, and are no
//! jobs.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use devices::virtio::block::VirtioBlock;
use serde::{Deserialize, Serialize};
use storage::vhdx::{ChainError, CompactOptions, Vhdx};
use storage::{Disk, DiskError, Progress, Refusal};

use host::report::chain;

use super::error::DriveError;
use super::sharing::{Sharing, Unsharing};
use devices::lock;

/// The error for a parent that nothing can be merged into.
fn parent_refuses(error: ChainError, base: &Path) -> DriveError {
    use std::io::ErrorKind::{PermissionDenied, ReadOnlyFilesystem};
    match error {
        ChainError::Refused(Refusal::Io { source, .. })
            if matches!(source.kind(), PermissionDenied | ReadOnlyFilesystem) =>
        {
            DriveError::ParentClosed {
                base: base.to_owned(),
                error: source,
            }
        }
        other => other.into(),
    }
}

/// What a job does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DriveTask {
    /// Moves blocks down and cuts the file.
    Compact {
        /// Also gives back blocks that hold only zeros.
        find_zeros: bool,
    },
    /// Merges the disk, whose file is at `top`, into its parent, which is the guest's disk from then on. Meanwhile the
    /// guest writes to a child, see [`commit_child`].
    ///
    /// If the process is killed, the files that are left say which disk the guest had: the child where it exists and is
    /// complete, otherwise `top` where it exists, and otherwise the parent.
    Commit {
        /// The file.
        top: PathBuf,
    },
}

/// The file that a guest writes to while its disk in the file `top` is committed.
pub fn commit_child(top: &Path) -> PathBuf {
    let mut name = top.as_os_str().to_owned();
    name.push(".commit");
    name.into()
}

impl DriveTask {
    fn name(&self) -> &'static str {
        match self {
            Self::Compact { .. } => "compaction",
            Self::Commit { .. } => "commit",
        }
    }
}

/// How far a job has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub enum JobState {
    /// The job is running.
    Running,
    /// The job has done its task.
    Done,
    /// The job was cancelled, and has stopped.
    Cancelled,
    /// The job was stopped by an error.
    Failed,
}

/// A job as the API reports it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, utoipa::ToSchema)]
pub struct JobStatus {
    /// `compaction` or `commit`.
    pub operation: &'static str,
    /// How far it has come.
    pub state: JobState,
    /// Bytes that are processed.
    pub done: u64,
    /// Bytes in all.
    pub total: u64,
    /// Why it failed.
    pub error: Option<String>,
    /// The file that the drive has now.
    #[schema(value_type = Option<String>)]
    pub path_on_host: Option<PathBuf>,
    /// The file that a commit merges into.
    #[schema(value_type = Option<String>)]
    pub base_on_host: Option<PathBuf>,
}

/// The parent of a drive's disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct DriveParent {
    /// The file of its parent.
    #[schema(value_type = String)]
    pub path_on_host: PathBuf,
}

impl DriveParent {
    /// The parent of a disk whose file is at `top`.
    pub(super) fn of(disk: &Vhdx, top: &Path) -> Result<Self, DriveError> {
        let parent = disk.parent_path(top).ok_or(DriveError::NoParent)?;
        // The name in the disk is relative to its folder.
        let path_on_host = parent.canonicalize().map_err(|error| DriveError::Io {
            operation: format!("find {}", parent.display()),
            error,
        })?;
        Ok(Self { path_on_host })
    }
}

/// A job, which a thread of its own runs.
#[derive(Debug)]
pub struct DriveJob {
    task: DriveTask,
    done: AtomicU64,
    total: AtomicU64,
    cancelled: AtomicBool,
    end: parking_lot::Mutex<Option<(JobState, Option<String>)>>,
    path: parking_lot::Mutex<Option<PathBuf>>,
    /// The file that a commit merges into.
    base: Option<PathBuf>,
}

impl Progress for DriveJob {
    fn advance(&self, done: u64, total: u64) {
        self.done.store(done, Ordering::Relaxed);
        self.total.store(total, Ordering::Relaxed);
    }

    fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed)
    }
}

impl DriveJob {
    /// Asks it to stop.
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::Relaxed);
    }

    /// Whether it is over.
    pub fn is_over(&self) -> bool {
        self.end.lock().is_some()
    }

    /// What it does.
    pub fn name(&self) -> &'static str {
        self.task.name()
    }

    /// How far it has come.
    pub fn status(&self) -> JobStatus {
        let (state, error) = self.end.lock().clone().unwrap_or((JobState::Running, None));
        JobStatus {
            operation: self.task.name(),
            state,
            done: self.done.load(Ordering::Relaxed),
            total: self.total.load(Ordering::Relaxed),
            error,
            path_on_host: self.path.lock().clone(),
            base_on_host: self.base.clone(),
        }
    }

    /// Starts a thread that does the task on a drive.
    pub(super) fn start(
        drive: &Arc<Mutex<VirtioBlock>>,
        task: DriveTask,
        sharing: &Sharing,
    ) -> Result<Arc<Self>, DriveError> {
        let disk = vhdx(lock(drive).disk())?;
        let base = match &task {
            DriveTask::Compact { .. } => None,
            DriveTask::Commit { top } => {
                let base = DriveParent::of(&disk, top)?.path_on_host;
                disk.check_parent_writable()
                    .map_err(|error| parent_refuses(error, &base))?;
                Some(base)
            }
        };
        drop(disk);
        let job = Arc::new(Self {
            task,
            base,
            done: AtomicU64::new(0),
            total: AtomicU64::new(0),
            cancelled: AtomicBool::new(false),
            end: parking_lot::Mutex::new(None),
            path: parking_lot::Mutex::new(None),
        });
        let (worker, drive) = (Arc::clone(&job), Arc::clone(drive));
        let unsharing = sharing.unsharing();
        std::thread::Builder::new()
            .name("drive-job".into())
            .spawn(move || {
                let end = match worker.run(&drive, &unsharing) {
                    Ok(()) => (JobState::Done, None),
                    Err(DriveError::Disk(DiskError::Cancelled)) => (JobState::Cancelled, None),
                    Err(error) => (JobState::Failed, Some(chain(&error).to_string())),
                };
                tracing::info!(operation = worker.name(), state = ?end.0, "drive job over");
                *worker.end.lock() = Some(end);
            })
            .map_err(|error| DriveError::Io {
                operation: "start a thread".into(),
                error,
            })?;
        Ok(job)
    }

    fn run(&self, drive: &Mutex<VirtioBlock>, unsharing: &Unsharing) -> Result<(), DriveError> {
        match &self.task {
            DriveTask::Compact { find_zeros } => {
                let options = CompactOptions {
                    find_zeros: *find_zeros,
                };
                let disk = vhdx(lock(drive).disk())?;
                disk.compact(options, self)?;
                Ok(())
            }
            DriveTask::Commit { top } => {
                // The merge writes to files whose pages the guest may have mapped.
                let sharing = lock(drive).sharing().cloned();
                lock(drive).share(None);
                let files = lock(drive).disk().files();
                let unshared = unsharing.unshare(&files).map_err(|error| DriveError::Io {
                    operation: "give the guest pages of its own".into(),
                    error,
                });
                drop(files);
                let done = unshared.and_then(|()| self.commit(drive, top));
                lock(drive).share(sharing);
                done
            }
        }
    }

    /// Puts a child over the disk, and merges the disk while the guest writes to the child. In the end the child is
    /// merged too, which holds up the guest only for a short time.
    fn commit(&self, drive: &Mutex<VirtioBlock>, top: &Path) -> Result<(), DriveError> {
        let disk = vhdx(lock(drive).disk())?;
        let base = self.base.clone().ok_or(DriveError::NoParent)?;
        drop(disk);
        let new = commit_child(top);
        let mut failed = None;
        lock(drive).change_disk(|disk| -> Result<Arc<dyn Disk>, DriveError> {
            let child = vhdx(disk)?.snapshot(top, &new)?;
            // From here on the guest needs the new file, even if the commit fails.
            *self.path.lock() = Some(new.clone());
            Ok(match child.open_for_commit() {
                Ok(ready) => ready,
                Err(error) => {
                    failed = Some(error);
                    child
                }
            })
        })?;
        if let Some(error) = failed {
            return Err(error.into());
        }
        let middle = {
            let disk = vhdx(lock(drive).disk())?;
            disk.parent().cloned().ok_or(DriveError::NoParent)?
        };
        middle.merge_into_parent(self)?;
        drop(middle);
        let mut removed = Ok(());
        lock(drive).change_disk(|disk| -> Result<Arc<dyn Disk>, DriveError> {
            let done = vhdx(disk)?.finish_commit(&new, &base)?;
            *self.path.lock() = Some(base.clone());
            // The files are removed before the guest writes to the parent, because they say which disk the guest has:
            // so `top` is removed first.
            removed = [top, &new].into_iter().try_for_each(|file| {
                std::fs::remove_file(file).map_err(|error| DriveError::Io {
                    operation: format!("remove {}, which is merged", file.display()),
                    error,
                })
            });
            Ok(done)
        })?;
        removed
    }
}

/// The disk as a VHDX.
pub(super) fn vhdx(disk: &Arc<dyn Disk>) -> Result<Arc<Vhdx>, DriveError> {
    Vhdx::of(Arc::clone(disk)).ok_or(DriveError::NotVhdx)
}
