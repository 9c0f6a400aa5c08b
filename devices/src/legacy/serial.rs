//! COM1, a 16550A, and the host file that shows what the guest writes to it.
//!
//! The UART itself is vm-superio's. It sits behind its own lock, apart from the one of the bus, because writing to the
//! host may block (a terminal that is held, a pipe that nobody reads): the guest's vCPU then waits, as it would for a
//! slow line, but input, and with it the device thread, does not. [`SerialConsole::hang_up`] ends such a wait for good.
//!
//! Output beyond a limit, where there is one, is dropped, as with Firecracker: a vCPU that waited for tokens would keep
//! its guest from all else.

use std::convert::Infallible;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::Mutex;
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use vm_superio::serial::SerialEvents;
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::EventFd;

use crate::bus::BusDevice;
use crate::lifecycle::{Device, DeviceKind, MetricsGroup, StateKey, persist_by_type};
use crate::metrics::{Metric, Unit, add};
use crate::rate_limiter::{BucketLimits, TokenBucket, monotonic_now};

mod persist;

pub use persist::SerialState;

/// What is the same of all devices of this kind.
pub(crate) const KIND: DeviceKind = DeviceKind {
    name: "serial port",
    state: StateKey::One("serial"),
    metrics: Some(MetricsGroup {
        name: "uart",
        label: None,
    }),
};

/// What the port has done since it was made.
#[derive(Debug, Default)]
pub struct SerialMetrics {
    /// Output that was dropped because of the limit, in bytes.
    pub dropped_bytes: AtomicU64,
}

impl SerialMetrics {
    /// The values at this moment.
    pub fn describe(&self) -> Vec<Metric> {
        vec![
            Metric::counter(
                "uart_dropped",
                "Output of the serial console that was dropped because of its rate limit",
                &self.dropped_bytes,
            )
            .unit(Unit::Bytes)
            .field("rate_limiter_dropped_bytes"),
        ]
    }
}

/// Raises the GSI of the port.
#[derive(Clone)]
struct Irqfd(Arc<EventFd>);

impl Trigger for Irqfd {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        if let Err(error) = self.0.write(1) {
            tracing::debug!(error = %report::chain(&error), "serial irqfd write");
        }
        Ok(())
    }
}

/// Signals to the console that there is room for input again.
#[derive(Clone)]
struct Drained(Arc<EventFd>);

impl SerialEvents for Drained {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}
    fn in_buffer_empty(&self) {
        if let Err(error) = self.0.write(1) {
            tracing::debug!(error = %report::chain(&error), "serial drained event");
        }
    }
}

type Uart = Serial<Irqfd, Drained, Vec<u8>>;

/// The guest's side of COM1: eight ports.
pub struct SerialPort {
    uart: Arc<Mutex<Uart>>,
    out: OwnedFd,
    hang_up: Arc<OwnedFd>,
    hung_up: bool,
    limit: Option<TokenBucket>,
    metrics: Arc<SerialMetrics>,
}

/// The host's side of COM1. It is also what a machine pauses and saves: nobody holds it while the guest's side waits
/// for a slow reader.
#[derive(Clone)]
pub struct SerialConsole {
    uart: Arc<Mutex<Uart>>,
    hang_up: Arc<OwnedFd>,
    /// The registers are from a saved state: whether the VM knows of their interrupt is not certain.
    restored: Arc<AtomicBool>,
    metrics: Arc<SerialMetrics>,
}

/// The events of a serial port that its owner connects.
pub struct SerialInput {
    /// An irqfd of the port's GSI.
    pub irqfd: EventFd,
    /// Becomes readable when the guest has read all input.
    pub drained: EventFd,
}

impl SerialPort {
    /// Ports taken.
    pub const PORTS: u64 = 8;

    /// A port whose output goes to `out`, within a limit of bytes where there is one.
    ///
    /// # Errors
    /// Where the host has no file descriptor left.
    pub fn new(
        out: OwnedFd,
        limit: Option<BucketLimits>,
        events: SerialInput,
    ) -> io::Result<(Self, SerialConsole)> {
        let (irqfd, drained) = (Arc::new(events.irqfd), Arc::new(events.drained));
        let uart = Serial::with_events(Irqfd(irqfd), Drained(drained), Vec::new());
        let uart = Arc::new(Mutex::new(uart));
        let hang_up = Arc::new(eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?);
        let console = SerialConsole {
            uart: uart.clone(),
            hang_up: hang_up.clone(),
            restored: Arc::default(),
            metrics: Arc::default(),
        };
        let metrics = console.metrics.clone();
        let limit = limit.map(|limits| TokenBucket::new(limits, monotonic_now()));
        Ok((
            Self {
                uart,
                out,
                hang_up,
                hung_up: false,
                limit,
                metrics,
            },
            console,
        ))
    }

    /// Takes the tokens of so many bytes. Where they are not there, counts the bytes as dropped.
    fn is_within_limit(&mut self, bytes: u64) -> bool {
        let Some(bucket) = self.limit.as_mut().filter(|_| bytes > 0) else {
            return true;
        };
        let passes = bucket.try_take(bytes, monotonic_now());
        if !passes {
            add(&self.metrics.dropped_bytes, bytes);
        }
        passes
    }

    /// Writes to the host, and waits where the reader is slow. Drops all further output once there is no reader any
    /// more.
    fn transmit(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() && !self.hung_up {
            let mut ready = [
                PollFd::new(&self.out, PollFlags::OUT),
                PollFd::new(&self.hang_up, PollFlags::IN),
            ];
            match poll(&mut ready, None) {
                Ok(_) if !ready[1].revents().is_empty() => self.hung_up = true,
                Ok(_) => match rustix::io::write(&self.out, bytes) {
                    Ok(written) => bytes = &bytes[written..],
                    Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => {}
                    Err(error) => {
                        tracing::warn!(error = %report::chain(&error), "serial output is lost from here on");
                        self.hung_up = true;
                    }
                },
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => {
                    tracing::warn!(error = %report::chain(&error), "serial output is lost from here on");
                    self.hung_up = true;
                }
            }
        }
    }
}

