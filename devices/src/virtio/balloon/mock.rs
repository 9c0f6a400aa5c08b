//! What the tests put a device between: guest memory, and a host that takes memory back.

use std::sync::Mutex;

use vm_memory::GuestAddress;

use super::*;

pub(super) const MEMORY_END: u64 = 0x20_1000;

/// Two regions that touch, and a page behind a hole.
pub(super) fn memory() -> GuestMemory {
    GuestMemory::from_ranges(&[
        (GuestAddress(0), 0x10_0000),
        (GuestAddress(0x10_0000), 0x8_0000),
        (GuestAddress(0x20_0000), 0x1000),
    ])
    .unwrap()
}

/// What a device gave back, in order: address and length.
pub(super) type Given = Arc<Mutex<Vec<(u64, u64)>>>;

pub(super) fn everything() -> BalloonConfig {
    BalloonConfig {
        target_pages: 256,
        deflate_on_oom: true,
        statistics_interval: 1,
        hinting: true,
        reporting: true,
    }
}

pub(super) fn device(config: &BalloonConfig) -> (VirtioBalloon, Given) {
    let given = Given::default();
    let irqfd = EventFd::new(libc::EFD_NONBLOCK).unwrap();
    let taker = given.clone();
    let give_back: GiveBack = Arc::new(move |address, len| {
        taker.lock().unwrap().push((address.0, len));
        // As a host that cannot do without its last page.
        if address.0 == MEMORY_END - 0x1000 {
            return Err(io::Error::other("it is needed"));
        }
        Ok(())
    });
    let device = VirtioBalloon::new(config, give_back, Arc::new(Interrupt::new(irqfd))).unwrap();
    (device, given)
}
