//! How a guest is stopped, and deleted. The guest is asked to shut down, and has a grace period for that; then its
//! process is asked to end by `SIGTERM`, and then killed by `SIGKILL`.

use std::sync::Arc;
use std::time::Duration;

use axum::http::Method;
use rustix::process::Signal;
use serde_json::json;
use tokio::time::timeout;

use super::daemon::Daemon;
use super::events::EventKind;
use super::fault::Fault;
use super::jail;
use super::process::Process;
use super::proxy;
use super::record::{Interfaces, Phase, State};
use super::store;
use super::task::blocking;
use super::vm::Vm;

/// How long a process may take to end after `SIGTERM`, with its disks closed.
const TERM: Duration = Duration::from_secs(5);
/// How long a process may take to end after `SIGKILL`.
pub const KILL: Duration = Duration::from_secs(10);

/// Ends the process of a guest, and waits until the daemon has learnt of its end.
///
/// # Errors
/// `Unkillable`.
pub async fn end_by_signals(vm: &Vm, process: &Process) -> Result<(), Fault> {
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
    /// Stops a guest, which has `grace` to shut down by itself. One that has ended stays as it is.
    ///
    /// # Errors
    /// `Unkillable`.
    pub async fn stop(self: Arc<Self>, vm: Arc<Vm>, grace: Duration) -> Result<Arc<Vm>, Fault> {
        let _operation = vm.operation.clone().lock_owned().await;
        if vm.state() == State::Restarting {
            vm.change(|now| now.state = State::Stopped);
            self.events.tell(EventKind::Stopped, Some(&vm.id), None);
        } else {
            self.end_process(&vm, grace).await?;
        }
        self.save(&vm).await;
        Ok(vm)
    }

    async fn end_process(&self, vm: &Vm, grace: Duration) -> Result<(), Fault> {
        let Some((process, state)) = vm.change(|now| {
            now.stopping = true;
            Some((now.process.clone()?, now.state))
        }) else {
            return Ok(());
        };
        self.events.tell(EventKind::Stopping, Some(&vm.id), None);
        if state == State::Running && !grace.is_zero() {
            let body = json!({"action_type": "SendCtrlAltDel"}).to_string();
            let asked = proxy::ask(vm, Method::PUT, "/actions", body.into(), grace).await;
            let is_asked = asked.is_ok_and(|response| response.status.is_success());
            let shut_down = vm.until(|now| now.process.is_none() || now.state == State::Deleting);
            if is_asked && timeout(grace, shut_down).await.is_ok() && vm.now().process.is_none() {
                return Ok(());
            }
        }
        end_by_signals(vm, &process).await
    }

    /// Stops a guest, and removes all of it.
    ///
    /// # Errors
    /// `Unkillable`, `Store`; it can be deleted again then.
    pub async fn delete(self: Arc<Self>, vm: Arc<Vm>, grace: Duration) -> Result<(), Fault> {
        if grace.is_zero() {
            // An operation that waits for the guest to shut down stops to wait.
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
        if !grace.is_zero() {
            self.end_process(&vm, grace).await?;
        }
        vm.change(|now| (now.state, now.phase) = (State::Deleting, Phase::Deleting));
        self.save(&vm).await;
        self.tear_down(&vm).await?;
        self.events.tell(EventKind::Deleted, Some(&vm.id), None);
        Ok(())
    }

    /// Ends the process of a guest at once, and removes all of the guest. The caller has locked `operation`.
    ///
    /// # Errors
    /// `Unkillable`, `Store`.
    pub async fn tear_down(&self, vm: &Vm) -> Result<(), Fault> {
        vm.change(|now| (now.state, now.phase) = (State::Deleting, Phase::Deleting));
        if vm.now().process.is_some() {
            self.end_process(vm, Duration::ZERO).await?;
        }
        let _saving = vm.saving.lock().await;
        let (folder, jail) = (vm.folder.clone(), vm.now().jail.clone());
        let interfaces = vm.now().interfaces.clone();
        let removed = blocking(move || {
            jail::release(jail.as_ref())?;
            store::remove_folder(&folder)
        });
        removed.await?.map_err(Fault::Store)?;
        self.vms().remove(&vm.id);
        // Its record is gone, so that no guest of a record has these addresses.
        self.networks.give_back(&interfaces, &Interfaces::new());
        vm.change(|_| ());
        Ok(())
    }
}
