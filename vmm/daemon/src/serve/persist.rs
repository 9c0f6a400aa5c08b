//! The record of a guest is kept up to date on disk here.

use std::sync::Arc;

use super::daemon::Daemon;
use super::fault::Fault;
use super::record::{Pending, State};
use super::task::blocking;
use super::vm::Vm;
use host::report::chain;

impl Daemon {
    /// Writes the record of a guest. Where that fails, the guest runs on all the same, and the next daemon finds an
    /// older record.
    pub async fn save(self: &Arc<Self>, vm: &Arc<Vm>) {
        if let Err(fault) = self.try_save(vm).await {
            tracing::error!(vm = %vm.id, fault = %chain(&fault), "the record of a guest cannot be written");
        }
    }

    /// As [`Daemon::save`].
    ///
    /// # Errors
    /// `Store`.
    pub async fn try_save(self: &Arc<Self>, vm: &Arc<Vm>) -> Result<(), Fault> {
        let _saving = vm.saving.lock().await;
        // A record that cannot be read is left as it is, for people to look at, until the guest is deleted.
        if !self.knows(vm) || vm.state() == State::Unreadable {
            return Ok(());
        }
        let (daemon, id, record) = (self.clone(), vm.id.clone(), vm.record());
        let saved = blocking(move || daemon.store.save(&id, &record)).await?;
        saved.map_err(Fault::Store)
    }

    /// Records that an operation is about to begin. Where that cannot be written, the operation must not begin.
    ///
    /// # Errors
    /// `Store`.
    pub async fn begin(
        self: &Arc<Self>,
        vm: &Arc<Vm>,
        change: impl FnOnce(&mut Pending),
    ) -> Result<(), Fault> {
        let before = vm.change(|now| {
            let before = now.pending.clone();
            change(&mut now.pending);
            before
        });
        self.try_save(vm)
            .await
            .inspect_err(|_| vm.change(|now| now.pending = before))
    }
}
