//! The life of a guest: made, started, paused, and started again. How it is stopped and deleted is in `stopping`, its end is told in `ending`, and
//! how the next daemon finds it in `recovery`.
//!
//! ```text
//! create ─> Creating ─> NotStarted ── start ──> Running <── pause / resume ──> Paused         (start: see `waiting`)
//!                          stop, power off ┘        │ failure
//! delete <── any        Stopped <───────────────────┴──────> Failed, or Restarting ─> Starting ─> Running
//! ```
//!
//! Each operation runs to its end, whatever becomes of the caller's connection: see [`Daemon::detached`].

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::http::Method;
use rustix::process::Signal;
use serde_json::json;
use tokio::sync::OwnedMutexGuard;
use tokio::time::sleep;

use super::Daemon;
use super::events::EventKind;
use super::fault::Fault;
use super::identity;
use super::jail::Jailed;
use super::pending::Pending;
use super::process::{self, Launch, Process, Purpose};
use super::proxy;
use super::spec::{Resolved, VmSpec};
use super::status::{Ended, State, now_ms};
use super::store::{Phase, Record};
use super::told::Told;
use super::vm::Vm;
use super::waiting::write_config;
use config::VmConfig;
use host::exit::{EndKind, EndReport};

/// How long a guest may take to its first instruction.
const START: Duration = Duration::from_mins(1);
/// How old a measure may be for admission.
const FRESH: Duration = Duration::from_secs(10);

/// Runs what waits for the host on a thread for that.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Fault> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|error| Fault::Internal(error.to_string()))
}

/// A name that nobody has thought of.
fn made_up() -> String {
    let mut bytes = [0u8; 8];
    // The kernel's generator does not fail where it is asked for a few bytes.
    let _ = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty());
    format!("vm-{:016x}", u64::from_ne_bytes(bytes))
}

/// A name in the registry.
enum Claim {
    New(Arc<Vm>, OwnedMutexGuard<()>, Box<VmConfig>),
    Taken(Arc<Vm>),
}

