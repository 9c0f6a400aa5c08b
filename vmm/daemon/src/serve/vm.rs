//! A guest as the daemon knows it.
//!
//! What changes of it is behind one lock that is held for a few lines at a time. Longer work, such as a start or a
//! deletion, takes the lock `operation`, so that there is one at a time. A task that waits for a state waits for
//! `changed`.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use parking_lot::{Mutex, MutexGuard};
use tokio::sync::{Mutex as AsyncMutex, Notify, Semaphore};

use super::admission::Load;
use super::file_copy::CopyProgress;
use super::process::Process;
use super::record::{
    Ended, FoundFormat, Interfaces, JailResources, LaterConfig, Pending, Phase, Record, State,
    VmSpec,
};
use super::status::{InterfaceStatus, MemorySplit, TemplateJob, VmStatus, VsockStatus};
use super::store::VSOCK_SOCKET;
use config::{DeviceId, VmConfig};

/// Requests to a guest's process at the same time. The process serves twice as many, so that its other clients are not
/// kept out.
const REQUESTS: usize = 4;

/// What was measured of a process.
#[derive(Clone, Copy, Debug)]
pub struct Measured {
    /// When.
    pub at: Instant,
    /// Its memory.
    pub memory: MemorySplit,
    /// Its CPU time.
    pub cpu_s: f64,
}

/// What changes of a guest.
#[derive(Debug)]
pub struct Now {
    /// Where it is in its life.
    pub state: State,
    /// How far its creation or deletion has come.
    pub phase: Phase,
    /// Its process.
    pub process: Option<Arc<Process>>,
    /// When its process started.
    pub since: Option<Instant>,
    /// Whether it was asked to end.
    pub stopping: bool,
    /// How it ended the last time.
    pub end: Option<Ended>,
    /// How often it was started again.
    pub restarts: u32,
    /// Of those, how often without having run for long.
    pub failures: u32,
    /// RAM.
    pub ram_mib: u32,
    /// vCPUs.
    pub vcpus: u8,
    /// From the start of the process to the first instruction.
    pub start_ms: Option<u64>,
    /// The last look at the process.
    pub measured: Option<Measured>,
    /// What its jail takes of the host.
    pub jail: Option<JailResources>,
    /// Images that it uses.
    pub images: Vec<String>,
    /// Whether it still is the guest that was loaded from its template, and has not booted since.
    pub loaded: bool,
    /// The identifier of its vsock device, if it has one.
    pub cid: Option<u32>,
    /// Its interfaces in networks, by name.
    pub interfaces: Interfaces,
    /// Disks that have taken the place of those that it was made with, by drive.
    pub disks: BTreeMap<DeviceId, PathBuf>,
    /// Disks that were in this place before, and may be the parents of others.
    pub former_disks: BTreeSet<PathBuf>,
    /// The formats of those of its disks of which nobody has named one.
    pub formats: BTreeMap<DeviceId, FoundFormat>,
    /// What it was configured to over its own API.
    pub later: LaterConfig,
    /// The operations on it that are not complete.
    pub pending: Pending,
    /// Whether a task follows its commits.
    pub is_followed: bool,
    /// Why its record cannot be read, where it cannot.
    pub unreadable: Option<String>,
    /// The template that is being made of it, while its files are copied.
    pub copying: Option<(String, Arc<CopyProgress>)>,
}

impl Now {
    /// Notes that a drive or pmem device has another disk.
    pub fn set_disk(&mut self, id: &DeviceId, disk: PathBuf) {
        self.former_disks.remove(&disk);
        self.former_disks
            .extend(self.disks.insert(id.clone(), disk));
    }

    /// Whether it runs, or is about to, and nobody has asked it to end.
    pub fn is_to_run(&self) -> bool {
        match self.state {
            State::Creating
            | State::Starting
            | State::Running
            | State::Paused
            | State::Restarting => !self.stopping,
            State::NotStarted
            | State::Stopped
            | State::Failed
            | State::Deleting
            | State::Unreadable => false,
        }
    }
}

/// A guest.
#[derive(Debug)]
pub struct Vm {
    /// Its name.
    pub id: String,
    /// What was asked for.
    pub spec: VmSpec,
    /// The user who asked.
    pub uid: u32,
    /// When it was made, in ms since 1970.
    pub created_ms: u64,
    /// Its folder.
    pub folder: PathBuf,
    /// Locked by an operation that takes long, such as a start or a deletion.
    pub operation: Arc<AsyncMutex<()>>,
    /// Locked from a request over the guest's own API that changes its lasting configuration until that is in `later`.
    /// Taken after `operation`.
    pub reconfiguring: AsyncMutex<()>,
    /// Locked while `vm.json` is written.
    pub saving: AsyncMutex<()>,
    /// Limits the requests to its process.
    pub requests: Arc<Semaphore>,
    now: Mutex<Now>,
    changed: Notify,
}

