//! `coppice run`: one guest from its start to its end.
//!
//! The main thread serves the event loop: the devices, the console, signals and the end of the guest. The vCPUs have a
//! thread each, and the REST socket has one for itself and one for each connection, where there is one.

use std::error::Error;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{self, Arc};
use std::time::Instant;

use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use parking_lot::Mutex;
use vmm_sys_util::eventfd::EventFd;

use cli::RunOptions;
use config::{MmdsVersion, NetworkInterfaceConfig, VmConfig, VsockConfig};
use control::api::ApiServer;
use control::console::{self, Console, ConsoleSocket};
use control::logging::Log;
use control::metrics::ApiMetrics;
use control::mmds::{MetadataFileError, Mmds, MmdsService, Protocol, Tokens};
use control::{Control, ControlError, Guest, LaunchError, Origin};
use host::exit::GuestEnd;
use host::exit::{EndReport, ExitReason};
use host::heap;
use host::output::open_output;
use host::report::chain;
use host::signals::{self, Signals};
use host::socket::{ApiSocket, SocketError};
use host::stack;
use host::terminal::RawMode;
use jail::{self, Confinement, JailError, Layer};
use machine::reference::{self, WarmTerms, Warmer};
use machine::snapshot::{Loading, SnapshotFiles};
use machine::{
    InterfaceTapError, Machine, NetworkHost, StartError, Subscriber, Surroundings, Taps, VsockHost,
};

