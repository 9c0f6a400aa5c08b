//! `coppice run`: one guest from its start to its end.
//!
//! The main thread serves the event loop: the devices, the console, signals and the end of the guest. The vCPUs have a thread each,
//! and the REST socket has one for itself and one for each connection, where there is one.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError, TryLockError};

use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use memshare::ShareMode;
use vmm_sys_util::eventfd::EventFd;

use crate::api::{ApiServer, ApiSocket, SocketError};
use crate::config::VmConfig;
use crate::console::{self, Console, RawMode};
use crate::control::{Control, ControlError, Guest, LaunchError, Origin};
use crate::exit::ExitReason;
use crate::jail::{self, Confinement, JailError};
use crate::logging::Log;
use crate::machine::{GuestEnd, Machine, Subscriber, Surroundings};
use crate::metrics::{ApiMetrics, open_output};
use crate::reference::{self, Warmer};
use crate::signals::{self, Signals};

/// What `coppice run` was asked for.
#[derive(Debug)]
pub struct RunOptions {
    /// The guest. It starts at once if it has a boot source, and else waits for `InstanceStart`.
    pub config: VmConfig,
    /// Where to listen for REST requests.
    pub api_socket: Option<PathBuf>,
    /// What the process gives away before.
    pub confinement: Confinement,
}

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
    #[error("event loop: {0}")]
    EventLoop(#[from] event_manager::Error),
    /// The jail.
    #[error(transparent)]
    Jail(#[from] JailError),
    /// The host has no more of something.
    #[error("{what}: {source}")]
    Host {
        /// What was to be had.
        what: &'static str,
        /// What the host said.
        source: io::Error,
    },
}

fn host(what: &'static str) -> impl FnOnce(io::Error) -> RunError {
    move |source| RunError::Host { what, source }
}

/// The first reason to end, and the event that wakes the main thread for it.
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

    /// Later reasons are consequences of the first, or too late.
    fn tell(&self, reason: ExitReason) {
        self.reason
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get_or_insert(reason);
        if let Err(error) = self.event.write(1) {
            tracing::error!(%error, "the end of the guest cannot be told");
        }
    }

    fn told(&self) -> Option<ExitReason> {
        self.reason
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
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
            self.ending.tell(ExitReason::Signal(number));
        }
    }

    fn init(&mut self, ops: &mut EventOps) {
        let events = [self.signals.as_raw_fd(), self.ending.event.as_raw_fd()];
        for fd in events {
            if let Err(error) = ops.add(Events::new_raw(fd, EventSet::IN)) {
                tracing::error!(%error, "the end of the guest cannot be seen");
            }
        }
    }
}

/// What every launch needs, on whichever thread.
#[derive(Clone)]
struct Launcher {
    console: Arc<Mutex<Console>>,
    ending: Arc<Ending>,
    warm: Option<Warmer>,
}

impl Launcher {
    fn surroundings(&self, config: &VmConfig) -> Result<Surroundings, LaunchError> {
        let serial_out: OwnedFd = match config
            .serial
            .as_ref()
            .and_then(|serial| serial.serial_out_path.as_ref())
        {
            Some(path) => open_output(path).map_err(LaunchError::Serial)?.into(),
            None => console::stdout().map_err(LaunchError::Serial)?,
        };
        let serial_drained = self.console().drained().map_err(LaunchError::Serial)?;
        let ending = self.ending.clone();
        let on_end = Arc::new(move |end: GuestEnd| ending.tell(ExitReason::Guest(end)));
        Ok(Surroundings {
            serial_out,
            serial_drained,
            on_end,
            warm: self.warm.clone(),
        })
    }

    fn console(&self) -> std::sync::MutexGuard<'_, Console> {
        self.console.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Builds the guest, and lets it run if it is new; on the thread of the event loop.
    fn launch(
        &self,
        config: &VmConfig,
        origin: Origin,
        ops: &mut dyn SubscriberOps<Subscriber = Subscriber>,
    ) -> Result<Box<dyn Guest>, LaunchError> {
        let surroundings = self.surroundings(config)?;
        let machine = match origin {
            Origin::Kernel => Machine::start(config, ops, surroundings),
            Origin::Snapshot(loading) => Machine::load(config, *loading, ops, surroundings),
        }?;
        self.console().connect(Box::new(machine.console().clone()));
        Ok(Box::new(machine))
    }
}