impl Vm {
    /// The guest of a record, which is started with `config`.
    pub fn new(id: String, folder: PathBuf, record: Record, config: &VmConfig) -> Self {
        let machine = &config.machine_config;
        Self {
            id,
            spec: record.spec,
            uid: record.uid,
            created_ms: record.created_ms,
            folder,
            operation: Arc::default(),
            reconfiguring: AsyncMutex::default(),
            saving: AsyncMutex::default(),
            requests: Arc::new(Semaphore::new(REQUESTS)),
            now: Mutex::new(Now {
                state: record.state,
                phase: record.phase,
                process: None,
                since: None,
                stopping: false,
                end: record.end,
                restarts: record.restarts,
                failures: record.failures,
                ram_mib: machine.mem_size_mib,
                vcpus: machine.vcpu_count,
                start_ms: None,
                measured: None,
                jail: record.jail,
                images: record.images,
                loaded: record.loaded,
                cid: record.cid,
                interfaces: record.interfaces,
                disks: record.disks,
                former_disks: record.former_disks,
                formats: record.formats,
                later: record.later,
                pending: record.pending,
                is_followed: false,
                unreadable: None,
                copying: None,
            }),
            changed: Notify::new(),
        }
    }

    /// What changes of it, locked.
    pub fn now(&self) -> MutexGuard<'_, Now> {
        self.now.lock()
    }

    /// Changes it, and wakes the tasks that wait for a change.
    pub fn change<T>(&self, change: impl FnOnce(&mut Now) -> T) -> T {
        let done = change(&mut self.now());
        self.changed.notify_waiters();
        done
    }

    /// Its state.
    pub fn state(&self) -> State {
        self.now().state
    }

    /// Waits until `wanted` is true.
    pub async fn until(&self, wanted: impl Fn(&Now) -> bool) {
        loop {
            let mut changed = std::pin::pin!(self.changed.notified());
            // Enabled before the check, so that a change between the check and the wait is not missed.
            changed.as_mut().enable();
            if wanted(&self.now()) {
                return;
            }
            changed.await;
        }
    }

    /// Whether it uses an image, or may do so, as its record does not say.
    pub fn may_use_image(&self, name: &str) -> bool {
        let now = self.now();
        now.unreadable.is_some() || now.images.iter().any(|image| image == name)
    }

    /// Whether it is a clone of a template, or may be one, as its record does not say.
    pub fn may_use_template(&self, id: &str) -> bool {
        self.now().unreadable.is_some() || self.spec.template.as_deref() == Some(id)
    }

    /// Its REST socket.
    pub fn api_socket(&self) -> PathBuf {
        self.folder.join("api.sock")
    }

    /// Its console.
    pub fn console_socket(&self) -> PathBuf {
        self.folder.join("console.sock")
    }

    /// Its record, for `vm.json`.
    pub fn record(&self) -> Record {
        let now = self.now();
        Record {
            spec: self.spec.clone(),
            uid: self.uid,
            created_ms: self.created_ms,
            phase: now.phase,
            state: now.state,
            jail: now.jail.clone(),
            images: now.images.clone(),
            loaded: now.loaded,
            cid: now.cid,
            interfaces: now.interfaces.clone(),
            disks: now.disks.clone(),
            former_disks: now.former_disks.clone(),
            formats: now.formats.clone(),
            later: now.later.clone(),
            pending: now.pending.clone(),
            restarts: now.restarts,
            failures: now.failures,
            end: now.end.clone(),
        }
    }

    /// What it counts for the admission of another guest.
    pub fn load(&self) -> Load {
        let now = self.now();
        let live = match now.state {
            State::Creating | State::Starting | State::Restarting => true,
            State::NotStarted
            | State::Running
            | State::Paused
            | State::Stopped
            | State::Failed
            | State::Deleting
            | State::Unreadable => now.process.is_some(),
        };
        Load {
            uid: self.uid,
            live,
            ram_mib: now.ram_mib,
            vcpus: now.vcpus,
            memory: now.measured.map(|measured| measured.memory),
        }
    }

    /// Its status, as the REST API shows it.
    pub fn status(&self, stats: bool, config: bool) -> VmStatus {
        let now = self.now();
        let measured = now.measured.filter(|_| stats);
        VmStatus {
            id: self.id.clone(),
            state: now.state,
            pid: now.process.as_ref().map(|process| process.pid),
            vcpus: now.vcpus,
            mem_size_mib: now.ram_mib,
            created_ms: self.created_ms,
            uid: self.uid,
            uptime_s: now.since.map(|since| since.elapsed().as_secs()),
            start_ms: now.start_ms,
            restart: self.spec.restart,
            restarts: now.restarts,
            labels: self.spec.labels.clone(),
            end: now.end.clone(),
            memory: measured.map(|measured| measured.memory),
            cpu_s: measured.map(|measured| measured.cpu_s),
            template: self.spec.template.clone(),
            vsock: now.cid.map(|guest_cid| VsockStatus {
                guest_cid,
                uds_path: self
                    .folder
                    .join(now.later.socket().unwrap_or(Path::new(VSOCK_SOCKET)))
                    .display()
                    .to_string(),
            }),
            networks: now
                .interfaces
                .iter()
                .map(|(id, interface)| InterfaceStatus::new(id, &interface.attachment))
                .collect(),
            unreadable: now.unreadable.clone(),
            template_job: now.copying.as_ref().map(|(id, progress)| {
                let (done, total) = progress.bytes();
                TemplateJob {
                    id: id.clone(),
                    done,
                    total,
                }
            }),
            guest_uid: now.jail.as_ref().and_then(|jail| jail.uid),
            config: config
                .then(|| now.later.shown().or_else(|| self.spec.config.clone()))
                .flatten(),
        }
    }
}
