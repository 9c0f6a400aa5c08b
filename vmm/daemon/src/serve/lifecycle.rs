//! The life of a guest as its callers direct it: made, started, paused and resumed. How it is stopped and deleted is in
//! `stopping`, how its process is watched and started again in `supervision`, and how the next daemon finds it in
//! `recovery`.
//!
//! ```text
//! create ─> Creating ─> NotStarted ── start ──> Running <── pause / resume ──> Paused         (start: see `waiting`)
//!                          stop, power off ┘        │ failure
//! delete <── any        Stopped <───────────────────┴──────> Failed, or Restarting ─> Starting ─> Running
//! ```
//!
//! Each operation runs to its end, whatever becomes of the caller's connection: see
//! [`detached`](super::task::detached).

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use axum::http::Method;
use serde_json::json;
use tokio::sync::OwnedMutexGuard;

use super::daemon::{Daemon, Vms};
use super::events::EventKind;
use super::fault::Fault;
use super::identity;
use super::proxy;
use super::record::{Interfaces, LaterConfig, Pending, Phase, Record, State, VmSpec};
use super::spec::Resolved;
use super::status::now_ms;
use super::task::blocking;
use super::templates::Template;
use super::vm::Vm;
use config::VmConfig;
use control::launch_spec::Purpose;
use host::report::chain;

/// How old the measured memory of guests may be for admission.
const FRESH: Duration = Duration::from_secs(10);

/// What can be done with a guest whose record cannot be read.
pub const UNREADABLE: &str = "its record cannot be read, and it can only be stopped and deleted";

/// A name for a guest that was given none.
fn made_up() -> String {
    let mut bytes = [0u8; 8];
    // The kernel's generator does not fail where it is asked for up to 256 bytes (getrandom(2)).
    let _ = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty());
    format!("vm-{:016x}", u64::from_ne_bytes(bytes))
}

/// What became of an attempt to take a name in the registry.
enum Claim {
    New(Arc<Vm>, OwnedMutexGuard<()>, Box<VmConfig>),
    Taken(Arc<Vm>),
}

