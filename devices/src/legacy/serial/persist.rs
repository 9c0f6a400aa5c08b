//! A serial port, saved and restored.

use std::sync::atomic::Ordering;

use serde::{Deserialize, Serialize};
use vm_superio::Trigger;
use vm_superio::serial::SerialState as UartState;

use super::{KIND, SerialConsole, Uart};
use crate::persist::{RestoreError, invalid};

/// Bytes of input that the UART's buffer has room for.
const FIFO_SIZE: usize = 64;
/// Interrupt enable register: received data, and transmitter empty.
const ENABLE_RECEIVED: u8 = 1 << 0;
const ENABLE_TRANSMITTER_EMPTY: u8 = 1 << 1;
/// The bits of the interrupt enable register that there are.
const ENABLE_BITS: u8 = 0x0f;
/// Interrupt identification register.
const NONE_PENDING: u8 = 1 << 0;
const PENDING_TRANSMITTER_EMPTY: u8 = 1 << 1;
const PENDING_RECEIVED: u8 = 1 << 2;

/// The registers of the UART, and input that the guest has not read. What the guest has written is not here: it is with the host before the
/// guest's vCPU goes on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SerialState {
    /// Divisor latch, low byte.
    pub baud_divisor_low: u8,
    /// Divisor latch, high byte.
    pub baud_divisor_high: u8,
    /// Interrupt enable register.
    pub interrupt_enable: u8,
    /// Interrupt identification register: what is pending.
    pub interrupt_identification: u8,
    /// Line control register.
    pub line_control: u8,
    /// Line status register.
    pub line_status: u8,
    /// Modem control register.
    pub modem_control: u8,
    /// Modem status register.
    pub modem_status: u8,
    /// Scratch register.
    pub scratch: u8,
    /// Input that the guest has not read.
    pub input: Vec<u8>,
}

/// Whether the UART holds its line up.
fn is_pending(state: &UartState) -> bool {
    [
        (ENABLE_RECEIVED, PENDING_RECEIVED),
        (ENABLE_TRANSMITTER_EMPTY, PENDING_TRANSMITTER_EMPTY),
    ]
    .into_iter()
    .any(|(enabled, pending)| {
        state.interrupt_enable & enabled != 0 && state.interrupt_identification & pending != 0
    })
}

impl SerialConsole {
    /// The port's state, while no vCPU runs; see [`crate::persist`]. Input that comes later is not part of it.
    pub(crate) fn save_state(&self) -> SerialState {
        let uart = self.uart.lock().state();
        SerialState {
            baud_divisor_low: uart.baud_divisor_low,
            baud_divisor_high: uart.baud_divisor_high,
            interrupt_enable: uart.interrupt_enable,
            interrupt_identification: uart.interrupt_identification,
            line_control: uart.line_control,
            line_status: uart.line_status,
            modem_control: uart.modem_control,
            modem_status: uart.modem_status,
            scratch: uart.scratch,
            input: uart.in_buffer,
        }
    }

