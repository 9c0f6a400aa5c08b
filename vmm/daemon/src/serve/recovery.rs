//! What a daemon finds that comes after another: guests that go on, guests that have ended meanwhile, and what was half done.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use tokio::time::timeout;

use super::Daemon;
use super::events::EventKind;
use super::jail::{self, Jailed};
use super::process::{self, Exit, Process};
use super::proxy;
use super::status::State;
use super::stopping::KILL;
use super::store::{self, Phase, Record};
use super::vm::Vm;
use ::jail::LimitHits;
use config::VmConfig;

impl Daemon {
    /// Finds the guests of the daemon before.
    ///
    /// # Errors
    /// Where the state folder cannot be read. A guest whose folder is damaged is left alone.
    pub async fn recover(self: &Arc<Self>) -> io::Result<()> {
        for id in self.store.ids()? {
            if let Err(error) = self.recover_vm(&id).await {
                self.jails.reserve(&self.store.vm(&id));
                tracing::error!(vm = %id, %error, "what is left of a guest cannot be understood, and stays as it is");
            }
        }
        Ok(())
    }

    async fn recover_vm(self: &Arc<Self>, id: &str) -> io::Result<()> {
        let folder = self.store.vm(id);
        let record = store::read::<Record>(&folder.join("vm.json"))?;
        let found = process::find(&folder)?.map(Process::new).transpose()?;
        let record = match record {
            Some(record) if record.phase == Phase::Present => record,
            half => {
                // Half made or half deleted. Whoever asked for it has been told nothing.
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
        let config = match &record.told.config {
            Some(told) => (**told).clone(),
            None => store::read::<VmConfig>(&folder.join("config.json"))?.unwrap_or_default(),
        };
        let (state, starts) = (record.state, record.pending.start);
        let vm = Arc::new(Vm::new(id.to_owned(), folder, record, &config));
        self.vms().insert(id.to_owned(), vm.clone());
        if found.is_none() {
            let _operation = vm.operation.lock().await;
            self.mend(&vm).await;
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

    /// Takes a process that is there as that of a guest.
    pub(super) fn hold(self: &Arc<Self>, vm: &Arc<Vm>, process: Process) {
        let process = Arc::new(process);
        vm.change(|now| {
            now.since = Instant::now().checked_sub(process::age(process.pid));
            now.process = Some(process.clone());
            now.end = None;
        });
        let group = vm.now().jail.as_ref().and_then(Jailed::cgroup);
        let before = group.map(|group| group.hits()).unwrap_or_default();
        self.watch(vm, &process, before);
    }

    fn attach(self: &Arc<Self>, vm: &Arc<Vm>, process: Process) {
        self.hold(vm, process);
        vm.change(|now| {
            if !matches!(now.state, State::NotStarted | State::Paused) {
                now.state = State::Running;
            }
        });
        self.events.tell(EventKind::Attached, Some(&vm.id), None);
        // Nobody does anything with it before what was begun is ended.
        let operation = vm.operation.clone().try_lock_owned();
        let (daemon, vm) = (self.clone(), vm.clone());
        tokio::spawn(async move {
            let telling = vm.telling.lock().await;
            daemon.mend(&vm).await;
            // What it was told last may have been answered to nobody. A clone that goes on has its template's.
            if !vm.now().loaded {
                daemon.keep_told(&vm).await;
            }
            drop(telling);
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
