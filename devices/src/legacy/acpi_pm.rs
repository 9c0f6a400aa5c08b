//! Sleep control, sleep status and reset registers of hardware-reduced ACPI (ACPI 6.5, 4.8.3.7 and 4.8.3.6).

use super::{PowerEvent, PowerSink};
use crate::bus::BusDevice;
use crate::lifecycle::{DeviceKind, StateKey, stateless};

/// What is the same of all devices of this kind.
pub(crate) const KIND: DeviceKind =
    DeviceKind::unmetered("ACPI power management", StateKey::Nothing);

/// `SLP_TYP` that the DSDT names in `\_S5`.
pub const S5_SLEEP_TYPE: u8 = 5;
/// `RESET_VALUE` of the FADT.
pub const RESET_VALUE: u8 = 1;

const SLEEP_CONTROL: u64 = 0;
const RESET: u64 = 2;
/// `SLP_EN` in the sleep control register.
const SLEEP_ENABLE: u8 = 1 << 5;

/// Three one-byte ports: sleep control, sleep status (always 0: this guest never wakes), reset.
pub struct AcpiPm {
    sink: PowerSink,
}

impl AcpiPm {
    /// Ports taken.
    pub const PORTS: u64 = 3;

    /// Tells `sink` of power-off and reset.
    pub fn new(sink: PowerSink) -> Self {
        Self { sink }
    }
}

stateless!(AcpiPm, KIND);

impl BusDevice for AcpiPm {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let &[value] = data else { return };
        match offset {
            SLEEP_CONTROL if value & SLEEP_ENABLE != 0 && (value >> 2) & 7 == S5_SLEEP_TYPE => {
                (self.sink)(PowerEvent::PowerOff);
            }
            RESET if value == RESET_VALUE => (self.sink)(PowerEvent::Reset),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::legacy::recorder;

    #[test]
    fn only_s5_with_sleep_enable_powers_off_and_only_the_reset_value_resets() {
        let (sink, events) = recorder();
        let mut pm = AcpiPm::new(sink);
        pm.write(0, &[S5_SLEEP_TYPE << 2]);
        pm.write(0, &[(1 << 2) | SLEEP_ENABLE]);
        pm.write(0, &[(S5_SLEEP_TYPE << 2) | SLEEP_ENABLE, 0]);
        pm.write(1, &[0xff]);
        pm.write(2, &[RESET_VALUE + 1]);
        assert!(events.lock().unwrap().is_empty());
        pm.write(0, &[(S5_SLEEP_TYPE << 2) | SLEEP_ENABLE]);
        pm.write(2, &[RESET_VALUE]);
        assert_eq!(
            *events.lock().unwrap(),
            [PowerEvent::PowerOff, PowerEvent::Reset]
        );
    }
}
