//! What a machine is given by the program that runs it.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use devices::service::Service;
use event_manager::MutEventSubscriber;
use vmm_sys_util::eventfd::EventFd;

use super::taps::Taps;
use crate::reference::Warmer;
use host::exit::GuestEnd;
use host::socket::ApiSocket;

/// Called when the guest has ended, with how it ended.
pub type OnEnd = Arc<dyn Fn(GuestEnd) + Send + Sync>;

/// What the event loop serves.
pub type Subscriber = Arc<Mutex<dyn MutEventSubscriber + Send>>;

/// What a vsock device finds on the host.
#[derive(Default)]
pub struct VsockHost {
    /// Its socket, where it was bound before.
    pub socket: Option<ApiSocket>,
    /// What answers at the port of `mmds-config`; nothing does where absent.
    pub metadata: Option<Arc<dyn Service>>,
}

/// What the network interfaces find in the guest's process and on the host.
#[derive(Default)]
pub struct NetworkHost {
    /// Their taps, as far as they are open.
    pub taps: Taps,
    /// What answers at the address of `mmds-config`, where the interface is one of its list.
    pub metadata: Option<Arc<dyn Service>>,
}

/// What a machine is given by the program that runs it.
pub struct Surroundings {
    /// Where the guest's serial console writes.
    pub serial_out: OwnedFd,
    /// Becomes readable when the guest has read all input of its console.
    pub serial_drained: EventFd,
    /// Called once, when the guest has ended, on a thread that must not be held up.
    pub on_end: OnEnd,
    /// Who makes a reference image of the guest's kernel, where there is none yet.
    pub warm: Option<Warmer>,
    /// What its vsock device finds, where it has one.
    pub vsock: VsockHost,
    /// What its network interfaces find.
    pub network: NetworkHost,
}

impl Surroundings {
    /// Passes on how the guest ended on the first call alone: one that panics and then resets has panicked.
    pub(super) fn ending_once(self) -> Self {
        let (on_end, is_over) = (self.on_end, AtomicBool::new(false));
        let on_end: OnEnd = Arc::new(move |end| {
            if !is_over.swap(true, Ordering::SeqCst) {
                on_end(end);
            }
        });
        Self { on_end, ..self }
    }
}