/// Why a guest could not be run.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The configuration, or the start.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// The REST socket.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// The event loop.
    #[error("event loop")]
    EventLoop(#[from] event_manager::Error),
    /// The jail.
    #[error(transparent)]
    Jail(#[from] JailError),
    /// A file that a snapshot names, and that its jail may not have.
    #[error(
        "the jail has no file that the snapshot names: give it with memory=, below=, disk.ID= or vsock= of --restore, or with allow= of --jail"
    )]
    NotNamed(#[source] Box<ControlError>),
    /// A tap of the guest.
    #[error(transparent)]
    Tap(#[from] InterfaceTapError),
    /// The metadata of the guest.
    #[error(transparent)]
    Metadata(#[from] MetadataFileError),
    /// The host refused a resource.
    #[error("{what}")]
    Host {
        /// The resource.
        what: &'static str,
        /// The error of the host.
        source: io::Error,
    },
}

fn host(what: &'static str) -> impl FnOnce(io::Error) -> RunError {
    move |source| RunError::Host { what, source }
}

/// Why the process is to end, and the event that wakes the main thread for it.
struct Ending {
    reason: Mutex<Option<ExitReason>>,
    event: EventFd,
}

impl Ending {
    fn new() -> io::Result<Arc<Self>> {
        let event = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        Ok(Arc::new(Self {
            reason: Mutex::new(None),
            event,
        }))
    }

    /// Asks for the end. Only the first reason is kept: later ones follow from it, or come too late.
    fn request(&self, reason: ExitReason) {
        self.reason.lock().get_or_insert(reason);
        if let Err(error) = self.event.write(1) {
            tracing::error!(error = %chain(&error), "the main thread cannot be woken for the end of the guest");
        }
    }

    fn reason(&self) -> Option<ExitReason> {
        self.reason.lock().clone()
    }
}

/// Wakes the main thread for signals and for the end of the guest.
struct Wakeups {
    signals: Signals,
    ending: Arc<Ending>,
}

impl MutEventSubscriber for Wakeups {
    fn process(&mut self, _: Events, _: &mut EventOps) {
        if let Some(number) = self.signals.next() {
            self.ending.request(ExitReason::Signal(number));
        }
    }

    fn init(&mut self, ops: &mut EventOps) {
        let events = [self.signals.as_raw_fd(), self.ending.event.as_raw_fd()];
        for fd in events {
            if let Err(error) = ops.add(Events::new_raw(fd, EventSet::IN)) {
                tracing::error!(error = %chain(&error), "the end of the guest cannot be waited for");
            }
        }
    }
}

/// What every launch needs, on whichever thread.
#[derive(Clone)]
struct Launcher {
    console: Arc<sync::Mutex<Console>>,
    console_socket: Option<Arc<sync::Mutex<ConsoleSocket>>>,
    ending: Arc<Ending>,
    warm: Option<Warmer>,
    /// The socket of the vsock device, until there is one.
    vsock_socket: Arc<Mutex<Option<ApiSocket>>>,
    /// The taps of its network interfaces, until there are these.
    taps: Arc<Mutex<Taps>>,
    metadata: Arc<Mmds>,
    tokens: Arc<Tokens>,
    only_configure: bool,
}

impl Launcher {
    fn surroundings(&self, config: &VmConfig) -> Result<Surroundings, LaunchError> {
        let path = config
            .serial
            .as_ref()
            .and_then(|serial| serial.serial_out_path.as_ref());
        let file = path.map(|path| open_output(path)).transpose();
        let file = file.map_err(LaunchError::Serial)?;
        let serial_out = match (&self.console_socket, file) {
            (Some(socket), file) => devices::lock(socket).serial_out(file),
            (None, Some(file)) => Ok(file.into()),
            (None, None) => console::stdout(),
        };
        let serial_out: OwnedFd = serial_out.map_err(LaunchError::Serial)?;
        let serial_drained = self.console().drained().map_err(LaunchError::Serial)?;
        let ending = self.ending.clone();
        let on_end = Arc::new(move |end: GuestEnd| ending.request(ExitReason::Guest(end)));
        let mmds = config.mmds_config.as_ref();
        let version = mmds.map(|mmds| mmds.version).unwrap_or_default();
        Ok(Surroundings {
            serial_out,
            serial_drained,
            on_end,
            warm: self.warm.clone(),
            vsock: VsockHost {
                socket: self.vsock_socket.lock().take(),
                metadata: Some(self.metadata_service(config, MmdsVersion::V1)),
            },
            network: NetworkHost {
                taps: std::mem::take(&mut *self.taps.lock()),
                metadata: Some(self.metadata_service(config, version)),
            },
        })
    }

    /// What answers for the guest's metadata, by a version of the protocol.
    fn metadata_service(&self, config: &VmConfig, version: MmdsVersion) -> Arc<MmdsService> {
        let mmds = config.mmds_config.as_ref();
        Arc::new(MmdsService {
            metadata: self.metadata.clone(),
            tokens: self.tokens.clone(),
            protocol: Protocol {
                imds_compat: mmds.is_some_and(|mmds| mmds.imds_compat),
                needs_token: version == MmdsVersion::V2,
            },
        })
    }

    fn console(&self) -> sync::MutexGuard<'_, Console> {
        devices::lock(&self.console)
    }

    /// Builds the guest, and lets it run if it is new; on the thread of the event loop.
    fn launch(
        &self,
        config: &VmConfig,
        origin: Origin,
        ops: &mut dyn SubscriberOps<Subscriber = Subscriber>,
    ) -> Result<Box<dyn Guest>, LaunchError> {
        if self.only_configure {
            return Err(match &config.boot_source {
                None => StartError::NoKernel.into(),
                Some(_) => LaunchError::OnlyConfigured,
            });
        }
        let surroundings = self.surroundings(config)?;
        let machine = match origin {
            Origin::Kernel => Machine::start(config, ops, surroundings),
            Origin::Snapshot(loading) => Machine::load(config, *loading, ops, surroundings),
        }?;
        self.console().connect(Box::new(machine.console().clone()));
        heap::give_back();
        stack::give_back();
        Ok(Box::new(machine))
    }
}

/// Runs a guest to its end, with the terminal, the disks and the socket in order afterwards.
///
/// # Errors
/// [`RunError`]: the guest could not start.
pub fn run(options: RunOptions, log: Log) -> Result<ExitReason, RunError> {
    let begun = Instant::now();
    let end_file = options.end_file.clone();
    let ended = run_to_end(options, log, begun);
    if let Some(path) = end_file {
        let end = match &ended {
            Ok(reason) => EndReport::from(reason),
            Err(error) => EndReport::failed(error),
        };
        if let Err(error) = end.write(&path) {
            tracing::error!(error = %chain(&error), path = %path.display(), "why the guest ended cannot be written");
        }
    }
    ended
}

/// What has been opened or started before the guest is.
struct Prepared {
    /// Removed when it goes, so also where the guest cannot start.
    socket: Option<ApiSocket>,
    console_socket: Option<ApiSocket>,
    vsock_socket: Option<ApiSocket>,
    taps: Taps,
    loading: Option<Loading>,
    /// Whether the process has a tree of its own.
    in_tree: bool,
    warm: Option<Warmer>,
}

/// The error of a load, in a jail with a tree of its own or not.
fn of_load(error: ControlError, in_tree: bool) -> RunError {
    let mut cause: Option<&(dyn Error + 'static)> = Some(&error);
    while let Some(error) = cause {
        let host = error.downcast_ref::<io::Error>();
        if in_tree && host.is_some_and(|host| host.kind() == io::ErrorKind::NotFound) {
            break;
        }
        cause = error.source();
    }
    match cause {
        Some(_) => RunError::NotNamed(Box::new(error)),
        None => error.into(),
    }
}

/// Configures the guest, opens what is to be opened outside, and enters the jail.
fn prepare(options: RunOptions, control: &mut Control) -> Result<Prepared, RunError> {
    let RunOptions {
        config,
        jailed,
        id,
        api_socket,
        console_socket,
        confinement,
        restore,
        held,
        metadata,
        taps: given,
        only_configure,
        limits,
        ..
    } = options;
    if let Some(id) = id {
        control.set_id(id);
    }
    control.set_limits(limits);
    control.configure(config.clone())?;
    if let Some(path) = metadata {
        control.mmds().read(&path)?;
    }
    let files = restore.as_ref().map(SnapshotFiles::open).transpose();
    let files = files.map_err(ControlError::from)?;
    let warm = match &files {
        Some(_) => None,
        None if only_configure => None,
        None => warmer(&config, &confinement, held),
    };
    let (api_path, console_path) = (api_socket.as_deref(), console_socket.as_deref());
    let socket = api_path.map(ApiSocket::bind).transpose()?;
    let console_socket = console_path.map(ApiSocket::bind).transpose()?;
    let vsock = restore
        .as_ref()
        .and_then(|load| load.vsock_override.as_ref());
    let vsock_path = vsock.and_then(|vsock| vsock.uds_path.as_deref());
    let vsock_path = vsock_path.or(jailed.vsock.as_ref().map(VsockConfig::path));
    // It is bound here because the process can make files anywhere only before it enters the jail.
    let vsock_socket = vsock_path.map(ApiSocket::bind).transpose()?;
    let mut taps = Taps::default();
    for (iface_id, tap) in given {
        let interface = NetworkInterfaceConfig {
            iface_id,
            ..NetworkInterfaceConfig::default()
        };
        taps.give(&interface, vec![tap])?;
    }
    if !only_configure {
        taps.open(&config)?;
        taps.open_overrides(restore.as_ref())?;
    }
    let sockets = api_path.into_iter().chain(console_path).chain(vsock_path);
    let sockets: Vec<_> = sockets.collect();
    let report = jail::enter(&confinement, &jailed, restore.as_ref(), &sockets)?;
    tracing::info!(uid = report.uid, gid = report.gid, layers = %report, "jail");
    let in_tree = report.contains(Layer::Tree);
    control.confined(report);
    // A guest may have made the snapshot, so it is read where no rights are left.
    let loading = files.map(SnapshotFiles::read).transpose();
    let loading = loading.map_err(|error| of_load(error.into(), in_tree))?;
    Ok(Prepared {
        socket,
        console_socket,
        vsock_socket,
        taps,
        loading,
        in_tree,
        warm,
    })
}

/// Serves the guest until it has come to its end, and closes its disks.
fn serve_to_end(
    manager: &mut EventManager<Subscriber>,
    ending: &Ending,
    control: &Mutex<Control>,
) -> Result<ExitReason, RunError> {
    let reason = loop {
        if let Some(reason) = ending.reason() {
            break reason;
        }
        if let Err(error) = manager.run() {
            // Nothing serves the guest any more, but its disks can be closed.
            break ExitReason::Guest(GuestEnd::Failed(format!("event loop: {}", chain(&error))));
        }
    };
    tracing::info!(?reason, "ending");
    // A request that starts the guest may hold the lock and wait for the event loop: serve that until it is done.
    loop {
        if let Some(mut control) = control.try_lock() {
            break control.end();
        }
        manager.run_with_timeout(10)?;
    }
    Ok(reason)
}

fn run_to_end(options: RunOptions, log: Log, begun: Instant) -> Result<ExitReason, RunError> {
    signals::share_one_heap();
    let signals = Signals::block().map_err(host("signals"))?;
    let ending = Ending::new().map_err(host("eventfd"))?;
    let api_metrics = Arc::new(ApiMetrics::default());
    let control = Arc::new(Mutex::new(Control::new(log, api_metrics.clone())));
    let only_configure = options.only_configure;
    let start = options.config.boot_source.is_some() && !options.no_start && !only_configure;
    let resume = options.restore.as_ref().is_some_and(|load| load.resume_vm);
    let Prepared {
        socket,
        console_socket,
        vsock_socket,
        taps,
        loading,
        in_tree,
        warm,
    } = prepare(options, &mut control.lock())?;

    let mut manager = EventManager::<Subscriber>::new_with_capacity(32)?;
    let on_quit = {
        let ending = ending.clone();
        Arc::new(move || ending.request(ExitReason::Quit))
    };
    let input = console::stdin().map_err(host("standard input"))?;
    let raw_mode = RawMode::enter(&input).map_err(host("terminal"))?;
    let console = Arc::new(sync::Mutex::new(
        Console::new(input, on_quit).map_err(host("console"))?,
    ));
    manager.add_subscriber(Arc::new(sync::Mutex::new(Wakeups {
        signals,
        ending: ending.clone(),
    })));
    manager.add_subscriber(console.clone());
    let console_server = console_socket
        .as_ref()
        .map(|socket| ConsoleSocket::new(socket.listener()?, console.clone()))
        .transpose()
        .map_err(host("console socket"))?
        .map(|server| Arc::new(sync::Mutex::new(server)));
    if let Some(server) = &console_server {
        manager.add_subscriber(server.clone());
    }
    let vsock_socket = Arc::new(Mutex::new(vsock_socket));
    let launcher = Launcher {
        console,
        console_socket: console_server.clone(),
        ending: ending.clone(),
        warm,
        vsock_socket: vsock_socket.clone(),
        taps: Arc::new(Mutex::new(taps)),
        metadata: control.lock().mmds().clone(),
        tokens: Arc::default(),
        only_configure,
    };

    if loading.is_some() || start {
        control.lock().count_from(begun);
    }
    if let Some(loading) = loading {
        let launch = |config: &VmConfig, origin| launcher.launch(config, origin, &mut manager);
        let loaded = control.lock().load(loading, resume, launch);
        loaded.map_err(|error| of_load(error, in_tree))?;
    } else if start {
        control
            .lock()
            .start(|config, origin| launcher.launch(config, origin, &mut manager))?;
    }
    let server = match &socket {
        Some(socket) => {
            let remote = manager.remote_endpoint();
            let launch = move |config: &VmConfig, origin| {
                let (launcher, config) = (launcher.clone(), config.clone());
                remote.call_blocking(move |ops| launcher.launch(&config, origin, ops))
            };
            match ApiServer::start(socket, control.clone(), api_metrics, Arc::new(launch)) {
                Ok(server) => Some(server),
                Err(error) => {
                    control.lock().end();
                    return Err(host("REST socket")(error));
                }
            }
        }
        None => None,
    };

    let reason = serve_to_end(&mut manager, &ending, &control)?;
    if let Some(console) = console_server {
        devices::lock(&console).finish();
    }
    if let Some(server) = server {
        server.finish();
    }
    // Of a guest that was never started: the threads of the server, which may start it, end with the process.
    drop(vsock_socket.lock().take());
    drop(raw_mode);
    if let ExitReason::Guest(GuestEnd::Failed(why)) = &reason {
        // Standard error may be a file on a full disk.
        let _ = writeln!(io::stderr(), "coppice: {why}");
    }
    Ok(reason)
}

/// Starts the process that makes a reference image of the kernel, where one may be wanted that does not exist: in the
/// jail this process can start no other.
fn warmer(config: &VmConfig, confinement: &Confinement, held: bool) -> Option<Warmer> {
    let only = match &config.boot_source {
        Some(_) => Some(reference::lacking(config)?),
        // A process that was jailed before it knows its kernel is not to say what is made without its jail. The other
        // process lives as long as this one waits for its configuration, so that a held guest, of which there may be
        // thousands, has none.
        None if held || confinement.jail.is_some() => return None,
        None => None,
    };
    let terms = WarmTerms {
        confinement: confinement.clone(),
        only,
    };
    Warmer::start(&terms)
        .inspect_err(|error| tracing::warn!(error = %chain(error), "no reference image is made"))
        .ok()
}
