//! How a guest is stopped, and deleted: it is asked to end, then its process is, and then that is killed.

use std::sync::Arc;
use std::time::Duration;

use axum::http::Method;
use rustix::process::Signal;
use serde_json::json;
use tokio::time::timeout;

use super::Daemon;
use super::events::EventKind;
use super::fault::Fault;
use super::jail;
use super::lifecycle::blocking;
use super::process::Process;
use super::proxy;
use super::status::State;
use super::store::{self, Phase};
use super::vm::Vm;

/// How long a process may take to end after `SIGTERM`, with its disks closed.
const TERM: Duration = Duration::from_secs(5);
/// How long a process may take to end after `SIGKILL`.
pub(super) const KILL: Duration = Duration::from_secs(10);

/// How a stop is to go.
#[derive(Clone, Copy, Debug)]
pub struct Manner {
    /// For how long the guest may take to shut down by itself.
    pub patience: Duration,
}

/// Ends the process of a guest, and waits until that is known.
///
/// # Errors
/// `Unkillable`.
pub(super) async fn end_by_signals(vm: &Vm, process: &Process) -> Result<(), Fault> {
    let gone = |patience| timeout(patience, vm.until(|now| now.process.is_none()));
    process.signal(Signal::TERM);
    if gone(TERM).await.is_ok() {
        return Ok(());
    }
    tracing::warn!(vm = %vm.id, "the process does not end by SIGTERM, and is killed");
    process.signal(Signal::KILL);
    gone(KILL)
        .await
        .map_err(|_| Fault::Unkillable(vm.id.clone()))
}

impl Daemon {
    /// Ends a guest: it is asked to, then its process is, then that is killed. One that has ended stays as it is.
    ///
    /// # Errors
    /// Whatever is in the way.
    pub async fn stop(self: Arc<Self>, vm: Arc<Vm>, manner: Manner) -> Result<Arc<Vm>, Fault> {
        let _operation = vm.operation.clone().lock_owned().await;
        if vm.state() == State::Restarting {
            vm.change(|now| now.state = State::Stopped);
            self.events.tell(EventKind::Stopped, Some(&vm.id), None);
        } else {
            self.end_process(&vm, manner).await?;
        }
        self.save(&vm).await;
        Ok(vm)
    }

    async fn end_process(&self, vm: &Vm, manner: Manner) -> Result<(), Fault> {
        let Some((process, state)) = vm.change(|now| {
            now.stopping = true;
            Some((now.process.clone()?, now.state))
        }) else {
            return Ok(());
        };
        self.events.tell(EventKind::Stopping, Some(&vm.id), None);
        if state == State::Running && !manner.patience.is_zero() {
            let body = json!({"action_type": "SendCtrlAltDel"}).to_string();
            let asked = proxy::ask(vm, Method::PUT, "/actions", body.into(), manner.patience).await;
            let heard = asked.is_ok_and(|answer| answer.status.is_success());
            let shut_down = vm.until(|now| now.process.is_none() || now.state == State::Deleting);
            if heard
                && timeout(manner.patience, shut_down).await.is_ok()
                && vm.now().process.is_none()
            {
                return Ok(());
            }
        }
        end_by_signals(vm, &process).await
    }

    /// Ends a guest, and removes all of it.
    ///
    /// # Errors
    /// Whatever is in the way; it can be deleted again then.
    pub async fn delete(self: Arc<Self>, vm: Arc<Vm>, manner: Manner) -> Result<(), Fault> {
        if manner.patience.is_zero() {
            // Whoever waits for its end does not any more.
            vm.change(|now| {
                if now.state != State::Creating {
                    now.state = State::Deleting;
                }
            });
        }
        let _operation = vm.operation.lock().await;
        if !self.knows(&vm) {
            return Ok(());
        }
        if !manner.patience.is_zero() {
            self.end_process(&vm, manner).await?;
        }
        vm.change(|now| (now.state, now.phase) = (State::Deleting, Phase::Deleting));
        self.save(&vm).await;
        self.tear_down(&vm).await?;
        self.events.tell(EventKind::Deleted, Some(&vm.id), None);
        Ok(())
    }

    pub(super) async fn tear_down(&self, vm: &Vm) -> Result<(), Fault> {
        vm.change(|now| (now.state, now.phase) = (State::Deleting, Phase::Deleting));
        let manner = Manner {
            patience: Duration::ZERO,
        };
        if vm.now().process.is_some() {
            self.end_process(vm, manner).await?;
        }
        let _saving = vm.saving.lock().await;
        let (folder, jail) = (vm.folder.clone(), vm.now().jail.clone());
        let removed = blocking(move || {
            jail::release(jail.as_ref())?;
            store::remove_folder(&folder)
        });
        removed.await?.map_err(Fault::Store)?;
        self.vms().remove(&vm.id);
        vm.change(|_| ());
        Ok(())
    }
}
