//! How fast a guest runs: the instructions a second of a loop in ring 0.
//!
//! There are hosts whose `/dev/kvm` opens and has all capabilities, but interprets the instructions of the guest's
//! kernel. Their speed gives them away: an interpreter executes a few million instructions a second, AMD-V or VT-x
//! billions, and AMD-V that is itself emulated (a guest in QEMU's TCG) some hundreds of millions. A stock distribution
//! kernel executes about five hundred million instructions before its first process starts: at less than [`LEAST`] a
//! second that takes minutes, and interpreters fail on the way.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use devices::bus::{Bus, BusDevice, BusRangeError};
use kvm_bindings::{kvm_regs, kvm_sregs};
use vm_memory::{Bytes, GuestAddress};

use super::check::Check;
use kvm::vm::{Buses, GuestCpu, HugePages, VcpuExit, Vm, VmError, VmSettings};

const NAME: &str = "guest_speed";
/// The least speed, in instructions a second, at which stock kernels start within seconds.
const LEAST: u64 = 50_000_000;

const MEMORY: u64 = 2 << 20;
const CODE: u64 = 0x1000;
const PORT: u8 = 0x10;
/// Rounds of the inner loop between two marks: few enough that an interpreter makes several marks in [`LIMIT`], enough
/// that the time of a mark's exit is negligible.
const ROUNDS: u32 = 100_000;
/// `mov`, the inner loop, `out`, `jmp`.
const INSTRUCTIONS_PER_MARK: u64 = 1 + 2 * ROUNDS as u64 + 2;
/// Marks after which the speed is known well enough.
const ENOUGH_MARKS: u32 = 500;
/// The measurement ends after this time, however few marks there are.
const LIMIT: Duration = Duration::from_secs(1);

pub(super) fn check() -> Check {
    let advice = "use a host with AMD-V or VT-x, or enable nested virtualization below this one";
    match measure() {
        Ok(speed) if speed >= LEAST => Check::ok(NAME, described(speed)),
        Ok(speed) => {
            let found = format!(
                "{}, too slow for stock kernels ({} needed): this KVM interprets its guests",
                described(speed),
                LEAST / 1_000_000
            );
            Check::fail(NAME, found, advice)
        }
        Err(error) => Check::fail(NAME, host::report::chain(&error).to_string(), advice),
    }
}

fn described(speed: u64) -> String {
    format!(
        "{}.{} million guest instructions a second",
        speed / 1_000_000,
        speed % 1_000_000 / 100_000
    )
}

/// Why the speed is not known.
#[derive(Debug, thiserror::Error)]
enum SpeedError {
    #[error("no guest can be made")]
    Vm(#[from] VmError),
    #[error(transparent)]
    Bus(#[from] BusRangeError),
    #[error("the guest's code cannot be written to its memory")]
    Memory(#[from] vm_memory::GuestMemoryError),
    #[error("the guest ended instead of running on: {0:?}")]
    Ended(VcpuExit),
    #[error("the guest did not run {INSTRUCTIONS_PER_MARK} instructions in {LIMIT:?}")]
    NoMark,
}

enum Event {
    Mark(Instant),
    Ended(VcpuExit),
}

/// The port that the guest writes to after each round of its loop.
struct Marks(Sender<Event>);

impl BusDevice for Marks {
    fn read(&mut self, _: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn write(&mut self, _: u64, _: &[u8]) {
        // The receiver is gone once the measurement is over.
        let _ = self.0.send(Event::Mark(Instant::now()));
    }
}

/// Runs the guest, and returns its speed in instructions a second.
fn measure() -> Result<u64, SpeedError> {
    let vm = Vm::new(VmSettings {
        memory_bytes: MEMORY,
        vcpus: 1,
        smt: false,
        cpu: GuestCpu::Host,
        is_saved: false,
        huge_pages: HugePages::Never,
        confine_vcpu: || Ok(()),
    })?;
    vm.memory().write_slice(&code(), GuestAddress(CODE))?;
    let (sender, events) = channel();
    let mut buses = Buses {
        pio: Bus::new(),
        mmio: Bus::new(),
    };
    let marks = Arc::new(Mutex::new(Marks(sender.clone())));
    buses.pio.insert(PORT.into(), 1, marks)?;
    let regs = kvm_regs {
        rip: CODE,
        rflags: 2,
        ..Default::default()
    };
    let deadline = Instant::now() + LIMIT;
    let _vcpus = vm.start(buses, &regs, flat_protected_mode, move |exit| {
        let _ = sender.send(Event::Ended(exit));
    })?;
    let mut first = None;
    let (mut last, mut rounds) = (deadline, 0);
    while rounds < ENOUGH_MARKS
        && let Some(at) = next_mark(&events, deadline)?
    {
        if first.is_none() {
            first = Some(at);
        } else {
            (last, rounds) = (at, rounds + 1);
        }
    }
    match first {
        Some(first) if rounds > 0 => Ok(rate(rounds, last.duration_since(first))),
        Some(_) | None => Err(SpeedError::NoMark),
    }
}

/// The time of the next mark; none when the deadline comes first.
fn next_mark(events: &Receiver<Event>, deadline: Instant) -> Result<Option<Instant>, SpeedError> {
    let left = deadline.saturating_duration_since(Instant::now());
    match events.recv_timeout(left) {
        Ok(Event::Mark(at)) => Ok(Some(at)),
        Ok(Event::Ended(exit)) => Err(SpeedError::Ended(exit)),
        Err(_) => Ok(None),
    }
}

fn rate(rounds: u32, elapsed: Duration) -> u64 {
    let instructions = u128::from(rounds) * u128::from(INSTRUCTIONS_PER_MARK);
    let rate = instructions * 1_000_000_000 / elapsed.as_nanos().max(1);
    u64::try_from(rate).unwrap_or(u64::MAX)
}

/// `start: mov ecx, ROUNDS; l: dec ecx; jnz l; out PORT, al; jmp start`
fn code() -> [u8; 12] {
    let [a, b, c, d] = ROUNDS.to_le_bytes();
    [0xb9, a, b, c, d, 0x49, 0x75, 0xfd, 0xe6, PORT, 0xeb, 0xf4]
}

fn flat_protected_mode(sregs: &mut kvm_sregs) {
    sregs.cr0 |= 1;
    sregs.cs.selector = 0;
    for segment in [&mut sregs.cs, &mut sregs.ds, &mut sregs.es, &mut sregs.ss] {
        (segment.base, segment.limit, segment.g, segment.db) = (0, u32::MAX, 1, 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_instructions_over_time() {
        assert_eq!(rate(10, Duration::from_secs(1)), 10 * INSTRUCTIONS_PER_MARK);
        assert_eq!(
            rate(1, Duration::from_millis(100)),
            10 * INSTRUCTIONS_PER_MARK
        );
        assert_eq!(
            rate(1, Duration::ZERO),
            INSTRUCTIONS_PER_MARK * 1_000_000_000
        );
        assert_eq!(
            described(2_149_999),
            "2.1 million guest instructions a second"
        );
    }
}

#[cfg(test)]
mod native_kvm {
    use super::*;

    #[test]
    fn the_loop_runs_until_it_is_measured() {
        let measured = measure();
        assert!(
            matches!(measured, Ok(1..) | Err(SpeedError::NoMark)),
            "{measured:?}"
        );
    }
}
