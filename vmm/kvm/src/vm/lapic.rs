//! Registers of a local APIC, as KVM saves and restores them (`kvm_lapic_state`; Intel SDM volume 3, table 11-1).

use kvm_bindings::kvm_lapic_state;

/// Offsets of registers in the APIC's page.
pub(super) const LVT_TIMER: usize = 0x320;
pub(super) const LVT_LINT0: usize = 0x350;
pub(super) const LVT_LINT1: usize = 0x360;
const CURRENT_COUNT: usize = 0x390;
const DIVIDE_CONFIGURATION: usize = 0x3e0;

/// Bits 18:17 of [`LVT_TIMER`]: the mode; 0 is one-shot.
const TIMER_MODE: u32 = 3 << 17;

pub(super) fn register(lapic: &kvm_lapic_state, at: usize) -> u32 {
    u32::from_le_bytes(std::array::from_fn(|i| lapic.regs[at + i].cast_unsigned()))
}

pub(super) fn set_register(lapic: &mut kvm_lapic_state, at: usize, value: u32) {
    for (i, byte) in value.to_le_bytes().into_iter().enumerate() {
        lapic.regs[at + i] = byte.cast_signed();
    }
}

/// Brings a one-shot timer `ns` nanoseconds forward; one that was due by then is due at once. KVM's APIC counts a bus
/// cycle a nanosecond, divided as the guest has set it (SDM volume 3, 11.5.4).
///
/// A periodic timer keeps its phase: its next interrupt comes within a period in any case.
pub(super) fn advance_timer(lapic: &mut kvm_lapic_state, ns: u64) {
    let left = register(lapic, CURRENT_COUNT);
    if register(lapic, LVT_TIMER) & TIMER_MODE != 0 || left == 0 {
        return;
    }
    let divide = register(lapic, DIVIDE_CONFIGURATION);
    let shift = (((divide & 0b11) | ((divide & 0b1000) >> 1)) + 1) & 0b111;
    let gone = u32::try_from(ns >> shift).unwrap_or(u32::MAX);
    set_register(lapic, CURRENT_COUNT, left.saturating_sub(gone).max(1));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_one_shot_timer_is_nearer_by_the_time_that_has_gone_and_due_at_the_most() {
        let after = |mode: u32, divide: u32, count: u32, ns: u64| {
            let mut lapic = kvm_lapic_state::default();
            set_register(&mut lapic, LVT_TIMER, (mode << 17) | 0xec);
            set_register(&mut lapic, DIVIDE_CONFIGURATION, divide);
            set_register(&mut lapic, CURRENT_COUNT, count);
            advance_timer(&mut lapic, ns);
            register(&lapic, CURRENT_COUNT)
        };
        // Divisors of 1, 2, 16 and 128.
        for (divide, shift) in [(0b1011, 0), (0b0000, 1), (0b0011, 4), (0b1010, 7)] {
            assert_eq!(after(0, divide, 1000, 100 << shift), 900, "{divide:#b}");
        }
        assert_eq!(after(0, 0b1011, 1000, 1000), 1);
        assert_eq!(after(0, 0b1011, u32::MAX, u64::MAX), 1);
        assert_eq!(after(0, 0b1011, 0, 5), 0, "it is not armed");
        assert_eq!(after(1, 0b1011, 1000, 100), 1000, "periodic");
        assert_eq!(after(2, 0b1011, 1000, 100), 1000, "TSC-deadline");
    }
}
