//! Hides performance counters from guests: they would measure neighbours as well, and a watchdog that uses them wakes
//! an idle guest.
//!
//! CPUID (leaf `0xa`) hides them on Intel. On AMD the first four are part of the architecture: KVM has to be configured
//! not to emulate them, and to make access to their MSRs fault; otherwise it writes a line to the host's log when a
//! kernel probes them.

use kvm_bindings::{KVM_CAP_PMU_CAPABILITY, KVM_PMU_CAP_DISABLE, kvm_enable_cap};
use kvm_ioctls::{Cap, MsrFilterDefaultAction, MsrFilterRange, MsrFilterRangeFlags, VmFd};

use super::error::VmError;

/// `PERF_LEGACY_CTL0` to `3`, then `PERF_LEGACY_CTR0` to `3` (AMD64 APM volume 2, appendix A).
const AMD_COUNTERS: u32 = 0xc001_0000;
const AMD_COUNTER_COUNT: u32 = 8;

/// A bit for each MSR, 0 to deny the access. KVM reads whole longs, although `MsrFilterRange` only needs the bytes for
/// the count.
static DENY: [u8; 8] = [0; 8];
const _: () = assert!(AMD_COUNTER_COUNT as usize <= DENY.len() * 8);

/// Disables the counters. To be called before the first vCPU is made.
pub(super) fn disable(vm: &VmFd) -> Result<(), VmError> {
    // The flag is absent in KVM before Linux 5.18, where hiding the counters has to be enough, and where KVM emulates
    // no counters on this host.
    let can = vm.check_extension_raw(KVM_CAP_PMU_CAPABILITY.into());
    if u32::try_from(can).is_ok_and(|flags| flags & KVM_PMU_CAP_DISABLE != 0) {
        let disable = kvm_enable_cap {
            cap: KVM_CAP_PMU_CAPABILITY,
            args: [KVM_PMU_CAP_DISABLE.into(), 0, 0, 0],
            ..Default::default()
        };
        vm.enable_cap(&disable)
            .map_err(VmError::kvm("KVM_ENABLE_CAP of KVM_CAP_PMU_CAPABILITY"))?;
    }
    if vm.check_extension(Cap::X86MsrFilter) {
        let deny = MsrFilterRange {
            flags: MsrFilterRangeFlags::READ | MsrFilterRangeFlags::WRITE,
            base: AMD_COUNTERS,
            msr_count: AMD_COUNTER_COUNT,
            bitmap: &DENY,
        };
        vm.set_msr_filter(MsrFilterDefaultAction::ALLOW, &[deny])
            .map_err(VmError::kvm("KVM_X86_SET_MSR_FILTER"))?;
    }
    Ok(())
}