    /// Takes over the state, instead of what the port has been used for before. What is pending may be raised here already; whether the VM hears
    /// of that is not certain.
    ///
    /// # Errors
    /// [`RestoreError::Invalid`]; the port is then as it was.
    pub(crate) fn restore_state(&self, state: &SerialState) -> Result<(), RestoreError> {
        if state.input.len() > FIFO_SIZE {
            let (len, reason) = (state.input.len() as u64, "it is more than the port holds");
            return Err(invalid(KIND.name, "the length of the input", len, reason));
        }
        let enabled = state.interrupt_enable;
        if enabled & !ENABLE_BITS != 0 {
            let reason = "it has unknown bits";
            return Err(invalid(KIND.name, "interrupt enable", enabled, reason));
        }
        let pending = state.interrupt_identification;
        let known = PENDING_TRANSMITTER_EMPTY | PENDING_RECEIVED;
        if pending != NONE_PENDING && (pending == 0 || pending & !known != 0) {
            let reason = "it names no interrupt of a serial port";
            return Err(invalid(
                KIND.name,
                "interrupt identification",
                pending,
                reason,
            ));
        }
        let registers = UartState {
            baud_divisor_low: state.baud_divisor_low,
            baud_divisor_high: state.baud_divisor_high,
            interrupt_enable: enabled,
            interrupt_identification: pending,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            in_buffer: state.input.clone(),
        };
        let mut uart = self.uart.lock();
        let (irqfd, drained) = (uart.interrupt_evt().clone(), uart.events().clone());
        // Input that is too long is refused above, and there is no other error.
        *uart = Uart::from_state(&registers, irqfd, drained, Vec::new()).map_err(|_| {
            invalid(
                KIND.name,
                "the length of the input",
                registers.in_buffer.len() as u64,
                "the port refuses it",
            )
        })?;
        self.restored.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// Raises the interrupt again that was pending in the restored state.
    pub(super) fn raise_pending(&self) {
        let uart = self.uart.lock();
        if is_pending(&uart.state()) {
            let Ok(()) = uart.interrupt_evt().trigger();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::super::tests::port;
    use super::*;
    use crate::bus::BusDevice;
    use crate::persist::through_json;

    const DATA: u64 = 0;
    const INTERRUPT_ENABLE: u64 = 1;
    const INTERRUPT_IDENTIFICATION: u64 = 2;
    const SCRATCH: u64 = 7;

    #[test]
    fn input_that_was_not_read_and_its_interrupt_go_on_in_the_restored_port() {
        let (mut saved, console, ..) = port();
        saved.write(INTERRUPT_ENABLE, &[ENABLE_RECEIVED]);
        saved.write(SCRATCH, &[0x5a]);
        assert_eq!(console.input(b"ls"), 2);
        let state = through_json(&console.save_state());

        let (mut restored, console, mut reader, irqfd, drained) = port();
        console.restore_state(&state).unwrap();
        assert_eq!(console.save_state(), state);
        let _ = irqfd.read();
        console.raise_pending();
        assert_eq!(irqfd.read().unwrap(), 1);
        let mut read = |register| {
            let mut data = [0];
            restored.read(register, &mut data);
            data[0]
        };
        assert_eq!(read(INTERRUPT_IDENTIFICATION) & 0xf, PENDING_RECEIVED);
        assert_eq!([read(DATA), read(DATA), read(SCRATCH)], *b"ls\x5a");
        assert!(drained.read().is_ok(), "there is room for input");
        console.raise_pending();
        assert!(irqfd.read().is_err(), "nothing is pending");
        restored.write(DATA, b"!");
        let mut seen = [0];
        reader.read_exact(&mut seen).unwrap();
        assert_eq!(seen, *b"!");
    }

    type Change = fn(&mut SerialState);

    #[test]
    fn a_state_that_no_port_can_have_is_refused() {
        let (_, console, ..) = port();
        let good = console.save_state();
        let changes: [(&str, Change); 5] = [
            ("length of the input", |state| {
                state.input = vec![0; FIFO_SIZE + 1];
            }),
            ("interrupt enable", |state| state.interrupt_enable = 0x10),
            ("interrupt identification", |state| {
                state.interrupt_identification = 0;
            }),
            ("interrupt identification", |state| {
                state.interrupt_identification = 8;
            }),
            ("interrupt identification", |state| {
                state.interrupt_identification = 3;
            }),
        ];
        for (field, change) in changes {
            let mut bad = good.clone();
            change(&mut bad);
            let error = console.restore_state(&bad).unwrap_err();
            assert!(error.to_string().contains(field), "{error}");
            assert_eq!(console.save_state(), good);
        }
        let full = SerialState {
            input: vec![b'x'; FIFO_SIZE],
            ..good
        };
        console.restore_state(&full).unwrap();
        assert_eq!(console.input(b"y"), 0);
    }
}