impl BusDevice for SerialPort {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let (Ok(register), [value]) = (u8::try_from(offset), data) {
            *value = self.uart.lock().read(register);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let (Ok(register), &[value]) = (u8::try_from(offset), data) else {
            return;
        };
        let output = {
            let mut uart = self.uart.lock();
            // A full loopback buffer loses the byte, as the hardware does.
            let _ = uart.write(register, value);
            std::mem::take(uart.writer_mut())
        };
        if self.is_within_limit(output.len() as u64) {
            self.transmit(&output);
        }
    }
}

impl SerialConsole {
    /// Gives input to the guest; returns how many bytes the UART's buffer had room for.
    pub fn input(&self, bytes: &[u8]) -> usize {
        let mut uart = self.uart.lock();
        let room = uart.fifo_capacity().min(bytes.len());
        // The buffer has room for them all; in loopback mode the UART takes none of them.
        uart.enqueue_raw_bytes(&bytes[..room]).unwrap_or(0)
    }

    /// Output is dropped from now on, and a vCPU that waits to write goes on.
    pub fn hang_up(&self) {
        if let Err(error) = rustix::io::write(&self.hang_up, &1u64.to_ne_bytes()) {
            tracing::debug!(error = %report::chain(&error), "serial hang-up event");
        }
    }
}

impl Device for SerialConsole {
    persist_by_type!(KIND);

    fn resume(&mut self) {
        // Only the thread that pauses and resumes looks at it.
        if self.restored.swap(false, Ordering::Relaxed) {
            self.raise_pending();
        }
    }

    fn metrics(&self) -> Vec<Metric> {
        self.metrics.describe()
    }

    fn reset(&mut self) {
        let mut uart = self.uart.lock();
        *uart = Serial::with_events(
            uart.interrupt_evt().clone(),
            uart.events().clone(),
            Vec::new(),
        );
        self.restored.store(false, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    use super::*;

    const DATA: u64 = 0;
    const INTERRUPT_ENABLE: u64 = 1;

    pub(super) fn port() -> (SerialPort, SerialConsole, UnixStream, EventFd, EventFd) {
        limited_port(None)
    }

    fn limited_port(
        limit: Option<BucketLimits>,
    ) -> (SerialPort, SerialConsole, UnixStream, EventFd, EventFd) {
        let (out, reader) = UnixStream::pair().unwrap();
        let irqfd = EventFd::new(EFD_NONBLOCK).unwrap();
        let drained = EventFd::new(EFD_NONBLOCK).unwrap();
        let events = SerialInput {
            irqfd: irqfd.try_clone().unwrap(),
            drained: drained.try_clone().unwrap(),
        };
        let (port, console) = SerialPort::new(out.into(), limit, events).unwrap();
        (port, console, reader, irqfd, drained)
    }

    #[test]
    fn what_the_guest_writes_reaches_the_host() {
        let (mut port, _, mut reader, _, _) = port();
        for byte in b"login: " {
            port.write(DATA, &[*byte]);
        }
        let mut seen = [0; 7];
        reader.read_exact(&mut seen).unwrap();
        assert_eq!(&seen, b"login: ");
    }

    #[test]
    fn output_beyond_the_limit_is_dropped_and_counted() {
        // Nothing comes back within the life of the test.
        let limit = BucketLimits::new(5, 2, u64::MAX);
        let (mut port, console, mut reader, _, _) = limited_port(limit);
        for byte in b"login: root" {
            port.write(DATA, &[*byte]);
        }
        port.write(INTERRUPT_ENABLE, &[0]);
        drop(port);
        let mut seen = Vec::new();
        reader.read_to_end(&mut seen).unwrap();
        assert_eq!(seen, b"login: ");
        let [dropped] = &console.metrics()[..] else {
            panic!("one metric");
        };
        assert_eq!(dropped.value, crate::metrics::Value::Counter(4));
    }

    #[test]
    fn input_interrupts_fills_the_buffer_and_its_end_is_reported() {
        let (mut port, console, _reader, irqfd, drained) = port();
        port.write(INTERRUPT_ENABLE, &[1]);
        let accepted = console.input(&[b'x'; 1000]);
        assert!((1..1000).contains(&accepted), "the FIFO is bounded");
        assert_eq!(console.input(b"y"), 0);
        assert!(irqfd.read().is_ok());
        assert!(drained.read().is_err());
        for _ in 0..accepted {
            let mut data = [0];
            port.read(DATA, &mut data);
            assert_eq!(data, *b"x");
        }
        assert!(drained.read().is_ok());
        assert_eq!(console.input(b"y"), 1);
    }

    #[test]
    fn a_stalled_reader_stalls_the_writer_alone_until_the_line_hangs_up() {
        let (mut port, console, reader, _, _) = port();
        // The peer's buffer is full from here on.
        let mut filler = UnixStream::from(port.out.try_clone().unwrap());
        filler.set_nonblocking(true).unwrap();
        while filler.write(&[0; 4096]).is_ok() {}
        let writer = std::thread::spawn(move || port.write(DATA, b"z"));
        assert_eq!(console.input(b"y"), 1, "input goes on");
        console.hang_up();
        writer.join().unwrap();
        drop(reader);
    }

    #[test]
    fn a_reader_that_left_does_not_stop_the_guest() {
        let (mut port, _, reader, _, _) = port();
        drop(reader);
        port.write(DATA, b"a");
        port.write(DATA, b"b");
    }
}
