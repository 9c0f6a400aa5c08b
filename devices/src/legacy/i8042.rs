//! The i8042 keyboard controller: CPU reset, and a keyboard that types Ctrl-Alt-Del.
//!
//! Enough of the controller (IBM PS/2 Technical Reference, "Keyboard and Auxiliary Device Controller") that Linux finds
//! a keyboard port, and no auxiliary port.

use std::collections::VecDeque;

use vmm_sys_util::eventfd::EventFd;

use super::{PowerEvent, PowerSink};
use crate::bus::BusDevice;
use crate::lifecycle::{Device, DeviceKind, StateKey, persist_by_type};

mod persist;

pub use persist::I8042State;

/// What is the same of all devices of this kind.
pub(crate) const KIND: DeviceKind = DeviceKind::unmetered("i8042", StateKey::One("keyboard"));

const DATA_PORT: u64 = 0;
const COMMAND_PORT: u64 = 4;

/// Status: output buffer full.
const STATUS_OUTPUT_FULL: u8 = 1 << 0;
/// Status: system flag, set after a successful self-test.
const STATUS_SYSTEM: u8 = 1 << 2;
/// Status: keyboard not inhibited.
const STATUS_UNLOCKED: u8 = 1 << 4;

const COMMAND_READ_CONTROL: u8 = 0x20;
const COMMAND_WRITE_CONTROL: u8 = 0x60;
const COMMAND_DISABLE_AUX: u8 = 0xa7;
const COMMAND_SELF_TEST: u8 = 0xaa;
const COMMAND_TEST_KEYBOARD_PORT: u8 = 0xab;
const COMMAND_DISABLE_KEYBOARD: u8 = 0xad;
const COMMAND_ENABLE_KEYBOARD: u8 = 0xae;
const COMMAND_READ_OUTPUT_PORT: u8 = 0xd0;
const COMMAND_WRITE_OUTPUT_PORT: u8 = 0xd1;
const COMMAND_RESET_CPU: u8 = 0xfe;

/// Control byte: an interrupt for each byte of the keyboard.
const CONTROL_KEYBOARD_INTERRUPT: u8 = 1 << 0;
/// Control byte: the self-test passed.
const CONTROL_SYSTEM: u8 = 1 << 2;
/// Control byte: keyboard clock off.
const CONTROL_KEYBOARD_DISABLED: u8 = 1 << 4;
/// Control byte: auxiliary clock off.
const CONTROL_AUX_DISABLED: u8 = 1 << 5;

/// The control byte of a controller that was not used yet.
const CONTROL_AT_START: u8 = CONTROL_KEYBOARD_INTERRUPT | CONTROL_SYSTEM | CONTROL_AUX_DISABLED;

/// Output port: A20 gate open, CPU not in reset.
const OUTPUT_PORT: u8 = 0b11;
const SELF_TEST_PASSED: u8 = 0x55;
const PORT_TEST_PASSED: u8 = 0x00;
const KEYBOARD_ACK: u8 = 0xfa;
const KEYBOARD_SELF_TEST_PASSED: u8 = 0xaa;
const KEYBOARD_RESET: u8 = 0xff;
const KEYBOARD_GET_ID: u8 = 0xf2;
const KEYBOARD_ID: [u8; 2] = [0xab, 0x83];

/// Make codes of left Ctrl, left Alt and Delete in scan code set 2, then their break codes.
const CTRL_ALT_DEL: [u8; 11] = [
    0x14, 0x11, 0xe0, 0x71, 0xe0, 0xf0, 0x71, 0xf0, 0x11, 0xf0, 0x14,
];

/// Bytes that may wait for the guest: the longest answer and one Ctrl-Alt-Del.
const OUTPUT_CAPACITY: usize = 16;

/// The controller at ports 0x60 and 0x64.
pub struct I8042 {
    sink: PowerSink,
    /// An irqfd of the keyboard's GSI.
    irqfd: EventFd,
    control: u8,
    /// A command that waits for its byte on the data port.
    pending: Option<u8>,
    output: VecDeque<u8>,
    /// The output is from a saved state: whether the VM knows of its interrupt is not certain.
    restored: bool,
}

