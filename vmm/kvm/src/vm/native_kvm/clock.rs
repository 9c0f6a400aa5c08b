//! Clocks and timers of guests that are saved and loaded.

use std::time::Duration;

use super::*;

const MEMORY: u64 = 4 << 20;
const MINUTE: u64 = 60_000_000_000;
/// How far clocks may be apart that were read one after the other, on a machine with other work.
const TOLERANCE: u64 = 2_000_000_000;

/// l: rdtsc; out PORT, eax; mov eax, edx; out PORT+4, eax; jmp l
const READ_TSC: [u8; 13] = [
    0x0f, 0x31, 0x66, 0xe7, 0x10, 0x66, 0x89, 0xd0, 0x66, 0xe7, 0x14, 0xeb, 0xf3,
];

/// A guest that was paused and saved.
struct Saved {
    memory: Vec<u8>,
    vm: VmState,
    vcpus: Vec<VcpuState>,
}

fn save(guest: &Running, memory: &GuestMemory) -> Saved {
    guest.vcpus.pause();
    let (vm, vcpus) = guest.vcpus.save().unwrap();
    let mut bytes = vec![0; MEMORY as usize];
    memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
    Saved {
        memory: bytes,
        vm,
        vcpus,
    }
}

/// Loads the guest, and lets it run.
fn load(saved: &Saved, clock: ClockOnLoad) -> Running {
    let mut vm = vm(1, MEMORY);
    let memory = vm.memory();
    memory.write_slice(&saved.memory, GuestAddress(0)).unwrap();
    vm.restore(&saved.vm, &saved.vcpus, clock).unwrap();
    let (buses, accesses) = probed_buses();
    let (sender, exits) = channel();
    let sender = Mutex::new(sender);
    let on_exit = move |exit| sender.lock().unwrap().send(exit).unwrap();
    let vcpus = vm.start_paused(buses, on_exit).unwrap();
    vcpus.resume();
    Running {
        vcpus,
        accesses,
        exits,
    }
}

fn next(guest: &Running) -> Access {
    guest
        .accesses
        .recv_timeout(Duration::from_secs(20))
        .unwrap_or_else(|error| panic!("{error}: {:?}", guest.exits.try_recv()))
}

/// The TSC that the guest reads next.
fn tsc(guest: &Running) -> u64 {
    let word = |at: u64| {
        loop {
            if let Access::Write(offset, bytes) = next(guest)
                && offset == at
            {
                return u64::from(u32::from_le_bytes(bytes.try_into().unwrap()));
            }
        }
    };
    let low = word(0);
    low | (word(4) << 32)
}

/// A guest that reads its TSC, which was saved; what it read last; and its frequency in kHz.
fn saved_while_it_reads_its_tsc() -> (Saved, u64, u64) {
    let vm = vm(1, MEMORY);
    let khz = vm.vcpus[0].host_tsc_khz.expect("KVM reports a frequency");
    let memory = vm.memory().clone();
    let guest = run(vm, &READ_TSC, Mode::Real);
    tsc(&guest);
    let saved = save(&guest, &memory);
    while guest.accesses.try_recv().is_ok() {}
    guest.vcpus.resume();
    (saved, tsc(&guest), khz.into())
}

/// The states as versions saved them that knew no offset.
fn without_offset(vcpus: &[VcpuState]) -> Vec<VcpuState> {
    let mut states = serde_json::to_value(vcpus).unwrap();
    states[0].as_object_mut().unwrap().remove("tsc_offset");
    serde_json::from_value(states).unwrap()
}

/// Whether KVM has a TSC for each vCPU. Where it has not, records that the calling test does not run.
fn unless_tsc_is_settable() -> bool {
    let vm = vm(1, MEMORY);
    let vcpu = &vm.vcpus[0];
    let hour = 3600 * 1000 * u64::from(vcpu.host_tsc_khz.unwrap_or(u32::MAX));
    // A vCPU that was just made is at 0.
    let is_settable = vcpu.msr(0x10).is_some_and(|tsc| tsc < hour);
    if !is_settable {
        skip::because("this KVM gives guests the TSC of the host, and ignores what it is set to");
    }
    is_settable
}

#[test]
fn the_clock_of_a_loaded_guest_has_run_on_unless_it_is_kept() {
    let (mut saved, ..) = saved_while_it_reads_its_tsc();
    saved.vm.made_earlier_by(MINUTE);
    let before = saved.vm.clock_ns();
    for (wanted, expected) in [(ClockOnLoad::Follows, MINUTE), (ClockOnLoad::Kept, 0)] {
        let gone = load(&saved, wanted).vcpus.clock_ns() - before;
        assert!(gone.abs_diff(expected) < TOLERANCE, "{wanted:?}: {gone} ns");
    }
    saved.vm.forget_time();
    saved.vcpus = without_offset(&saved.vcpus);
    let gone = load(&saved, ClockOnLoad::Follows).vcpus.clock_ns() - before;
    assert!(gone < TOLERANCE, "a snapshot without a time: {gone} ns");
}

#[test]
fn the_tsc_of_a_loaded_guest_has_run_on_unless_it_is_kept() {
    if !unless_tsc_is_settable() {
        return;
    }
    let (mut saved, before, khz) = saved_while_it_reads_its_tsc();
    saved.vm.made_earlier_by(MINUTE);
    let without_offset = without_offset(&saved.vcpus);
    for vcpus in [std::mem::take(&mut saved.vcpus), without_offset] {
        saved.vcpus = vcpus;
        for (wanted, expected) in [(ClockOnLoad::Follows, MINUTE), (ClockOnLoad::Kept, 0)] {
            let now = tsc(&load(&saved, wanted));
            let gone = now.saturating_sub(before) * 1_000_000 / khz;
            assert!(gone.abs_diff(expected) < TOLERANCE, "{wanted:?}: {gone} ns");
        }
    }
}

