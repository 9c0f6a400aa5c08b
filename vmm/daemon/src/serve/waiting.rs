//! A guest that waits to be configured over its own API, and how it begins to run.
//!
//! ```text
//! a process that is only told ── InstanceStart ──> noted: told, `pending.start` ──> it ends ──> the guest's process, jailed ──> answers: struck off
//!        ^                                                                                        │ cannot start
//!        └────────────────────────────────── started again, with what it was told <───────────────┘
//! ```
//!
//! What such a guest needs of the host is not known before it starts, and a jail is made of what its process needs. So the process that is told runs
//! nothing of a guest, never will (`--only-configure`), and is in no jail; and the guest gets one that knows all from its beginning. The next daemon
//! that finds `pending.start` looks how far that came: the guest runs, or waits again.

use std::sync::Arc;
use std::time::Instant;

use axum::http::Method;
use serde_json::json;

use super::Daemon;
use super::events::EventKind;
use super::fault::Fault;
use super::lifecycle::blocking;
use super::process::{Process, Purpose};
use super::proxy;
use super::status::State;
use super::stopping::end_by_signals;
use super::store;
use super::vm::Vm;
use config::VmConfig;

/// Writes what the next process of a guest is given.
pub(super) async fn write_config(vm: &Vm, config: VmConfig) -> Result<(), Fault> {
    let path = vm.folder.join("config.json");
    let written = blocking(move || store::write(&path, &config, false)).await?;
    written.map_err(Fault::Store)
}

impl Daemon {
    /// Starts a guest that waits, with what it was told. Its operation is held.
    ///
    /// # Errors
    /// Whatever is in the way; it waits then, as before.
    pub(super) async fn start_waiting(self: &Arc<Self>, vm: &Arc<Vm>) -> Result<(), Fault> {
        let _telling = vm.telling.lock().await;
        self.note_told(vm).await?;
        let config = self.readmit(vm)?;
        let ready = self.ready_to_start(vm, &config).await;
        if let Err(fault) = ready {
            vm.change(|now| {
                now.state = State::NotStarted;
                now.pending.start = false;
            });
            // Its process may have ended meanwhile, of which nobody else goes on.
            self.settle(vm);
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

    /// Does all that can fail while the process that was told is still there.
    async fn ready_to_start(
        self: &Arc<Self>,
        vm: &Arc<Vm>,
        config: &VmConfig,
    ) -> Result<(), Fault> {
        if config.boot_source.is_none() {
            // Which it refuses in its own words.
            let body = json!({"action_type": "InstanceStart"});
            proxy::act(vm, Method::PUT, "/actions", &body).await?;
            return Err(Fault::Internal(
                "a guest without a kernel started".to_owned(),
            ));
        }
        self.begin(vm, |pending| pending.start = true).await?;
        write_config(vm, config.clone()).await
    }

    /// Ends the process that was told, whose end is no news of its guest.
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
        self.settle(vm);
        self.save(vm).await;
    }

    /// Has a guest that could not start wait as before. Where that cannot be either, it has failed, and can be started all the same.
    async fn wait_again(self: &Arc<Self>, vm: &Arc<Vm>) {
        let waits = async {
            self.end_waiting(vm).await?;
            write_config(vm, self.config_of(vm)?).await?;
            self.bring_up(vm, Purpose::Configure).await
        };
        match waits.await {
            Ok(state) => {
                vm.change(|now| {
                    now.state = state;
                    now.pending.start = false;
                });
                self.settle(vm);
                self.save(vm).await;
            }
            Err(fault) => {
                tracing::warn!(vm = %vm.id, %fault, "a guest that could not start cannot wait either");
                vm.change(|now| now.pending.start = false);
                self.has_failed(vm, &fault).await;
            }
        }
    }

    /// Goes on where a daemon was killed that started a guest that waited: `found` is the one process or the other.
    pub(super) fn resume_start(self: &Arc<Self>, vm: &Arc<Vm>, found: Option<Process>) {
        vm.change(|now| now.state = State::Starting);
        if let Some(process) = found {
            self.hold(vm, process);
            self.events.tell(EventKind::Attached, Some(&vm.id), None);
        }
        let operation = vm.operation.clone().try_lock_owned();
        let (daemon, vm) = (self.clone(), vm.clone());
        tokio::spawn(async move {
            let _telling = vm.telling.lock().await;
            let process = vm.now().process.clone();
            let state = match process {
                Some(process) => daemon.first_state(&vm, &process, Instant::now()).await.ok(),
                None => None,
            };
            match state {
                // It may have been told to end already.
                Some(State::NotStarted) | None => daemon.wait_again(&vm).await,
                Some(state) => daemon.has_started(&vm, state).await,
            }
            drop(operation);
        });
    }
}
