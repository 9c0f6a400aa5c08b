//! The guest whose memory becomes an image, in a process of its own, which is jailed as that of any guest.

use std::fs::File;
use std::io::{self, BufWriter, Read};
use std::os::fd::AsFd;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use event_manager::EventManager;
use memshare::is_zero;
use parking_lot::Mutex;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use super::answer::{tell_end, tell_page};
use config::VmConfig;
use host::exit::GuestEnd;
use jail::{Confinement, JailError};
use machine::{Machine, NetworkHost, StartError, Subscriber, Surroundings, VsockHost};

/// How long a kernel may take to boot and power off; one that takes longer is taken to hang.
pub(super) const PATIENCE: Duration = Duration::from_mins(2);

/// The guest, and how its process is confined.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct WarmingGuest {
    pub(super) confinement: Confinement,
    pub(super) config: VmConfig,
}

/// Why the guest's memory cannot be told.
#[derive(Debug, thiserror::Error)]
pub enum WarmingGuestError {
    /// What guest it is, is not told.
    #[error("standard input: what guest to boot")]
    Told(#[source] io::Error),
    /// The jail.
    #[error(transparent)]
    Jail(#[from] JailError),
    /// The guest does not start.
    #[error(transparent)]
    Start(#[from] StartError),
    /// The guest ended otherwise than by powering off.
    #[error("the guest did not boot to its end: {0:?}")]
    End(GuestEnd),
    /// The guest did not end.
    #[error("the guest has not booted within {PATIENCE:?}")]
    Slow,
    /// The kernel is none that can be mapped.
    #[error("the kernel is not mapped from the cache, so that its pages cannot be shared")]
    NotMapped,
    /// The event loop.
    #[error("event loop")]
    EventLoop(#[from] event_manager::Error),
    /// The host refused a resource, or nobody takes the answer.
    #[error("{what}")]
    Host {
        /// The resource.
        what: &'static str,
        /// The error of the host.
        source: io::Error,
    },
}

fn host(what: &'static str) -> impl FnOnce(io::Error) -> WarmingGuestError {
    move |source| WarmingGuestError::Host { what, source }
}

/// Enters the jail that standard input tells of, boots the guest, and tells its memory on standard output.
///
/// # Errors
/// [`WarmingGuestError`].
pub fn boot_and_tell() -> Result<(), WarmingGuestError> {
    let told = || {
        let mut text = Vec::new();
        io::stdin().read_to_end(&mut text)?;
        let guest = serde_json::from_slice::<WarmingGuest>(&text)?;
        // It is a pipe, and standard output would add a buffer that ends at each line.
        Ok((
            guest,
            File::from(io::stdout().as_fd().try_clone_to_owned()?),
        ))
    };
    let (guest, answer) = told().map_err(WarmingGuestError::Told)?;
    let report = jail::enter(&guest.confinement, &guest.config, None, &[])?;
    tracing::info!(uid = report.uid, gid = report.gid, layers = %report, "jail");
    let mut answer = BufWriter::with_capacity(64 << 10, answer);
    let awaited = answer
        .get_ref()
        .try_clone()
        .map_err(host("standard output"))?;
    let booted = boot(&guest.config, &awaited, |machine| {
        tell(machine, &mut answer)
    });
    if let Ok(()) | Err(WarmingGuestError::End(_) | WarmingGuestError::Slow) = &booted {
        tell_end(&mut answer, booted.is_ok()).map_err(host("tell how the guest ended"))?;
    }
    booted
}

/// Whether somebody still reads a pipe.
fn is_read(pipe: &File) -> bool {
    let mut closed = [PollFd::new(pipe, PollFlags::empty())];
    !poll(&mut closed, Some(&Timespec::default())).is_ok_and(|_| {
        let [closed] = &closed;
        closed.revents().contains(PollFlags::ERR)
    })
}

/// Boots the guest, and has `look` look at it when it has powered off. Gives up where `awaited` is not read any more.
fn boot(
    config: &VmConfig,
    awaited: &File,
    look: impl FnOnce(&Machine) -> Result<(), WarmingGuestError>,
) -> Result<(), WarmingGuestError> {
    let mut manager = EventManager::<Subscriber>::new_with_capacity(8)?;
    let (sender, end) = mpsc::channel();
    let sender = Mutex::new(sender);
    let on_end = Arc::new(move |how: GuestEnd| {
        // It fails only where the receiver has given up waiting.
        let _ = sender.lock().send(how);
    });
    let nowhere = File::options().write(true).open("/dev/null");
    let surroundings = Surroundings {
        serial_out: nowhere.map_err(host("open /dev/null"))?.into(),
        serial_drained: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
            .map_err(host("make an eventfd"))?,
        on_end,
        warm: None,
        vsock: VsockHost::default(),
        network: NetworkHost::default(),
    };
    let started = Instant::now();
    let mut machine = Machine::start(config, &mut manager, surroundings)?;
    let mut how = None;
    while how.is_none() && started.elapsed() < PATIENCE && is_read(awaited) {
        manager.run_with_timeout(50)?;
        how = end.try_recv().ok();
    }
    machine.pause();
    let looked = match how.or_else(|| end.try_recv().ok()) {
        Some(GuestEnd::PowerOff) => look(&machine),
        Some(other) => Err(WarmingGuestError::End(other)),
        None => Err(WarmingGuestError::Slow),
    };
    machine.shutdown();
    looked
}

/// Tells the guest's own pages. Pages of zeros are left out, except in the range of the kernel: from such a page a
/// later guest learns beforehand that its kernel is going to write there.
fn tell(machine: &Machine, answer: &mut impl io::Write) -> Result<(), WarmingGuestError> {
    let kernel = machine.kernel().ok_or(WarmingGuestError::NotMapped)?;
    let memory = machine.shared_memory();
    let mut told = Ok(());
    for region in memory.regions() {
        memory
            .own_pages(region.start, region.window.len(), |address, bytes| {
                if told.is_ok() && (kernel.contains(&address) || !is_zero(bytes)) {
                    told = tell_page(answer, address, bytes);
                }
            })
            .map_err(host("look at the guest's memory"))?;
    }
    told.map_err(host("tell the guest's memory"))
}