/// Runs a guest to its end, with the terminal, the disks and the socket in order afterwards.
///
/// # Errors
/// [`RunError`]: the guest could not start.
pub fn run(options: RunOptions, log: Log) -> Result<ExitReason, RunError> {
    let RunOptions {
        config,
        api_socket,
        confinement,
    } = options;
    signals::share_one_heap();
    let signals = Signals::block().map_err(host("signals"))?;
    let ending = Ending::new().map_err(host("eventfd"))?;
    let api_metrics = Arc::new(ApiMetrics::default());
    let control = Arc::new(Mutex::new(Control::new(log, api_metrics.clone())));
    let start = config.boot_source.is_some();
    lock(&control).configure(config.clone())?;
    let warm = warmer(&config);
    // Removes the socket when it goes, so also where the guest cannot start.
    let api_socket = api_socket.as_deref();
    let socket = api_socket.map(ApiSocket::bind).transpose()?;
    let report = jail::enter(&confinement, &config, api_socket)?;
    tracing::info!(uid = report.uid, gid = report.gid, layers = %report, "jail");
    lock(&control).confined(report);

    let mut manager = EventManager::<Subscriber>::new_with_capacity(32)?;
    let on_quit = {
        let ending = ending.clone();
        Arc::new(move || ending.tell(ExitReason::Quit))
    };
    let input = console::stdin().map_err(host("standard input"))?;
    let raw_mode = RawMode::enter(&input).map_err(host("terminal"))?;
    let console = Arc::new(Mutex::new(
        Console::new(input, on_quit).map_err(host("console"))?,
    ));
    manager.add_subscriber(Arc::new(Mutex::new(Wakeups {
        signals,
        ending: ending.clone(),
    })));
    manager.add_subscriber(console.clone());
    let launcher = Launcher {
        console,
        ending: ending.clone(),
        warm,
    };

    if start {
        lock(&control).start(|config, origin| launcher.launch(config, origin, &mut manager))?;
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
                    lock(&control).end();
                    return Err(host("REST socket")(error));
                }
            }
        }
        None => None,
    };

    let reason = loop {
        if let Some(reason) = ending.told() {
            break reason;
        }
        if let Err(error) = manager.run() {
            // Nothing serves the guest any more, but its disks can be closed.
            break ExitReason::Guest(GuestEnd::Failed(format!("event loop: {error}")));
        }
    };
    tracing::info!(?reason, "ending");
    // A request that starts the guest may hold the lock and wait for the event loop: serve that until it is done.
    loop {
        match control.try_lock() {
            Ok(mut control) => break control.end(),
            Err(TryLockError::Poisoned(control)) => break control.into_inner().end(),
            Err(TryLockError::WouldBlock) => {
                manager.run_with_timeout(10)?;
            }
        }
    }
    if let Some(server) = server {
        server.finish();
    }
    drop(raw_mode);
    if let ExitReason::Guest(GuestEnd::Failed(error)) = &reason {
        eprintln!("coppice: {error}");
    }
    Ok(reason)
}

/// Who makes a reference image of the kernel, where one may be wanted that is not there: nobody can be started later.
fn warmer(config: &VmConfig) -> Option<Warmer> {
    let wanted = match &config.boot_source {
        Some(_) => config.sharing.mode == ShareMode::All && !reference::is_there(config),
        None => true,
    };
    let started = wanted.then(Warmer::start)?;
    started
        .inspect_err(|error| tracing::warn!(%error, "no reference image is made"))
        .ok()
}

fn lock(control: &Mutex<Control>) -> std::sync::MutexGuard<'_, Control> {
    control.lock().unwrap_or_else(PoisonError::into_inner)
}
