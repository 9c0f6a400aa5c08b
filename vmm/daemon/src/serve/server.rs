//! The start of `coppice serve`, its end, and what it does by the clock in between.

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use sd_notify::NotifyState;
use tokio::net::{TcpListener, UnixListener};
use tokio::runtime::Builder;
use tokio::signal::unix::{SignalKind, signal};

use super::admission::Limits;
use super::daemon::{Daemon, Parts};
use super::events::EventKind;
use super::images::Images;
use super::jail::{JailPolicy, Jails};
use super::listen::Connections;
use super::networks::{GuestNetworks, NetworkPolicy, NetworksError};
use super::peer::Allowed;
use super::record::{RestartPolicy, State};
use super::record_key::FoundKey;
use super::routes;
use super::sharing_domain::ShareDomains;
use super::store::Store;
use super::templates::Templates;
use super::vm::Vm;
use super::web::WebOptions;
use crate::zygote::Zygote;
use host::report::chain;
use host::signals;
use host::socket::{ApiSocket, SocketError};

/// Most threads for work that waits for the disk, the size of their stacks, and how long one waits for more such work
/// before it ends.
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
    /// How it shows its guests to everybody who can reach an address.
    pub web: Option<WebOptions>,
    /// How many guests it takes on.
    pub limits: Limits,
    /// How its guests are jailed; not at all where absent.
    pub jail: Option<JailPolicy>,
    /// The networks of its guests.
    pub networks: NetworkPolicy,
    /// With whom its guests share, where they do not say.
    pub share_domains: ShareDomains,
    /// Where guests are to be stopped when it ends: for how long each may take to shut down.
    pub stop_guests: Option<Duration>,
    /// Whether each guest's process is executed, so that its memory has a layout of its own, and is no copy of a
    /// zygote.
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
    /// The networks.
    #[error("--network")]
    Networks(#[from] NetworksError),
    /// Something else of the host.
    #[error("{what}")]
    Host {
        /// The option or part of the daemon that it is about.
        what: String,
        /// The host's error.
        source: io::Error,
    },
}

fn host(what: impl Into<String>) -> impl FnOnce(io::Error) -> ServeError {
    move |source| ServeError::Host {
        what: what.into(),
        source,
    }
}

impl Daemon {
    async fn stop_all(self: &Arc<Self>, grace: Duration) {
        let mut stops = tokio::task::JoinSet::new();
        for vm in self.all() {
            stops.spawn(self.clone().stop_for_now(vm, grace));
        }
        stops.join_all().await;
    }

    /// Stops a guest at the end of the daemon. The next daemon starts it again if it is always to run.
    async fn stop_for_now(self: Arc<Self>, vm: Arc<Vm>, grace: Duration) {
        let starts_again = vm.spec.restart == RestartPolicy::Always && vm.now().is_to_run();
        if let Err(fault) = self.clone().stop(vm.clone(), grace).await {
            tracing::error!(vm = %vm.id, fault = %chain(&fault), "a guest could not be stopped");
        } else if starts_again {
            vm.change(|now| now.state = State::Restarting);
            self.save(&vm).await;
        }
    }
}

/// Marks all inherited descriptors to be closed in guests' processes.
fn close_descriptors_in_guests() {
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
        tracing::warn!(error = %chain(&error), "guests inherit descriptors");
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

/// How long a daemon waits for the lock and the socket of an earlier one. Where that one was killed while it started a
/// process, the process has the descriptors of both until it executes another program.
const LEFT_BEHIND: Duration = Duration::from_secs(2);
/// Between two attempts.
const RETRY: Duration = Duration::from_millis(10);

/// Makes an attempt again until it does not fail because another process uses what it is for, but not for longer than
/// [`LEFT_BEHIND`].
async fn once_free<T>(mut attempt: impl FnMut() -> Result<T, ServeError>) -> Result<T, ServeError> {
    let begun = Instant::now();
    loop {
        match attempt() {
            Err(
                ServeError::InUse(_)
                | ServeError::Socket(SocketError::InUse { .. })
                | ServeError::Networks(NetworksError::InUse),
            ) if begun.elapsed() < LEFT_BEHIND => {
                tokio::time::sleep(RETRY).await;
            }
            done => return done,
        }
    }
}

async fn serve(options: Options) -> Result<(), ServeError> {
    // From here on a signal is awaited below, and does not kill the daemon while it recovers its guests.
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
    let found = FoundKey::read(&store.key()).map_err(failed())?;
    let templates = Templates::load(&store.templates(), &found).map_err(failed())?;
    let key = match found {
        FoundKey::Kept(key) => key,
        // Only when all records have its codes: the next daemon takes over none.
        FoundKey::New(key, path) => {
            key.save(&path).map_err(failed())?;
            key
        }
    };
    let networks = || Ok(GuestNetworks::open(&options.networks, &store)?);
    let networks = once_free(networks).await?;
    let daemon = Arc::new(Daemon::new(Parts {
        store,
        key,
        jails,
        networks,
        limits: options.limits,
        share_domains: options.share_domains,
        allowed: options.allowed.clone(),
        images,
        templates,
        zygote: (!options.own_layout).then(Zygote::default),
    }));
    daemon.recover().await.map_err(failed())?;
    daemon.networks.keep();
    let (_socket, listener) = once_free(|| bind(&options)).await?;
    let (connections, over) = Connections::new();
    let serving = connections
        .clone()
        .unix(daemon.clone(), listener, routes::all(daemon.clone()));
    let serving = tokio::spawn(serving);
    if let Some(web) = &options.web {
        let address = web.address;
        let listener = TcpListener::bind(address).await;
        let listener = listener.map_err(host(format!("--web {address}")))?;
        if let Ok(address) = listener.local_addr() {
            tracing::info!(%address, "the guests are shown at this address");
        }
        tokio::spawn(
            connections
                .clone()
                .web(listener, routes::read_only(daemon.clone(), web)),
        );
    }
    daemon.events.tell(EventKind::DaemonStarted, None, None);
    // A service manager that waits for this takes the daemon for failed if it does not come.
    if let Err(error) = sd_notify::notify(&[NotifyState::Ready]) {
        tracing::error!(error = %chain(&error), "the service manager (NOTIFY_SOCKET) cannot be told that the daemon is ready");
    }
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    daemon.events.tell(EventKind::DaemonStopping, None, None);
    // Where that fails, the service manager sees the end of the process all the same.
    let _ = sd_notify::notify(&[NotifyState::Stopping]);
    let _ = over.send(true);
    let _ = serving.await;
    if let Some(grace) = options.stop_guests {
        daemon.stop_all(grace).await;
    }
    connections.finish().await;
    if options.networks.remove {
        daemon.networks.remove_all()?;
    }
    Ok(())
}

/// Serves until a signal ends it.
///
/// # Errors
/// [`ServeError`]: it could not begin.
pub fn run(options: Options) -> Result<(), ServeError> {
    signals::share_one_heap();
    close_descriptors_in_guests();
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
