//! `coppice serve`: the host daemon, one socket for many guests.
//!
//! ```text
//! listen ─ peer ──> routes ──> lifecycle ──> process ═══> coppice run (one a guest, outlives the daemon)
//!                     │            ├─ waiting     from a process that is told to one that runs, in its jail
//!                     │            ├─ told        what it was told over its own API
//!                     │            ├─ admission   has the host room for it?
//!                     │            ├─ store       what the next daemon has to know
//!                     │            └─ events      what has happened, and why
//!                     └── proxy, console ─────────────> the guest's own sockets
//! ```
//!
//! It runs on one thread, and on a few more for what waits for the disk. It starts processes, watches them by pidfd, and passes bytes on; it
//! never touches a guest's memory, and of what a guest says it looks at nothing but the answers of that guest's VMM, with a limit on their length.
//! A status is answered from what it knows. A guest that hangs holds up who asks it, and nobody else.

mod admission;
mod commits;
mod console;
mod ending;
mod events;
mod fault;
mod guest_api;
mod identity;
mod images;
mod jail;
mod lifecycle;
mod listen;
mod metrics;
mod openapi;
mod own_disks;
mod page;
mod peer;
mod pending;
mod process;
mod proxy;
mod recovery;
mod routes;
mod spec;
mod status;
mod stopping;
mod store;
mod templates;
mod told;
mod vm;
mod waiting;

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use sd_notify::NotifyState;
use tokio::net::{TcpListener, UnixListener};
use tokio::runtime::Builder;
use tokio::signal::unix::{SignalKind, signal};

use crate::zygote::Zygote;
use host::procfs;
use host::signals;
use host::socket::{ApiSocket, SocketError};

pub use admission::{HELP as ADMISSION, Limits};
pub use console::PROTOCOL as CONSOLE_PROTOCOL;
pub use jail::{JailPolicy, UIDS as JAIL_UIDS};
pub use peer::Allowed;

use events::{EventKind, Events};
use fault::Fault;
use images::Images;
use jail::Jails;
use lifecycle::blocking;
use listen::Connections;
use metrics::DaemonMetrics;
use spec::RestartPolicy;
use status::{MemorySplit, State};
use stopping::Manner;
use store::Store;
use templates::Templates;
use vm::{Measured, Vm};

/// Threads for what waits for the disk, their stacks, and for how long they wait for more of it.
const THREADS: usize = 4;
const STACK: usize = 256 << 10;
const IDLE: Duration = Duration::from_secs(2);

/// What `coppice serve` was asked for.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where it listens.
    pub socket: PathBuf,
    /// Who may open the socket.
    pub socket_mode: u32,
    /// Who may call.
    pub allowed: Allowed,
    /// Where its state is.
    pub state: PathBuf,
    /// Where it shows its guests to whoever can reach that.
    pub web: Option<SocketAddr>,
    /// How much it takes on.
    pub limits: Limits,
    /// How its guests are jailed, unless they are not to be.
    pub jail: Option<JailPolicy>,
    /// Whether guests end with it.
    pub stop_guests: Option<Duration>,
    /// Whether each guest's process is a program of its own, and no copy of a zygote.
    pub own_layout: bool,
}

/// Why the daemon cannot serve.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The socket.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// Another daemon has the state.
    #[error("--state {}: another daemon uses it", .0.display())]
    InUse(PathBuf),
    /// Something else of the host.
    #[error("{what}: {source}")]
    Host {
        /// What it was about.
        what: String,
        /// What the host said.
        source: io::Error,
    },
}

fn host(what: impl Into<String>) -> impl FnOnce(io::Error) -> ServeError {
    move |source| ServeError::Host {
        what: what.into(),
        source,
    }
}

/// The daemon.
pub struct Daemon {
    store: Store,
    limits: Limits,
    jails: Jails,
    allowed: Allowed,
    events: Events,
    metrics: DaemonMetrics,
    images: Mutex<Images>,
    /// Taken last of these locks.
    templates: Mutex<Templates>,
    /// One is made, or deleted, at a time.
    templating: tokio::sync::Mutex<()>,
    /// Taken after `images`, and before what changes of a guest.
    vms: Mutex<BTreeMap<String, Arc<Vm>>>,
    /// One measures at a time.
    measuring: tokio::sync::Mutex<()>,
    /// What guests' processes are copies of.
    zygote: Option<Zygote>,
}