impl I8042 {
    /// Ports taken, the data port first; those between data and command port are not used.
    pub const PORTS: u64 = 5;

    /// Tells `sink` of a CPU reset; interrupts the guest through `irqfd`.
    pub fn new(sink: PowerSink, irqfd: EventFd) -> Self {
        Self {
            sink,
            irqfd,
            control: CONTROL_AT_START,
            pending: None,
            output: VecDeque::with_capacity(OUTPUT_CAPACITY),
            restored: false,
        }
    }

    /// The eventfd to register as irqfd of the keyboard's GSI.
    pub fn irqfd(&self) -> &EventFd {
        &self.irqfd
    }

    /// Types Ctrl-Alt-Del; false where the guest has not read what was typed before.
    pub fn type_ctrl_alt_del(&mut self) -> bool {
        if !self.output.is_empty() {
            return false;
        }
        self.output.extend(CTRL_ALT_DEL);
        self.interrupt();
        true
    }

    fn interrupt(&self) {
        if !self.output.is_empty()
            && self.control & CONTROL_KEYBOARD_INTERRUPT != 0
            && let Err(error) = self.irqfd.write(1)
        {
            tracing::debug!(error = %report::chain(&error), "i8042 irqfd write");
        }
    }

    fn answer(&mut self, bytes: &[u8]) {
        if self.output.len() + bytes.len() <= OUTPUT_CAPACITY {
            self.output.extend(bytes);
            self.interrupt();
        }
    }

    fn command(&mut self, command: u8) {
        self.pending = None;
        match command {
            COMMAND_READ_CONTROL => self.answer(&[self.control]),
            COMMAND_WRITE_CONTROL | COMMAND_WRITE_OUTPUT_PORT => self.pending = Some(command),
            COMMAND_SELF_TEST => {
                self.control |= CONTROL_SYSTEM;
                self.answer(&[SELF_TEST_PASSED]);
            }
            COMMAND_TEST_KEYBOARD_PORT => self.answer(&[PORT_TEST_PASSED]),
            COMMAND_DISABLE_AUX => self.control |= CONTROL_AUX_DISABLED,
            COMMAND_DISABLE_KEYBOARD => self.control |= CONTROL_KEYBOARD_DISABLED,
            COMMAND_ENABLE_KEYBOARD => self.control &= !CONTROL_KEYBOARD_DISABLED,
            COMMAND_READ_OUTPUT_PORT => self.answer(&[OUTPUT_PORT]),
            COMMAND_RESET_CPU => (self.sink)(PowerEvent::Reset),
            // Commands for the auxiliary port are among them: there is none, and a controller without one does not
            // respond.
            _ => {}
        }
    }

    fn data(&mut self, value: u8) {
        match self.pending.take() {
            Some(COMMAND_WRITE_CONTROL) => {
                self.control = value | CONTROL_AUX_DISABLED;
                self.interrupt();
            }
            Some(_) => {}
            None => match value {
                KEYBOARD_RESET => self.answer(&[KEYBOARD_ACK, KEYBOARD_SELF_TEST_PASSED]),
                KEYBOARD_GET_ID => self.answer(&[KEYBOARD_ACK, KEYBOARD_ID[0], KEYBOARD_ID[1]]),
                _ => self.answer(&[KEYBOARD_ACK]),
            },
        }
    }

    fn status(&self) -> u8 {
        let full = if self.output.is_empty() {
            0
        } else {
            STATUS_OUTPUT_FULL
        };
        let system = if self.control & CONTROL_SYSTEM == 0 {
            0
        } else {
            STATUS_SYSTEM
        };
        full | system | STATUS_UNLOCKED
    }
}

impl Device for I8042 {
    persist_by_type!(KIND);

    fn resume(&mut self) {
        if std::mem::take(&mut self.restored) {
            self.interrupt();
        }
    }

