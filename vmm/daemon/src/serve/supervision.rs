//! The supervision of guests' processes: each is brought up, watched, and brought up again when it has ended, as the
//! restart policy of its guest says.
//!
//! ```text
//! bring_up ──> watch ── the process ends ──> ended ──> apply_restart_policy ──> Stopped, Failed
//!    ^                                                        │
//!    └──────────── start_again <── after a pause ── Restarting
//! ```

use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use tokio::time::sleep;

use super::daemon::Daemon;
use super::end_reason::reason;
use super::events::EventKind;
use super::fault::Fault;
use super::identity;
use super::process::{self, Exit, Launch, Process};
use super::proxy;
use super::record::{Ended, Interfaces, JailResources, RestartPolicy, State};
use super::status::now_ms;
use super::store::{self, METADATA};
use super::task::blocking;
use super::vm::Vm;
use config::VmConfig;
use control::launch_spec::{CONFIG, LaunchSpec, Purpose};
use host::exit::{EndKind, EndReport};
use host::report::chain;
use jail::{CgroupConfig, LimitHits};

/// Deadline of a start: from the start of the process to its first answer.
const START: Duration = Duration::from_mins(1);
/// Most restarts in a row after none of which a guest ran for [`LONG`].
const RESTARTS: u32 = 5;
const LONG: Duration = Duration::from_mins(1);

/// Writes the configuration that the next process of a guest starts with.
///
/// # Errors
/// `Store`.
pub async fn write_config(vm: &Vm, config: VmConfig) -> Result<(), Fault> {
    let path = vm.folder.join(CONFIG);
    let written = blocking(move || store::write(&path, &config, false)).await?;
    written.map_err(Fault::Store)
}

impl Daemon {
    /// Tells that a guest has started, if it runs.
    pub fn tell_started(&self, vm: &Vm, state: State) {
        if state == State::Running {
            self.events.tell(EventKind::Started, Some(&vm.id), None);
        }
    }

    /// Starts the process of a guest, and waits until it answers. Gives the state that the guest is in then: one that
    /// has ended already, in good order, is `Stopped`.
    ///
    /// # Errors
    /// `Spawn`, `HostNetwork`, `DidNotStart`.
    pub async fn bring_up(
        self: &Arc<Self>,
        vm: &Arc<Vm>,
        purpose: Purpose,
    ) -> Result<State, Fault> {
        let begun = Instant::now();
        let (id, folder, daemon) = (vm.id.clone(), vm.folder.clone(), self.clone());
        let (jail, ram_mib, cid, interfaces) = {
            let now = vm.now();
            let interfaces = now.interfaces.clone();
            (now.jail.clone(), now.ram_mib, now.cid, interfaces)
        };
        let later = vm.now().later.metadata.clone();
        let asked = later.or_else(|| vm.spec.metadata.clone());
        let spawned = blocking(move || {
            let metadata =
                identity::write(&folder, &id, cid, asked.as_ref()).map_err(Fault::Spawn)?;
            let group = jail.as_ref().and_then(JailResources::cgroup);
            let before = group.map(|group| group.hits()).unwrap_or_default();
            let jail = match purpose {
                Purpose::Configure => None,
                Purpose::Boot | Purpose::Restore(_) => {
                    let prepared = daemon.jails.prepare(jail.as_ref(), &folder, ram_mib);
                    prepared.map_err(Fault::Spawn)?
                }
            };
            // Such a process never has a guest, and so no tap.
            let attached = match purpose {
                Purpose::Configure => Interfaces::new(),
                Purpose::Boot | Purpose::Restore(_) => interfaces,
            };
            let (names, taps) = daemon.networks.attach(&attached)?;
            let spec = LaunchSpec {
                purpose,
                jail,
                metadata: metadata.then(|| METADATA.into()),
                taps: names,
            };
            let launch = Launch {
                id: &id,
                folder: &folder,
                spec: &spec,
            };
            let released = process::spawn(&launch, daemon.zygote.as_ref())
                .and_then(|gated| gated.release(&folder, &taps))
                .inspect_err(|_| daemon.networks.detach(&attached));
            Ok::<_, Fault>((released.map_err(Fault::Spawn)?, before))
        });
        let (spawned, before) = spawned.await??;
        let process = Arc::new(Process::new(spawned).map_err(Fault::Spawn)?);
        vm.change(|now| {
            now.process = Some(process.clone());
            now.since = Some(begun);
            now.stopping = false;
            now.end = None;
        });
        self.watch(vm, &process, before);
        let state = self.first_state(vm, &process, begun).await?;
        self.guard_shared(vm).await?;
        let took = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
        let runs = state == State::Running;
        vm.change(|now| now.start_ms = runs.then_some(took));
        if runs {
            self.metrics.started(begun.elapsed());
        }
        Ok(state)
    }

