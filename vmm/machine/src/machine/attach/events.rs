//! The event descriptors of devices: eventfd(2).

use std::sync::Arc;

use devices::virtio::Interrupt;
use vmm_sys_util::eventfd::EventFd;

use crate::machine::error::{StartError, host};

pub(super) fn event(device: &'static str) -> Result<EventFd, StartError> {
    EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(host(device))
}

pub(super) fn new_interrupt(device: &'static str) -> Result<Arc<Interrupt>, StartError> {
    Ok(Arc::new(Interrupt::new(event(device)?)))
}
