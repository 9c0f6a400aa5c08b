//! A guest that waits to be configured over its own API, and how it starts.
//!
//! ```text
//! configuring process ── InstanceStart ──> `later` and `pending.start` recorded ──> it ends
//!        ^                                                                            │
//!        │                                                                  guest's process, jailed
//!        │                                                                   │ cannot     │ answers
//!        └──────── started again, with the later configuration <─────────────┘ start      └─> off the record
//! ```
//!
//! A jail allows what the guest's process needs of the host, which is not known before such a guest is configured. So
//! its process at first is one that only takes configuration (`Purpose::Configure`): it never runs a guest, and is in
//! no jail. When the guest starts, it gets another process, which has the whole configuration from its beginning. The
//! next daemon that finds `pending.start` looks how far that came: the guest runs, or waits again.

use std::sync::Arc;
use std::time::Instant;

use axum::http::Method;
use serde_json::json;

use super::daemon::Daemon;
use super::events::EventKind;
use super::fault::Fault;
use super::process::Process;
use super::proxy;
use super::record::State;
use super::stopping::end_by_signals;
use super::supervision::write_config;
use super::vm::Vm;
use config::VmConfig;
use control::launch_spec::Purpose;
use host::report::chain;

impl Daemon {
    /// Starts a guest that waits, as it was configured. The caller has locked `operation`.
    ///
    /// # Errors
    /// Where it cannot be started; it waits then, as before.
    pub async fn start_waiting(self: &Arc<Self>, vm: &Arc<Vm>) -> Result<(), Fault> {
        let _reconfiguring = vm.reconfiguring.lock().await;
        let config = self.readmit(vm)?;
        let ready = self.ready_to_start(vm, config).await;
        if let Err(fault) = ready {
            vm.change(|now| {
                now.state = State::NotStarted;
                now.pending.start = false;
            });
            // Where its process has ended meanwhile, its supervision has left the decision to this operation.
            self.apply_restart_policy(vm);
            self.save(vm).await;
            return Err(fault);
        }
        let started = async {
            self.end_waiting(vm).await?;
            self.bring_up(vm, Purpose::Boot).await
        };
        match started.await {
            Ok(state) => {
                self.has_started(vm, state).await;
                Ok(())
            }
            Err(fault) => {
                self.wait_again(vm).await;
                Err(fault)
            }
        }
    }

    /// Does all that can fail before the configuring process is ended, so that the guest keeps it where that fails.
    async fn ready_to_start(self: &Arc<Self>, vm: &Arc<Vm>, config: VmConfig) -> Result<(), Fault> {
        if config.boot_source.is_none() {
            // The process refuses to start without a kernel, and its reason goes to the caller.
            let body = json!({"action_type": "InstanceStart"});
            proxy::act(vm, Method::PUT, "/actions", &body).await?;
            return Err(Fault::Internal("a guest without a kernel started".into()));
        }
        let (config, _) = self.with_formats(vm, config).await?;
        self.begin(vm, |pending| pending.start = true).await?;
        write_config(vm, config).await
    }

    /// Ends the process of a guest that is `Starting`: what becomes of the guest is decided here, and not by the end of
    /// that process.
    async fn end_waiting(&self, vm: &Vm) -> Result<(), Fault> {
        let Some(process) = vm.now().process.clone() else {
            return Ok(());
        };
        end_by_signals(vm, &process).await
    }

    async fn has_started(self: &Arc<Self>, vm: &Arc<Vm>, state: State) {
        vm.change(|now| {
            now.state = state;
            now.pending.start = false;
        });
        self.tell_started(vm, state);
        self.apply_restart_policy(vm);
        self.save(vm).await;
    }

    /// Has a guest that could not start wait as before. Where that fails, too, the guest has failed, and can be started
    /// from there.
    async fn wait_again(self: &Arc<Self>, vm: &Arc<Vm>) {
        let waits = async {
            self.end_waiting(vm).await?;
            write_config(vm, self.config_to_start(vm)?).await?;
            self.bring_up(vm, Purpose::Configure).await
        };
        match waits.await {
            Ok(state) => {
                vm.change(|now| {
                    now.state = state;
                    now.pending.start = false;
                });
                self.apply_restart_policy(vm);
                self.save(vm).await;
            }
            Err(fault) => {
                tracing::warn!(vm = %vm.id, fault = %chain(&fault), "a guest that could not start cannot wait either");
                vm.change(|now| now.pending.start = false);
                self.has_failed(vm, &fault).await;
            }
        }
    }

    /// Completes the start of a guest that an earlier daemon had begun when it was killed. `found` is the process that
    /// the guest has: the configuring one, or its own.
    pub fn resume_start(self: &Arc<Self>, vm: &Arc<Vm>, found: Option<Process>) {
        vm.change(|now| now.state = State::Starting);
        if let Some(process) = found {
            self.adopt(vm, process);
            self.events.tell(EventKind::Attached, Some(&vm.id), None);
        }
        let operation = vm.operation.clone().try_lock_owned();
        let (daemon, vm) = (self.clone(), vm.clone());
        tokio::spawn(async move {
            let _reconfiguring = vm.reconfiguring.lock().await;
            let process = vm.now().process.clone();
            let state = match process {
                Some(process) => daemon.first_state(&vm, &process, Instant::now()).await.ok(),
                None => None,
            };
            match state {
                // A configuring process may have been signalled to end already, so a new one is started.
                Some(State::NotStarted) | None => daemon.wait_again(&vm).await,
                Some(state) => daemon.has_started(&vm, state).await,
            }
            drop(operation);
        });
    }
}