impl Daemon {
    fn images(&self) -> MutexGuard<'_, Images> {
        self.images.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn templates(&self) -> MutexGuard<'_, Templates> {
        self.templates
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn vms(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Vm>>> {
        self.vms.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn all(&self) -> Vec<Arc<Vm>> {
        self.vms().values().cloned().collect()
    }

    /// Whether a guest is still there. Another one may have its name.
    fn knows(&self, vm: &Arc<Vm>) -> bool {
        let vms = self.vms();
        vms.get(&vm.id).is_some_and(|known| Arc::ptr_eq(known, vm))
    }

    fn vm(&self, id: &str) -> Result<Arc<Vm>, Fault> {
        let vm = self.vms().get(id).cloned();
        vm.ok_or_else(|| Fault::NoVm(id.to_owned()))
    }

    /// Looks at the memory of all processes whose last look is older than `age`. That holds each of them up for a moment, as their memory
    /// maps are walked: so it is done when somebody wants to know, and not more often than they need.
    async fn measure(&self, age: Duration) {
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
        let looked = blocking(move || {
            for (vm, pid) in stale {
                // It may have ended, and then its number may be another's: who is told of its end forgets this.
                let (Ok(usage), Ok(cpu)) = (procfs::memory(pid), procfs::of_process(pid)) else {
                    continue;
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
        });
        if let Err(fault) = looked.await {
            tracing::error!(%fault, "guests cannot be measured");
        }
    }

    /// Cuts the logs of guests that have become too long, again and again.
    async fn trim_logs(self: Arc<Self>) {
        loop {
            tokio::time::sleep(process::TRIM).await;
            let folders: Vec<_> = self.all().iter().map(|vm| vm.folder.clone()).collect();
            let trimmed = blocking(move || {
                folders
                    .iter()
                    .try_for_each(|folder| process::trim_log(folder))
            });
            if let Ok(Err(error)) = trimmed.await {
                tracing::warn!(%error, "the log of a guest cannot be cut");
            }
        }
    }

    async fn stop_all(self: &Arc<Self>, patience: Duration) {
        let mut stops = tokio::task::JoinSet::new();
        for vm in self.all() {
            stops.spawn(self.clone().stop_for_now(vm, Manner { patience }));
        }
        stops.join_all().await;
    }

    /// Stops a guest at the end of the daemon. The next one starts it again if it is always to run.
    async fn stop_for_now(self: Arc<Self>, vm: Arc<Vm>, manner: Manner) {
        let goes_on = vm.spec.restart == RestartPolicy::Always && vm.now().is_to_run();
        if let Err(fault) = self.clone().stop(vm.clone(), manner).await {
            tracing::error!(vm = %vm.id, %fault, "a guest could not be stopped");
        } else if goes_on {
            vm.change(|now| now.state = State::Restarting);
            self.save(&vm).await;
        }
    }
}

/// Memory of the host in KiB.
///
/// # Errors
/// What the host says.
pub fn host_memory_kib() -> io::Result<u64> {
    let text = std::fs::read_to_string("/proc/meminfo")?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    let number = line.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse().ok());
    number.ok_or_else(|| io::Error::other("/proc/meminfo does not tell MemTotal"))
}

/// Marks all descriptors that were inherited to be closed in guests' processes.
fn keep_descriptors() {
    // SAFETY: the call changes a flag of descriptors, which nothing in this process relies on.
    let done = unsafe {
        libc::close_range(
            3,
            libc::c_uint::MAX,
            libc::CLOSE_RANGE_CLOEXEC.cast_signed(),
        )
    };
    if done != 0 {
        let error = io::Error::last_os_error();
        tracing::warn!(%error, "guests inherit descriptors");
    }
}

fn bind(options: &Options) -> Result<(ApiSocket, UnixListener), ServeError> {
    let path = &options.socket;
    let failed = || host(format!("socket {}", path.display()));
    if let Some(folder) = path.parent().filter(|folder| *folder != Path::new("")) {
        std::fs::create_dir_all(folder).map_err(failed())?;
    }
    let socket = ApiSocket::bind(path)?;
    if let Some(gid) = options.allowed.gid {
        std::os::unix::fs::chown(path, None, Some(gid)).map_err(failed())?;
    }
    let mode = std::fs::Permissions::from_mode(options.socket_mode);
    std::fs::set_permissions(path, mode).map_err(failed())?;
    let listener = socket.listener().map_err(failed())?;
    listener.set_nonblocking(true).map_err(failed())?;
    let listener = UnixListener::from_std(listener).map_err(failed())?;
    Ok((socket, listener))
}

/// How long a daemon waits for what an earlier one has. A process that one was starting when it was killed has its descriptors, with the lock and the
/// socket, until it is another program.
const LEFT_BEHIND: Duration = Duration::from_secs(2);
/// Between two looks.
const LOOK: Duration = Duration::from_millis(10);

/// What an attempt comes to, once nobody else has what it is for, or has had it for long.
async fn once_free<T>(mut attempt: impl FnMut() -> Result<T, ServeError>) -> Result<T, ServeError> {
    let begun = Instant::now();
    loop {
        match attempt() {
            Err(ServeError::InUse(_) | ServeError::Socket(SocketError::InUse { .. }))
                if begun.elapsed() < LEFT_BEHIND =>
            {
                tokio::time::sleep(LOOK).await;
            }
            done => return done,
        }
    }
}

async fn serve(options: Options) -> Result<(), ServeError> {
    // From here on a signal is an event, also while guests are found again.
    let mut terminate = signal(SignalKind::terminate()).map_err(host("signals"))?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(host("signals"))?;
    let state = &options.state;
    let failed = || host(format!("--state {}", state.display()));
    let open = || {
        let store = Store::open(state).map_err(failed())?;
        store.ok_or_else(|| ServeError::InUse(state.clone()))
    };
    let store = once_free(open).await?;
    let images = Images::load(&store.images()).map_err(failed())?;
    let jails = Jails::open(options.jail.clone()).map_err(host("--jail"))?;
    let templates = Templates::load(&store.templates()).map_err(failed())?;
    let daemon = Arc::new(Daemon {
        store,
        jails,
        limits: options.limits,
        allowed: options.allowed.clone(),
        events: Events::default(),
        metrics: DaemonMetrics::default(),
        images: Mutex::new(images),
        templates: Mutex::new(templates),
        templating: tokio::sync::Mutex::default(),
        vms: Mutex::default(),
        measuring: tokio::sync::Mutex::default(),
        zygote: (!options.own_layout).then(Zygote::default),
    });
    daemon.recover().await.map_err(failed())?;
    let (_socket, listener) = once_free(|| bind(&options)).await?;
    let (connections, over) = Connections::new();
    let serving = connections
        .clone()
        .unix(daemon.clone(), listener, routes::all(daemon.clone()));
    let serving = tokio::spawn(serving);
    if let Some(address) = options.web {
        let listener = TcpListener::bind(address).await;
        let listener = listener.map_err(host(format!("--web {address}")))?;
        if let Ok(address) = listener.local_addr() {
            tracing::info!(%address, "for reading");
        }
        tokio::spawn(
            connections
                .clone()
                .web(listener, routes::read_only(daemon.clone())),
        );
    }
    tokio::spawn(daemon.clone().trim_logs());
    daemon.events.tell(EventKind::DaemonStarted, None, None);
    // A service manager that waits for this takes the daemon for failed, where it is not told.
    if let Err(error) = sd_notify::notify(&[NotifyState::Ready]) {
        tracing::error!(%error, "the service manager (NOTIFY_SOCKET) cannot be told that the daemon is ready");
    }
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    daemon.events.tell(EventKind::DaemonStopping, None, None);
    // It sees the end all the same.
    let _ = sd_notify::notify(&[NotifyState::Stopping]);
    let _ = over.send(true);
    let _ = serving.await;
    if let Some(patience) = options.stop_guests {
        daemon.stop_all(patience).await;
    }
    connections.finish().await;
    Ok(())
}

/// Serves until a signal ends it.
///
/// # Errors
/// [`ServeError`]: it could not begin.
pub fn run(options: Options) -> Result<(), ServeError> {
    signals::share_one_heap();
    keep_descriptors();
    let runtime = Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(THREADS)
        .thread_stack_size(STACK)
        .thread_keep_alive(IDLE)
        .thread_name("disk")
        .build()
        .map_err(host("runtime"))?;
    runtime.block_on(serve(options))
}