    fn reset(&mut self) {
        self.control = CONTROL_AT_START;
        self.pending = None;
        self.output.clear();
        self.restored = false;
    }
}

impl BusDevice for I8042 {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let Some(first) = data.first_mut() else {
            return;
        };
        match offset {
            DATA_PORT => {
                *first = self.output.pop_front().unwrap_or(0);
                self.interrupt();
            }
            COMMAND_PORT => *first = self.status(),
            _ => {}
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let &[value] = data else { return };
        match offset {
            DATA_PORT => self.data(value),
            COMMAND_PORT => self.command(value),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    use super::*;
    use crate::legacy::recorder;

    pub(super) fn controller() -> (I8042, std::sync::Arc<std::sync::Mutex<Vec<PowerEvent>>>) {
        let (sink, events) = recorder();
        (
            I8042::new(sink, EventFd::new(EFD_NONBLOCK).unwrap()),
            events,
        )
    }

    fn read(device: &mut I8042, port: u64) -> u8 {
        let mut data = [0];
        device.read(port, &mut data);
        data[0]
    }

    fn drain(device: &mut I8042) -> Vec<u8> {
        let mut bytes = Vec::new();
        while read(device, COMMAND_PORT) & STATUS_OUTPUT_FULL != 0 {
            bytes.push(read(device, DATA_PORT));
        }
        bytes
    }

    #[test]
    fn the_reset_command_resets() {
        let (mut device, events) = controller();
        device.write(COMMAND_PORT, &[COMMAND_RESET_CPU]);
        assert_eq!(*events.lock().unwrap(), [PowerEvent::Reset]);
    }

    #[test]
    fn the_self_tests_and_the_keyboard_answer() {
        let (mut device, _) = controller();
        device.write(COMMAND_PORT, &[COMMAND_SELF_TEST]);
        assert_eq!(drain(&mut device), [SELF_TEST_PASSED]);
        device.write(COMMAND_PORT, &[COMMAND_WRITE_CONTROL]);
        device.write(DATA_PORT, &[CONTROL_SYSTEM]);
        device.write(COMMAND_PORT, &[COMMAND_READ_CONTROL]);
        assert_eq!(drain(&mut device), [CONTROL_SYSTEM | CONTROL_AUX_DISABLED]);
        device.write(DATA_PORT, &[KEYBOARD_GET_ID]);
        assert_eq!(
            drain(&mut device),
            [KEYBOARD_ACK, KEYBOARD_ID[0], KEYBOARD_ID[1]]
        );
    }

    #[test]
    fn ctrl_alt_del_interrupts_for_every_byte_and_is_not_typed_twice() {
        let (mut device, _) = controller();
        assert!(device.type_ctrl_alt_del());
        assert!(!device.type_ctrl_alt_del());
        device.irqfd.read().unwrap();
        for expected in CTRL_ALT_DEL {
            assert_eq!(read(&mut device, DATA_PORT), expected);
        }
        assert_eq!(device.irqfd.read().unwrap(), CTRL_ALT_DEL.len() as u64 - 1);
        assert!(device.type_ctrl_alt_del());
    }

    #[test]
    fn no_interrupt_where_the_driver_turned_it_off() {
        let (mut device, _) = controller();
        device.write(COMMAND_PORT, &[COMMAND_WRITE_CONTROL]);
        device.write(DATA_PORT, &[0]);
        device.write(COMMAND_PORT, &[COMMAND_SELF_TEST]);
        assert!(device.irqfd.read().is_err());
    }

    proptest! {
        #[test]
        fn any_sequence_of_accesses_keeps_the_output_bounded(
            accesses in prop::collection::vec((0..8u64, any::<bool>(), prop::collection::vec(any::<u8>(), 0..5)), 0..200)
        ) {
            let (mut device, _) = controller();
            for (offset, is_write, mut data) in accesses {
                if is_write { device.write(offset, &data) } else { device.read(offset, &mut data) }
                prop_assert!(device.output.len() <= OUTPUT_CAPACITY);
            }
        }
    }
}