impl Daemon {
    /// Runs an operation to its end, even where nobody waits for it any more.
    ///
    /// # Errors
    /// Those of the operation; `Internal` where it panicked.
    pub async fn detached<T: Send + 'static>(
        operation: impl Future<Output = Result<T, Fault>> + Send + 'static,
    ) -> Result<T, Fault> {
        let done = tokio::spawn(operation).await;
        done.map_err(|error| Fault::Internal(error.to_string()))?
    }

    /// Makes a guest, or finds the one that was made in the same way; says whether it is new.
    ///
    /// # Errors
    /// Whatever is in the way; nothing of the guest is left then.
    pub async fn create(
        self: Arc<Self>,
        mut spec: VmSpec,
        uid: u32,
    ) -> Result<(Arc<Vm>, bool), Fault> {
        spec.check()?;
        let id = spec.id.get_or_insert_with(made_up).clone();
        if !self.store.has_room_for(&id) {
            return Err(Fault::LongPath(id));
        }
        self.measure(FRESH).await;
        loop {
            match self.claim(&id, &spec, uid)? {
                Claim::New(vm, _operation, config) => {
                    self.build(&vm, *config).await?;
                    return Ok((vm, true));
                }
                Claim::Taken(vm) => {
                    let settled = |state| !matches!(state, State::Creating | State::Deleting);
                    if !settled(vm.state()) {
                        drop(vm.operation.lock().await);
                        continue;
                    }
                    return if vm.spec == spec {
                        Ok((vm, false))
                    } else {
                        Err(Fault::Exists(id))
                    };
                }
            }
        }
    }

    /// Takes the name, if the guest can be and has room. No other guest can take that room meanwhile.
    fn claim(&self, id: &str, spec: &VmSpec, uid: u32) -> Result<Claim, Fault> {
        let images = self.images();
        let mut vms = self.vms();
        if let Some(vm) = vms.get(id) {
            return Ok(Claim::Taken(vm.clone()));
        }
        let folder = self.store.vm(id);
        let told = Told::default();
        let resolved = spec.resolved(&told, &images, &self.templates(), &folder)?;
        let Resolved { mut config, images } = resolved;
        let cid = Self::cid_for(spec, &config, vms.values())?;
        identity::identify(&mut config, cid);
        let record = Record {
            spec: spec.clone(),
            uid,
            created_ms: now_ms(),
            phase: Phase::Creating,
            state: State::Creating,
            jail: self.jail_for(id, vms.values())?,
            images,
            loaded: spec.template.is_some(),
            cid,
            disks: BTreeMap::new(),
            told,
            pending: Pending::default(),
            restarts: 0,
            failures: 0,
            end: None,
        };
        let vm = Vm::new(id.to_owned(), folder, record, &config);
        let others: Vec<_> = vms.values().map(|vm| vm.load()).collect();
        if let Err(refusal) = self.limits.admit(&others, &vm.load()) {
            self.events
                .tell(EventKind::Refused, Some(id), Some(refusal.to_string()));
            return Err(refusal.into());
        }
        let vm = Arc::new(vm);
        let operation = vm.operation.clone().try_lock_owned();
        let operation = operation.map_err(|error| Fault::Internal(error.to_string()))?;
        vms.insert(id.to_owned(), vm.clone());
        Ok(Claim::New(vm, operation, Box::new(config)))
    }

    async fn build(self: &Arc<Self>, vm: &Arc<Vm>, config: VmConfig) -> Result<(), Fault> {
        let (daemon, record, id) = (self.clone(), vm.record(), vm.id.clone());
        let made = blocking(move || daemon.store.create(&id, &record, &config));
        let built = async {
            made.await?.map_err(Fault::Store)?;
            let purpose = match &vm.spec.template {
                Some(id) => {
                    let template = self.templates().get(id)?;
                    let own = self.store.template(id);
                    Purpose::Restore(template.restore(
                        &own,
                        &vm.folder,
                        vm.spec.start,
                        vm.now().cid,
                    ))
                }
                None if vm.spec.start => Purpose::Boot,
                None => Purpose::Configure,
            };
            let state = self.bring_up(vm, purpose).await?;
            let record = Record {
                phase: Phase::Present,
                state,
                ..vm.record()
            };
            let (daemon, id) = (self.clone(), vm.id.clone());
            blocking(move || daemon.store.save(&id, &record))
                .await?
                .map_err(Fault::Store)?;
            Ok::<_, Fault>(state)
        };
        match built.await {
            Ok(state) => {
                vm.change(|now| {
                    now.phase = Phase::Present;
                    now.state = state;
                });
                self.events.tell(EventKind::Created, Some(&vm.id), None);
                self.tell_started(vm, state);
                self.settle(vm);
                Ok(())
            }
            Err(fault) => {
                self.events
                    .tell(EventKind::Failed, Some(&vm.id), Some(fault.to_string()));
                if let Err(error) = self.tear_down(vm).await {
                    tracing::error!(vm = %vm.id, %error, "a guest that could not be made is not gone");
                }
                Err(fault)
            }
        }
    }

    pub(super) fn tell_started(&self, vm: &Vm, state: State) {
        if state == State::Running {
            self.events.tell(EventKind::Started, Some(&vm.id), None);
        }
    }

    /// Starts the process, and waits until it answers. The state that the guest is in then: one that has ended already, in good order, is
    /// `Stopped`.
    pub(super) async fn bring_up(
        self: &Arc<Self>,
        vm: &Arc<Vm>,
        purpose: Purpose,
    ) -> Result<State, Fault> {
        let begun = Instant::now();
        let (id, folder, daemon) = (vm.id.clone(), vm.folder.clone(), self.clone());
        let (jail, ram_mib, cid) = {
            let now = vm.now();
            (now.jail.clone(), now.ram_mib, now.cid)
        };
        let told = vm.now().told.metadata.clone();
        let asked = told.or_else(|| vm.spec.metadata.clone());
        let spawned = blocking(move || {
            let metadata = identity::write(&folder, &id, cid, asked.as_ref())?;
            let group = jail.as_ref().and_then(Jailed::cgroup);
            let before = group.map(|group| group.hits()).unwrap_or_default();
            let jail = match purpose {
                Purpose::Configure => None,
                Purpose::Boot | Purpose::Restore(_) => {
                    daemon.jails.prepare(jail.as_ref(), &folder, ram_mib)?
                }
            };
            let launch = Launch {
                id: &id,
                folder: &folder,
                purpose: &purpose,
                jail: jail.as_deref(),
                metadata,
            };
            let held = process::spawn(&launch, daemon.zygote.as_ref())?;
            Ok((held.release(&folder)?, before))
        });
        let (spawned, before) = spawned.await?.map_err(Fault::Spawn)?;
        let process = Arc::new(Process::new(spawned).map_err(Fault::Spawn)?);
        vm.change(|now| {
            now.process = Some(process.clone());
            now.since = Some(begun);
            now.stopping = false;
            now.end = None;
        });
        self.watch(vm, &process, before);
        let state = self.first_state(vm, &process, begun).await?;
        let took = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
        let runs = state == State::Running;
        vm.change(|now| now.start_ms = runs.then_some(took));
        if runs {
            self.metrics.started(begun.elapsed());
        }
        Ok(state)
    }

    /// Waits for the first answer of a process: the state of its guest.
    pub(super) async fn first_state(
        &self,
        vm: &Vm,
        process: &Process,
        begun: Instant,
    ) -> Result<State, Fault> {
        let answers = async {
            let socket = vm.api_socket();
            let mut pause = Duration::from_millis(1);
            loop {
                if let Some(state) = proxy::state(&socket, START).await {
                    return state;
                }
                sleep(pause).await;
                pause = (pause * 2).min(Duration::from_millis(50));
            }
        };
        tokio::select! {
            biased;
            () = vm.until(|now| now.process.is_none()) => {
                let end = vm.now().end.clone();
                let report = end.map_or_else(|| EndReport::failed(&"it ended"), |end| end.report);
                match report.kind {
                    EndKind::PowerOff | EndKind::Reset | EndKind::Panic | EndKind::Crash => Ok(State::Stopped),
                    EndKind::Failed | EndKind::Signal | EndKind::Quit | EndKind::Killed | EndKind::Unknown => {
                        Err(Fault::DidNotStart(report.text))
                    }
                }
            }
            state = answers => Ok(state),
            () = sleep(START.saturating_sub(begun.elapsed())) => {
                process.signal(Signal::KILL);
                Err(Fault::DidNotStart("it did not answer within a minute".to_owned()))
            }
        }
    }

    /// Gives a guest without a process one that starts it. Its operation is held.
    pub(super) async fn start_again(self: &Arc<Self>, vm: &Arc<Vm>) -> Result<(), Fault> {
        // With the disks that it had at its end.
        self.mend(vm).await;
        let started = async {
            let config = self.readmit(vm)?;
            // Without a kernel, it waits to be told of one.
            let purpose = match config.boot_source {
                Some(_) => Purpose::Boot,
                None => Purpose::Configure,
            };
            write_config(vm, config).await?;
            vm.change(|now| now.loaded = false);
            if self.rejail(vm)? {
                self.save(vm).await;
            }
            self.bring_up(vm, purpose).await
        };
        match started.await {
            Ok(state) => {
                vm.change(|now| now.state = state);
                self.tell_started(vm, state);
                self.settle(vm);
                self.save(vm).await;
                Ok(())
            }
            Err(fault) => {
                self.has_failed(vm, &fault).await;
                Err(fault)
            }
        }
    }

    /// Notes that a guest could not be given a process.
    pub(super) async fn has_failed(self: &Arc<Self>, vm: &Arc<Vm>, fault: &Fault) {
        let report = EndReport::failed(fault);
        vm.change(|now| {
            now.end.get_or_insert(Ended {
                report,
                time_ms: now_ms(),
            });
            now.state = State::Failed;
        });
        self.settle(vm);
        self.save(vm).await;
    }

    /// What a guest is to be started with: as it was made, or told since, and with the disks that it has come to.
    pub(super) fn config_of(&self, vm: &Vm) -> Result<VmConfig, Fault> {
        let told = vm.now().told.clone();
        let resolved = vm
            .spec
            .resolved(&told, &self.images(), &self.templates(), &vm.folder)?;
        let Resolved { mut config, .. } = resolved;
        identity::identify(&mut config, vm.now().cid);
        for (id, disk) in &vm.now().disks {
            if let Some(path) = config.disk_mut(id) {
                path.clone_from(disk);
            }
        }
        Ok(config)
    }

    /// Makes room for a guest that is about to start.
    pub(super) fn readmit(&self, vm: &Vm) -> Result<VmConfig, Fault> {
        let config = self.config_of(vm)?;
        let machine = &config.machine_config;
        self.admit_change(vm, machine.mem_size_mib, machine.vcpu_count, |now| {
            now.state = State::Starting;
        })?;
        Ok(config)
    }

    /// Admits a guest that is there with other RAM or vCPUs, and changes it then.
    ///
    /// # Errors
    /// `Refused`.
    pub fn admit_change(
        &self,
        vm: &Vm,
        ram_mib: u32,
        vcpus: u8,
        change: impl FnOnce(&mut super::vm::Now),
    ) -> Result<(), Fault> {
        let vms = self.vms();
        let others = vms.values().filter(|other| other.id != vm.id);
        let others: Vec<_> = others.map(|vm| vm.load()).collect();
        let load = super::admission::Load {
            ram_mib,
            vcpus,
            live: true,
            ..vm.load()
        };
        if let Err(refusal) = self.limits.admit(&others, &load) {
            self.events
                .tell(EventKind::Refused, Some(&vm.id), Some(refusal.to_string()));
            return Err(refusal.into());
        }
        vm.change(|now| {
            (now.ram_mib, now.vcpus) = (ram_mib, vcpus);
            change(now);
        });
        Ok(())
    }

    fn wrong(vm: &Vm, advice: &'static str) -> Fault {
        Fault::WrongState {
            id: vm.id.clone(),
            state: vm.state(),
            advice,
        }
    }

    /// Starts a guest: one that waits, or one that has ended. One that runs goes on running.
    ///
    /// # Errors
    /// Whatever is in the way.
    pub async fn start(self: Arc<Self>, vm: Arc<Vm>) -> Result<Arc<Vm>, Fault> {
        self.measure(FRESH).await;
        let _operation = vm.operation.clone().lock_owned().await;
        match vm.state() {
            State::Running => {}
            State::NotStarted => self.start_waiting(&vm).await?,
            State::Stopped | State::Failed | State::Restarting => {
                vm.change(|now| now.failures = 0);
                self.start_again(&vm).await?;
            }
            State::Paused => return Err(Self::wrong(&vm, "resume it")),
            State::Creating | State::Starting | State::Deleting => {
                return Err(Self::wrong(&vm, "it cannot be started now"));
            }
        }
        Ok(vm)
    }

    /// `InstanceStart`: starts a guest that waits. Whether it did wait.
    ///
    /// # Errors
    /// Whatever is in the way.
    pub async fn start_if_waiting(self: &Arc<Self>, vm: &Arc<Vm>) -> Result<bool, Fault> {
        self.measure(FRESH).await;
        let _operation = vm.operation.clone().lock_owned().await;
        let waits = vm.state() == State::NotStarted;
        if waits {
            self.start_waiting(vm).await?;
        }
        Ok(waits)
    }

    /// Notes what a guest has been seen to do.
    pub fn observe(&self, vm: &Vm, state: State) {
        let before = vm.change(|now| match now.state {
            State::NotStarted | State::Running | State::Paused if now.process.is_some() => {
                std::mem::replace(&mut now.state, state)
            }
            _ => state,
        });
        let kind = match (before, state) {
            (State::NotStarted, State::Running) => EventKind::Started,
            (State::Paused, State::Running) => EventKind::Resumed,
            (State::Running, State::Paused) => EventKind::Paused,
            _ => return,
        };
        self.events.tell(kind, Some(&vm.id), None);
    }

    /// Stops the vCPUs of a guest, or lets them go on.
    ///
    /// # Errors
    /// Whatever is in the way.
    pub async fn pause(self: Arc<Self>, vm: Arc<Vm>, state: State) -> Result<Arc<Vm>, Fault> {
        let _operation = vm.operation.clone().lock_owned().await;
        let word = if state == State::Paused {
            "Paused"
        } else {
            "Resumed"
        };
        proxy::act(&vm, Method::PATCH, "/vm", &json!({"state": word})).await?;
        self.observe(&vm, state);
        self.save(&vm).await;
        Ok(vm)
    }
}
