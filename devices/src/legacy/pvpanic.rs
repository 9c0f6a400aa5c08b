//! pvpanic: how a guest kernel tells that it panicked (QEMU, docs/specs/pvpanic.rst; ACPI `QEMU0001`).

use super::{PowerEvent, PowerSink};
use crate::bus::BusDevice;
use crate::lifecycle::{DeviceKind, StateKey, stateless};

/// What is the same of all devices of this kind.
pub(crate) const KIND: DeviceKind = DeviceKind::unmetered("pvpanic", StateKey::Nothing);

/// `PVPANIC_PANICKED`: the only event this device offers.
const PANICKED: u8 = 1;

/// One port: a read tells which events are understood, a write raises them.
pub struct Pvpanic {
    sink: PowerSink,
}

impl Pvpanic {
    /// Tells `sink` of a panic.
    pub fn new(sink: PowerSink) -> Self {
        Self { sink }
    }
}

stateless!(Pvpanic, KIND);

impl BusDevice for Pvpanic {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(first) = data.first_mut() {
            *first = PANICKED;
        }
    }

    fn write(&mut self, _offset: u64, data: &[u8]) {
        if data.first().is_some_and(|events| events & PANICKED != 0) {
            (self.sink)(PowerEvent::Panic);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::legacy::recorder;

    #[test]
    fn a_write_of_the_panicked_bit_is_reported_and_nothing_else() {
        let (sink, events) = recorder();
        let mut device = Pvpanic::new(sink);
        let mut data = [0];
        device.read(0, &mut data);
        assert_eq!(data, [PANICKED]);
        device.write(0, &[2]);
        device.write(0, &[]);
        assert!(events.lock().unwrap().is_empty());
        device.write(0, &[3]);
        assert_eq!(*events.lock().unwrap(), [PowerEvent::Panic]);
    }
}