impl Daemon {
    /// Makes a guest, or finds the one that was made in the same way. Says whether it is new.
    ///
    /// # Errors
    /// Where it cannot be made; nothing of the guest is left then.
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
                    if matches!(vm.state(), State::Creating | State::Deleting) {
                        drop(vm.operation.lock().await);
                        continue;
                    }
                    return if vm.spec == spec && vm.state() != State::Unreadable {
                        Ok((vm, false))
                    } else {
                        Err(Fault::Exists(id))
                    };
                }
            }
        }
    }

    /// Takes the name, if the guest can be made and the host has room for it. The registry is locked, so that no other
    /// guest takes that room meanwhile.
    fn claim(&self, id: &str, spec: &VmSpec, uid: u32) -> Result<Claim, Fault> {
        let images = self.images();
        let mut vms = self.vms();
        if let Some(vm) = vms.get(id) {
            return Ok(Claim::Taken(vm.clone()));
        }
        let folder = self.store.vm(id);
        let later = LaterConfig::default();
        let resolved = spec.resolved(&later, &images, &self.templates(), &folder)?;
        let Resolved { mut config, images } = resolved;
        let cid = Self::cid_for(spec, &config, vms.values())?;
        identity::identify(&mut config, cid);
        self.share_domains.assign(&mut config, uid, &spec.labels);
        let jail = self.jail_for(id, &vms)?;
        let interfaces = self.plan_new(id, spec, &mut config, &vms)?;
        let record = Record {
            spec: spec.clone(),
            uid,
            created_ms: now_ms(),
            phase: Phase::Creating,
            state: State::Creating,
            jail,
            images,
            loaded: spec.template.is_some(),
            cid,
            interfaces,
            disks: BTreeMap::new(),
            former_disks: BTreeSet::new(),
            formats: BTreeMap::new(),
            later,
            pending: Pending::default(),
            restarts: 0,
            failures: 0,
            end: None,
        };
        let vm = Vm::new(id.to_owned(), folder, record, &config);
        let others: Vec<_> = vms.values().map(|vm| vm.load()).collect();
        if let Err(refusal) = self.limits.admit(&others, &vm.load()) {
            self.networks
                .give_back(&vm.now().interfaces, &Interfaces::new());
            self.events.tell(
                EventKind::Refused,
                Some(id),
                Some(chain(&refusal).to_string()),
            );
            return Err(refusal.into());
        }
        let vm = Arc::new(vm);
        let operation = vm.operation.clone().try_lock_owned();
        let operation = operation.map_err(|error| Fault::Internal(error.into()))?;
        vms.insert(id.to_owned(), vm.clone());
        Ok(Claim::New(vm, operation, Box::new(config)))
    }

    /// Plans the interfaces of a new guest, and completes its configuration by them.
    fn plan_new(
        &self,
        id: &str,
        spec: &VmSpec,
        config: &mut VmConfig,
        vms: &Vms,
    ) -> Result<Interfaces, Fault> {
        let inherited = match &spec.template {
            Some(template) => self.templates().get(template)?.interfaces,
            None => Interfaces::new(),
        };
        let none = Interfaces::new();
        let others = Self::others_in_networks(id, vms);
        let planned = self
            .networks
            .plan(id, config, (&none, &inherited), &others)?;
        if let Err(fault) = self.networks.complete(id, config, &planned) {
            self.networks.give_back(&planned, &none);
            return Err(fault.into());
        }
        Ok(planned)
    }

    async fn build(self: &Arc<Self>, vm: &Arc<Vm>, config: VmConfig) -> Result<(), Fault> {
        let built = async {
            let (config, _) = self.with_formats(vm, config).await?;
            let (daemon, record, id) = (self.clone(), vm.record(), vm.id.clone());
            let made = blocking(move || daemon.store.create(&id, &record, &config));
            made.await?.map_err(Fault::Store)?;
            let purpose = match &vm.spec.template {
                Some(id) => {
                    let templates = self.templates();
                    let template = templates.get(id)?;
                    let below = templates.below(&template).into_iter();
                    let memory = |other: &Template| self.store.template(&other.id).join("memory");
                    let own = self.store.template(id);
                    Purpose::Restore(Box::new(template.snapshot(
                        (&own, below.map(memory).collect()),
                        &vm.folder,
                        vm.spec.start,
                        vm.now().cid,
                    )))
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
                self.apply_restart_policy(vm);
                Ok(())
            }
            Err(fault) => {
                self.events.tell(
                    EventKind::Failed,
                    Some(&vm.id),
                    Some(chain(&fault).to_string()),
                );
                if let Err(error) = self.tear_down(vm).await {
                    tracing::error!(vm = %vm.id, fault = %chain(&error), "a guest that could not be made is not removed");
                }
                Err(fault)
            }
        }
    }

    fn wrong(vm: &Vm, advice: &'static str) -> Fault {
        Fault::WrongState {
            id: vm.id.clone(),
            state: vm.state(),
            advice,
        }
    }

    /// Starts a guest that waits to be started, or has ended. One that runs stays as it is.
    ///
    /// # Errors
    /// `WrongState`, and where it cannot be started.
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
            State::Unreadable => return Err(Self::wrong(&vm, UNREADABLE)),
        }
        Ok(vm)
    }

    /// `InstanceStart`: starts a guest that waits to be started. Gives whether it did wait.
    ///
    /// # Errors
    /// Where it cannot be started.
    pub async fn start_if_waiting(self: &Arc<Self>, vm: &Arc<Vm>) -> Result<bool, Fault> {
        self.measure(FRESH).await;
        let _operation = vm.operation.clone().lock_owned().await;
        let waits = vm.state() == State::NotStarted;
        if waits {
            self.start_waiting(vm).await?;
        }
        Ok(waits)
    }

    /// Records the state that a guest was seen in, and tells the event that this is.
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

    /// Stops the vCPUs of a guest, or lets them run on.
    ///
    /// # Errors
    /// Those of [`proxy::act`].
    pub async fn pause(self: Arc<Self>, vm: Arc<Vm>, state: State) -> Result<Arc<Vm>, Fault> {
        let _operation = vm.operation.clone().lock_owned().await;
        if vm.state() == State::Unreadable {
            return Err(Self::wrong(&vm, UNREADABLE));
        }
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