    /// Waits for the first answer of a process, and gives the state of its guest.
    ///
    /// # Errors
    /// `DidNotStart`.
    pub async fn first_state(
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
                let report = end.map_or_else(|| EndReport::failed_because("it ended"), |end| end.report);
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

    /// Starts a guest that has no process. The caller has locked `operation`.
    ///
    /// # Errors
    /// Where that cannot be done; the guest is `Failed` then, or is started again later.
    pub async fn start_again(self: &Arc<Self>, vm: &Arc<Vm>) -> Result<(), Fault> {
        // Which disks the guest had at its end has to be known first.
        self.reconcile(vm).await;
        let started = async {
            let config = self.readmit(vm)?;
            // A guest without a kernel waits to be configured.
            let purpose = match config.boot_source {
                Some(_) => Purpose::Boot,
                None => Purpose::Configure,
            };
            let (config, is_new) = self.with_formats(vm, config).await?;
            write_config(vm, config).await?;
            vm.change(|now| now.loaded = false);
            if self.rejail(vm)? || is_new {
                self.save(vm).await;
            }
            self.bring_up(vm, purpose).await
        };
        match started.await {
            Ok(state) => {
                vm.change(|now| now.state = state);
                self.tell_started(vm, state);
                self.apply_restart_policy(vm);
                self.save(vm).await;
                Ok(())
            }
            Err(fault) => {
                self.has_failed(vm, &fault).await;
                Err(fault)
            }
        }
    }

    /// Records that the start of a guest has failed.
    pub async fn has_failed(self: &Arc<Self>, vm: &Arc<Vm>, fault: &Fault) {
        let report = EndReport::failed(fault);
        vm.change(|now| {
            now.end.get_or_insert(Ended {
                report,
                time_ms: now_ms(),
            });
            now.state = State::Failed;
        });
        self.apply_restart_policy(vm);
        self.save(vm).await;
    }

    /// Takes over a process of a guest that an earlier daemon has started.
    pub fn adopt(self: &Arc<Self>, vm: &Arc<Vm>, process: Process) {
        let process = Arc::new(process);
        vm.change(|now| {
            now.since = Instant::now().checked_sub(process::age(process.pid));
            now.process = Some(process.clone());
            now.end = None;
        });
        let group = vm.now().jail.as_ref().and_then(JailResources::cgroup);
        let before = group.map(|group| group.hits()).unwrap_or_default();
        self.guarded_files.guard_all(&vm.id, &vm.folder);
        self.watch(vm, &process, before);
    }

    /// Guards the files that a guest shares, if its process still runs.
    async fn guard_shared(self: &Arc<Self>, vm: &Arc<Vm>) -> Result<(), Fault> {
        let (daemon, guest) = (self.clone(), vm.clone());
        blocking(move || daemon.guarded_files.guard_all(&guest.id, &guest.folder)).await?;
        if vm.now().process.is_none() {
            self.guarded_files.release_all(&vm.id);
        }
        Ok(())
    }

    /// Starts a task that waits for the end of a process. `before` is how often its control group had met its limits
    /// before.
    pub fn watch(self: &Arc<Self>, vm: &Arc<Vm>, process: &Arc<Process>, before: LimitHits) {
        let (daemon, vm, process) = (self.clone(), vm.clone(), process.clone());
        tokio::spawn(async move {
            let exit = process.watched(&vm.folder).await;
            daemon.ended(&vm, exit, before).await;
        });
    }

    /// Records the end of a guest's process, and decides what becomes of the guest.
    pub async fn ended(self: &Arc<Self>, vm: &Arc<Vm>, exit: Exit, before: LimitHits) {
        let folder = vm.folder.clone();
        let group = vm.now().jail.as_ref().and_then(JailResources::cgroup);
        let (daemon, interfaces) = (self.clone(), vm.now().interfaces.clone());
        let report = blocking(move || {
            daemon.networks.detach(&interfaces);
            let hits = group.as_ref().map(CgroupConfig::hits).unwrap_or_default();
            let killed = group.as_ref().filter(|_| hits.killed > before.killed);
            let mut report = reason(&folder, exit, killed);
            let refused = group.as_ref().filter(|_| hits.refused > before.refused);
            if let (EndKind::Failed, Some(group)) = (report.kind, refused) {
                report.text = format!("{}: {}", report.text, group.few_threads());
            }
            report
        });
        let report = report.await;
        let report = report.unwrap_or_else(|fault| EndReport::failed(&fault));
        self.guarded_files.release_all(&vm.id);
        tracing::info!(vm = %vm.id, ?report, "a process has ended");
        let decides = vm.change(|now| {
            let ran = now.since.take().map(|since| since.elapsed());
            now.process = None;
            now.measured = None;
            now.end = Some(Ended {
                report,
                time_ms: now_ms(),
            });
            // How long it ran is not known where it ended while there was no daemon, which happens once for each daemon
            // at most.
            if ran.is_none_or(|ran| ran >= LONG) {
                now.failures = 0;
            }
            match now.state {
                // The operation that makes, starts or deletes it decides. Of one whose record cannot be read, it is not
                // known what is to become of it.
                State::Creating | State::Starting | State::Deleting | State::Unreadable => false,
                State::NotStarted
                | State::Running
                | State::Paused
                | State::Stopped
                | State::Failed
                | State::Restarting => true,
            }
        });
        if decides {
            self.apply_restart_policy(vm);
            self.save(vm).await;
        }
    }

    /// Decides by its restart policy what becomes of a guest whose process has ended. Does nothing where the guest has
    /// a process.
    pub fn apply_restart_policy(self: &Arc<Self>, vm: &Arc<Vm>) {
        let (kind, text, delay) = {
            let mut now = vm.now();
            let (None, Some(end)) = (&now.process, now.end.clone()) else {
                return;
            };
            let in_order = match end.report.kind {
                EndKind::PowerOff | EndKind::Quit | EndKind::Signal => true,
                EndKind::Reset
                | EndKind::Panic
                | EndKind::Crash
                | EndKind::Failed
                | EndKind::Killed
                | EndKind::Unknown => false,
            };
            let text = end.report.text;
            let again = match vm.spec.restart {
                // A guest that waits to be configured has not run.
                _ if now.stopping || now.state == State::NotStarted => false,
                RestartPolicy::Never => false,
                RestartPolicy::OnFailure => !in_order,
                RestartPolicy::Always => true,
            };
            if !again {
                let stopped = now.stopping || in_order || end.report.kind == EndKind::Reset;
                let (state, kind) = if stopped {
                    (State::Stopped, EventKind::Stopped)
                } else {
                    (State::Failed, EventKind::Failed)
                };
                now.state = state;
                (kind, text, None)
            } else if now.failures >= RESTARTS {
                now.state = State::Failed;
                let text = format!(
                    "{text}; it has ended so soon {RESTARTS} times in a row, and is not started again: find out why, and start it"
                );
                (EventKind::RestartsExhausted, text, None)
            } else {
                let delay = Duration::from_secs(1 << now.failures);
                now.state = State::Restarting;
                now.failures += 1;
                let text = format!("{text}; it is started again in {} s", delay.as_secs());
                (EventKind::Restarting, text, Some(delay))
            }
        };
        vm.change(|_| ());
        self.events.tell(kind, Some(&vm.id), Some(text));
        if let Some(delay) = delay {
            self.restart_later(vm, delay);
        }
    }

    /// Starts a guest again after a pause, unless its state changes meanwhile.
    pub fn restart_later(self: &Arc<Self>, vm: &Arc<Vm>, delay: Duration) {
        let (daemon, vm) = (self.clone(), vm.clone());
        tokio::spawn(async move {
            sleep(delay).await;
            let _operation = vm.operation.lock().await;
            if vm.state() != State::Restarting {
                return;
            }
            vm.change(|now| now.restarts += 1);
            daemon.metrics.restarted();
            if let Err(fault) = daemon.start_again(&vm).await {
                tracing::warn!(vm = %vm.id, fault = %chain(&fault), "a guest could not be started again");
            }
        });
    }
}
