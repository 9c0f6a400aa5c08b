//! The boot timer: a guest tells that it has booted, by a write to a port, as it does to early Firecracker on x86 (`MAGIC_IOPORT_SIGNAL_GUEST_BOOT_COMPLETE`;
//! later ones have the same by MMIO). A guest that knows nothing of it writes nothing there.

use std::sync::{Arc, OnceLock};
use std::time::Instant;

use crate::bus::BusDevice;
use crate::lifecycle::{DeviceKind, StateKey, stateless};

/// What is the same of all devices of this kind.
pub(crate) const KIND: DeviceKind = DeviceKind::unmetered("boot timer", StateKey::Nothing);

/// `MAGIC_VALUE_SIGNAL_GUEST_BOOT_COMPLETE`.
const BOOTED: u8 = 123;

/// When a guest told that it has booted; it counts once.
pub type BootMark = Arc<OnceLock<Instant>>;

/// One port, which is only written to.
#[derive(Default)]
pub struct BootTimer {
    mark: BootMark,
}

impl BootTimer {
    /// Where the guest's word is noted.
    pub fn mark(&self) -> BootMark {
        self.mark.clone()
    }
}

stateless!(BootTimer, KIND);

impl BusDevice for BootTimer {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        // As where there is no device.
        data.fill(0xff);
    }

    fn write(&mut self, _offset: u64, data: &[u8]) {
        if data.first() == Some(&BOOTED) {
            self.mark.get_or_init(Instant::now);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_word_counts_and_no_other_value() {
        let mut timer = BootTimer::default();
        let mark = timer.mark();
        timer.write(0, &[]);
        timer.write(0, &[122]);
        assert_eq!(mark.get(), None);
        timer.write(0, &[BOOTED]);
        let first = *mark.get().unwrap();
        timer.write(0, &[BOOTED]);
        assert_eq!(mark.get(), Some(&first));
        let mut data = [0];
        timer.read(0, &mut data);
        assert_eq!(data, [0xff]);
    }
}
