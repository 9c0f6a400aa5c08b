//! What a daemon finds of an earlier one: guests that still run, guests that have ended meanwhile, and operations that
//! were half done.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use rustix::process::Signal;
use tokio::time::timeout;

use super::daemon::Daemon;
use super::events::EventKind;
use super::jail;
use super::process::{self, Exit, Process};
use super::proxy;
use super::record::{Phase, Record, State};
use super::stopping::KILL;
use super::store;
use super::vm::Vm;
use ::jail::LimitHits;
use config::{VmConfig, VsockConfig, is_guest_id};
use control::launch_spec::CONFIG;
use host::report::chain;

impl Daemon {
    /// Finds the guests of earlier daemons in the state folder.
    ///
    /// # Errors
    /// Where the state folder cannot be read.
    pub async fn recover(self: &Arc<Self>) -> io::Result<()> {
        for id in self.store.ids()? {
            if let Err(error) = self.recover_vm(&id).await {
                tracing::error!(vm = %id, error = %chain(&error), "the record of a guest cannot be read");
                if is_guest_id(&id) {
                    self.keep_unreadable(&id, &error);
                }
            }
        }
        Ok(())
    }

    /// Takes a guest into the registry whose record cannot be read, so that no other guest gets its name, its user or
    /// its identifier, and so that its process can be ended.
    fn keep_unreadable(self: &Arc<Self>, id: &str, why: &io::Error) {
        let folder = self.store.vm(id);
        // Written by the daemon as well, and so readable, unless that is what is damaged.
        let config = store::read::<VmConfig>(&folder.join(CONFIG)).ok().flatten();
        let config = config.filter(|config| config.validate().is_ok());
        let config = config.unwrap_or_default();
        let record = Record {
            jail: self.jails.found(id, &folder),
            cid: config.vsock.as_ref().map(VsockConfig::cid),
            ..Record::unreadable(id)
        };
        let found = process::find(&folder)
            .and_then(|found| match found {
                None => process::search(&folder, id),
                found => Ok(found),
            })
            .or_else(|_| process::search(&folder, id))
            .and_then(|found| found.map(Process::new).transpose());
        let vm = Arc::new(Vm::new(id.to_owned(), folder, record, &config));
        let why = chain(why).to_string();
        vm.change(|now| now.unreadable = Some(why.clone()));
        self.vms().insert(id.to_owned(), vm.clone());
        self.events.tell(EventKind::Unreadable, Some(id), Some(why));
        match found {
            Ok(Some(process)) => self.adopt(&vm, process),
            Ok(None) => {}
            Err(error) => {
                tracing::error!(vm = %id, error = %chain(&error), "the process of a guest cannot be found");
            }
        }
    }

    async fn recover_vm(self: &Arc<Self>, id: &str) -> io::Result<()> {
        let folder = self.store.vm(id);
        let record = store::read::<Record>(&folder.join("vm.json"))?;
        let found = process::find(&folder)?.map(Process::new).transpose()?;
        let record = match record {
            Some(record) if record.phase == Phase::Present => record,
            half => {
                // It is half made or half deleted. Its caller got no response, so it can be removed.
                if let Some(process) = found {
                    process.signal(Signal::KILL);
                    let _ = timeout(KILL, process.ended()).await;
                }
                jail::release(half.and_then(|record| record.jail).as_ref())?;
                tracing::info!(vm = %id, "what was left of a guest is removed");
                return self.store.remove(id);
            }
        };
        self.store.tidy(id);
        let config = match &record.later.config {
            Some(later) => (**later).clone(),
            None => store::read::<VmConfig>(&folder.join("config.json"))?.unwrap_or_default(),
        };
        let (state, starts) = (record.state, record.pending.start);
        let vm = Arc::new(Vm::new(id.to_owned(), folder, record, &config));
        self.vms().insert(id.to_owned(), vm.clone());
        if found.is_none() {
            let _operation = vm.operation.lock().await;
            self.reconcile(&vm).await;
        }
        match (found, state) {
            (found, _) if starts => self.resume_start(&vm, found),
            (Some(process), _) => self.attach(&vm, process),
            (None, State::Stopped | State::Failed) => {}
            (None, State::Restarting) => self.restart_later(&vm, Duration::from_secs(1)),
            (None, _) => {
                vm.change(|now| {
                    if now.state != State::NotStarted {
                        now.state = State::Running;
                    }
                });
                self.ended(&vm, Exit::Unseen, LimitHits::default()).await;
            }
        }
        Ok(())
    }

    fn attach(self: &Arc<Self>, vm: &Arc<Vm>, process: Process) {
        self.adopt(vm, process);
        vm.change(|now| {
            if !matches!(now.state, State::NotStarted | State::Paused) {
                now.state = State::Running;
            }
        });
        self.events.tell(EventKind::Attached, Some(&vm.id), None);
        // Locked here, and not in the task, so that no other operation comes before its pending ones are reconciled.
        let operation = vm.operation.clone().try_lock_owned();
        let (daemon, vm) = (self.clone(), vm.clone());
        tokio::spawn(async move {
            let reconfiguring = vm.reconfiguring.lock().await;
            daemon.reconcile(&vm).await;
            drop(reconfiguring);
            drop(operation);
            if let Some(state) = proxy::state(&vm.api_socket(), proxy::LOOK).await {
                vm.change(|now| {
                    if now.process.is_some() && now.state != State::Deleting {
                        now.state = state;
                    }
                });
                daemon.save(&vm).await;
            } else {
                tracing::warn!(vm = %vm.id, "the process of a guest does not answer");
            }
        });
    }
}
