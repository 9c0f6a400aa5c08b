//! The daemon: what it owns, and the registry of its guests. What it does is in the modules above this one, one feature
//! each.
//!
//! It runs on one thread, so its locks are held for a few lines at a time, and never across a wait. Those of longer
//! operations are asynchronous.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Mutex, MutexGuard};
use tokio::sync::Mutex as AsyncMutex;

use super::admission::Limits;
use super::events::Events;
use super::fault::Fault;
use super::guarded_files::GuardedFiles;
use super::images::Images;
use super::jail::Jails;
use super::metrics::DaemonMetrics;
use super::networks::{GuestNetworks, Others};
use super::peer::Allowed;
use super::record::JailResources;
use super::record_key::RecordKey;
use super::sharing_domain::ShareDomains;
use super::status::MemorySplit;
use super::store::Store;
use super::task::blocking;
use super::templates::Templates;
use super::vm::{Measured, Vm};
use crate::zygote::Zygote;
use host::procfs;
use host::report::chain;

/// The guests, by name.
pub type Vms = BTreeMap<String, Arc<Vm>>;

/// The daemon.
pub struct Daemon {
    /// The state folder.
    pub store: Store,
    /// Its key, by which it knows its records again.
    pub key: RecordKey,
    /// How many guests it takes on.
    pub limits: Limits,
    /// The jails of its guests.
    pub jails: Jails,
    /// The networks of its guests.
    pub networks: Arc<GuestNetworks>,
    /// With whom its guests share, where they do not say.
    pub share_domains: ShareDomains,
    /// What its guests share.
    pub guarded_files: GuardedFiles,
    /// Who may call.
    pub allowed: Allowed,
    /// What has happened.
    pub events: Events,
    /// Its counters.
    pub metrics: DaemonMetrics,
    /// Locked while a template is made or deleted.
    pub templating: AsyncMutex<()>,
    /// Guests' processes are copies of this; each is executed by itself where there is none.
    pub zygote: Option<Zygote>,
    /// Locked while the memory of guests is measured.
    measuring: AsyncMutex<()>,
    images: Mutex<Images>,
    /// Locked after `images`, and before what changes of a guest.
    vms: Mutex<Vms>,
    /// Locked last of these.
    templates: Mutex<Templates>,
}

/// What a daemon begins with.
pub struct Parts {
    /// The state folder.
    pub store: Store,
    /// Its key, by which it knows its records again.
    pub key: RecordKey,
    /// How many guests it takes on.
    pub limits: Limits,
    /// The jails of its guests.
    pub jails: Jails,
    /// The networks of its guests.
    pub networks: GuestNetworks,
    /// With whom its guests share, where they do not say.
    pub share_domains: ShareDomains,
    /// Who may call.
    pub allowed: Allowed,
    /// Images of the state folder.
    pub images: Images,
    /// Templates of the state folder.
    pub templates: Templates,
    /// Guests' processes are copies of this.
    pub zygote: Option<Zygote>,
}

impl Daemon {
    /// A daemon without guests.
    pub fn new(parts: Parts) -> Self {
        Self {
            store: parts.store,
            key: parts.key,
            limits: parts.limits,
            jails: parts.jails,
            networks: Arc::new(parts.networks),
            share_domains: parts.share_domains,
            guarded_files: GuardedFiles::default(),
            allowed: parts.allowed,
            events: Events::default(),
            metrics: DaemonMetrics::default(),
            templating: AsyncMutex::default(),
            zygote: parts.zygote,
            measuring: AsyncMutex::default(),
            images: Mutex::new(parts.images),
            vms: Mutex::default(),
            templates: Mutex::new(parts.templates),
        }
    }

    /// Its images, locked.
    pub fn images(&self) -> MutexGuard<'_, Images> {
        self.images.lock()
    }

    /// Its templates, locked.
    pub fn templates(&self) -> MutexGuard<'_, Templates> {
        self.templates.lock()
    }

    /// Its guests, locked.
    pub fn vms(&self) -> MutexGuard<'_, Vms> {
        self.vms.lock()
    }

    /// All its guests.
    pub fn all(&self) -> Vec<Arc<Vm>> {
        self.vms().values().cloned().collect()
    }

    /// Whether a guest is still in the registry. Another guest may have its name by now.
    pub fn knows(&self, vm: &Arc<Vm>) -> bool {
        let vms = self.vms();
        vms.get(&vm.id).is_some_and(|known| Arc::ptr_eq(known, vm))
    }

    /// A guest by its name.
    ///
    /// # Errors
    /// `NoVm`.
    pub fn vm(&self, id: &str) -> Result<Arc<Vm>, Fault> {
        let vm = self.vms().get(id).cloned();
        vm.ok_or_else(|| Fault::NoVm(id.to_owned()))
    }

    /// What other guests than `id` have in networks. The registry is locked meanwhile.
    pub fn others_in_networks(id: &str, vms: &Vms) -> Others {
        let others = vms.values().filter(|vm| vm.id != id);
        let of = |vm: &Arc<Vm>| (vm.id.clone(), vm.now().interfaces.clone());
        let in_networks = others.map(of).filter(|(_, own)| !own.is_empty());
        in_networks.collect()
    }

    /// What the jail of a new guest takes of the host, beside those of `others`. The registry is locked meanwhile, so
    /// that no two guests get the same user.
    ///
    /// # Errors
    /// `NoUser`.
    pub fn jail_for(&self, id: &str, others: &Vms) -> Result<Option<JailResources>, Fault> {
        let taken: BTreeSet<_> = others
            .values()
            .filter_map(|vm| vm.now().jail.as_ref()?.uid)
            .collect();
        self.jails.assign(id, &taken)
    }

    /// Measures the memory of all processes that were last measured longer than `age` ago. The kernel stops each of
    /// them for a moment to walk its memory maps, so this is done only when a caller needs the figures, and not more
    /// often.
    pub async fn measure(&self, age: Duration) {
        let _measuring = self.measuring.lock().await;
        let mut stale = Vec::new();
        for vm in self.all() {
            let now = vm.now();
            let fresh = now
                .measured
                .is_some_and(|measured| measured.at.elapsed() < age);
            if let (Some(process), false) = (&now.process, fresh) {
                let pid = process.pid;
                drop(now);
                stale.push((vm, pid));
            }
        }
        if stale.is_empty() {
            return;
        }
        let measured = blocking(move || {
            for (vm, pid) in stale {
                measure_process(&vm, pid);
            }
        });
        if let Err(fault) = measured.await {
            tracing::error!(fault = %chain(&fault), "guests cannot be measured");
        }
    }
}

/// Measures the process `pid` of a guest. It may have ended meanwhile, and another process may have that number: then
/// the figures are another's for a moment, until the task that watches the process learns of its end and clears them.
fn measure_process(vm: &Vm, pid: u32) {
    let (Ok(usage), Ok(cpu)) = (procfs::memory(pid), procfs::of_process(pid)) else {
        return;
    };
    let mut now = vm.now();
    if now
        .process
        .as_ref()
        .is_some_and(|process| process.pid == pid)
    {
        now.measured = Some(Measured {
            at: Instant::now(),
            memory: MemorySplit {
                private_kib: usage.private,
                shared_kib: usage.shared,
                proportional_kib: usage.proportional,
            },
            cpu_s: cpu.as_secs_f64(),
        });
    }
}