#[test]
fn an_impossible_clock_is_refused() {
    let (mut saved, ..) = saved_while_it_reads_its_tsc();
    saved.vm.set_clock_ns(u64::MAX);
    for clock in [ClockOnLoad::Follows, ClockOnLoad::Kept] {
        let refused = vm(1, MEMORY).restore(&saved.vm, &saved.vcpus, clock);
        let refused = refused.unwrap_err();
        assert!(
            matches!(refused, StateError::Clock(ClockError::Impossible { .. })),
            "{refused}"
        );
    }
}

/// `mov ecx, msr; mov eax, value; wrmsr`, with EDX as it is.
fn wrmsr(msr: u32, value: u32) -> Vec<u8> {
    let mut code = vec![0x66, 0xb9];
    code.extend(msr.to_le_bytes());
    code.extend([0x66, 0xb8]);
    code.extend(value.to_le_bytes());
    code.extend([0x0f, 0x30]);
    code
}

const XOR_EDX_EDX: [u8; 3] = [0x66, 0x31, 0xd2];

/// A timer of the local APIC.
#[derive(Clone, Copy)]
enum Timer {
    /// It counts to 0, 128 ns at a time.
    OneShot { count: u32 },
    /// It is due at a time of the TSC, so many ticks later.
    Deadline { ticks: u64 },
}

/// Code that arms the timer, writes to PORT and waits. The vector of the interrupt is 0x40. The registers of the APIC
/// are those of x2APIC mode (SDM volume 3, table 11-6).
fn wait_for(timer: Timer) -> Vec<u8> {
    let mut code = vec![
        0xbc, 0x00, 0x80, // mov sp, 0x8000
        0x66, 0xb9, 0x1b, 0, 0, 0, 0x0f, 0x32, // mov ecx, IA32_APIC_BASE; rdmsr
        0x66, 0x0d, 0x00, 0x0c, 0, 0, 0x0f, 0x30, // or eax, enabled and x2APIC; wrmsr
    ];
    code.extend(XOR_EDX_EDX);
    code.extend(wrmsr(0x80f, 0x1ff)); // spurious-interrupt vector register: enabled
    match timer {
        Timer::OneShot { count } => {
            code.extend(wrmsr(0x832, 0x40));
            code.extend(wrmsr(0x83e, 0b1010));
            code.extend(wrmsr(0x838, count));
        }
        Timer::Deadline { ticks } => {
            code.extend(wrmsr(0x832, 0x4_0040));
            code.extend([0x0f, 0x31]); // rdtsc
            code.extend([0x66, 0x05]); // add eax, ticks
            code.extend((ticks as u32).to_le_bytes());
            code.extend([0x66, 0x81, 0xd2]); // adc edx, ticks >> 32
            code.extend(((ticks >> 32) as u32).to_le_bytes());
            code.extend([0x66, 0xb9, 0xe0, 0x06, 0, 0, 0x0f, 0x30]); // wrmsr to IA32_TSC_DEADLINE
        }
    }
    // sti; out PORT, al; l: hlt; jmp l
    code.extend([0xfb, 0xe6, 0x10, 0xf4, 0xeb, 0xfd]);
    code
}

/// out PORT+1, al; end of interrupt; iret
fn handler() -> Vec<u8> {
    let mut code = vec![0xe6, 0x11];
    code.extend(XOR_EDX_EDX);
    code.extend(wrmsr(0x80b, 0));
    code.push(0xcf);
    code
}

/// A timer that is due 40 s after the guest is saved fires once in a guest that is loaded a minute later, and has not
/// fired in one whose clock was kept.
fn is_due_once_where_the_clock_follows(timer: Timer) {
    const HANDLER: u16 = 0x2000;
    let source = vm(1, MEMORY);
    let memory = source.memory().clone();
    memory.write_obj(HANDLER, GuestAddress(0x40 * 4)).unwrap();
    memory
        .write_slice(&handler(), GuestAddress(HANDLER.into()))
        .unwrap();
    let guest = run(source, &wait_for(timer), Mode::Real);
    assert!(matches!(next(&guest), Access::Write(0, _)));
    let mut saved = save(&guest, &memory);
    assert!(guest.accesses.try_recv().is_err(), "the timer is not due");
    saved.vm.made_earlier_by(MINUTE);

    let kept = load(&saved, ClockOnLoad::Kept);
    let follows = load(&saved, ClockOnLoad::Follows);
    assert!(matches!(next(&follows), Access::Write(1, _)), "it fires");
    let more = follows.accesses.recv_timeout(Duration::from_millis(500));
    assert!(more.is_err(), "it fires twice: {more:?}");
    assert!(kept.accesses.try_recv().is_err(), "it is not due yet");
}

#[test]
fn a_one_shot_timer_that_was_due_meanwhile_fires_once() {
    let count = (40_000_000_000u64 / 128) as u32;
    is_due_once_where_the_clock_follows(Timer::OneShot { count });
}

#[test]
fn a_deadline_that_passed_meanwhile_fires_once() {
    if unless_tsc_is_settable() {
        let khz = vm(1, MEMORY).vcpus[0].host_tsc_khz.unwrap();
        let ticks = u64::from(khz) * 1000 * 40;
        is_due_once_where_the_clock_follows(Timer::Deadline { ticks });
    }
}
