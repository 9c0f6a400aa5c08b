//! The state of a guest in KVM: it is saved while the guest is paused, and restored into a VM that has not run.
//!
//! The order in which the parts of a vCPU are set matters (Linux Documentation/virt/kvm/api.rst): CPUID before all that
//! depends on features, the local APIC before the MSR of its deadline, and pending events last.

use std::sync::Arc;

use kvm_bindings::{
    CpuId, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, Msrs, kvm_clock_data,
    kvm_cpuid_entry2, kvm_debugregs, kvm_irqchip, kvm_lapic_state, kvm_mp_state, kvm_msr_entry,
    kvm_pit_state2, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Cap, Kvm, VmFd};
use serde::{Deserialize, Serialize};

use config::{CpuConfig, MsrModifier};

use host::report::chain;

use super::clock::{self, ClockError, ClockOnLoad, Moment};
use super::error::VmError;
use super::lapic;
use super::tsc_offset;
use super::vcpu::Vcpu;

/// Why the state of a guest cannot be saved or restored.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// A KVM request failed.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// A vCPU has ended.
    #[error("vCPU {0} has come to its end")]
    Ended(u8),
    /// The guest is a hypervisor, whose own guests have state in the processor.
    #[error(
        "vCPU {0} runs guests of its own (EFER.SVME or CR4.VMXE), whose state cannot be saved; unload kvm in the guest"
    )]
    Nested(u8),
    /// The guest has more floating-point state than can be saved.
    #[error(
        "vCPU state of {0} bytes (KVM_GET_XSAVE2) cannot be saved: more than 4096; hide AMX from the guest"
    )]
    Xsave(i32),
    /// The guest was saved on another processor.
    #[error("the guest was saved on another processor: {0}")]
    Processor(String),
    /// The state has another number of vCPUs than the guest.
    #[error("the state is of {saved} vCPUs, and the guest has {present}")]
    Vcpus {
        /// In the state.
        saved: usize,
        /// In the guest.
        present: usize,
    },
    /// The guest's clock cannot be restored.
    #[error(transparent)]
    Clock(#[from] ClockError),
    /// Either the state or the guest has a PIT, and the other has none.
    #[error("the state has {} PIT, and the guest has {}", if *.0 { "a" } else { "no" }, if *.0 { "none" } else { "one" })]
    Pit(bool),
}

/// The state of a VM in KVM, without its vCPUs.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmState {
    clock: kvm_clock_data,
    pic_master: kvm_irqchip,
    pic_slave: kvm_irqchip,
    ioapic: kvm_irqchip,
    /// Where the guest has one.
    pit: Option<kvm_pit_state2>,
}

/// The state of a vCPU in KVM.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VcpuState {
    cpuid: Vec<kvm_cpuid_entry2>,
    /// `None` where KVM does not report it.
    tsc_khz: Option<u32>,
    /// What its TSC is ahead of the host's, if both run at the same frequency. Absent where KVM does not report it, and
    /// in snapshots of versions that did not save it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    tsc_offset: Option<u64>,
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: kvm_xsave,
    xcrs: kvm_xcrs,
    debug_regs: kvm_debugregs,
    lapic: kvm_lapic_state,
    msrs: Vec<kvm_msr_entry>,
    events: kvm_vcpu_events,
}

const IA32_TSC: u32 = 0x10;
const IA32_TSC_DEADLINE: u32 = 0x6e0;
/// EFER.SVME (AMD64 APM volume 2, 3.1.7) and CR4.VMXE (SDM volume 3, 2.5).
const EFER_SVME: u64 = 1 << 12;
const CR4_VMXE: u64 = 1 << 13;

const XSAVE_BYTES: i32 = 4096;

/// The MSRs that have to be saved, by `KVM_GET_MSR_INDEX_LIST`, and those that a CPU template changes.
pub(super) fn msrs_to_save(kvm: &Kvm, template: &CpuConfig) -> Result<Arc<[u32]>, VmError> {
    let list = kvm
        .get_msr_index_list()
        .map_err(VmError::kvm("KVM_GET_MSR_INDEX_LIST"))?;
    let mut msrs = list.as_slice().to_vec();
    for modifier in &template.msr_modifiers {
        if !msrs.contains(&modifier.addr.0) {
            msrs.push(modifier.addr.0);
        }
    }
    Ok(msrs.into())
}

fn irqchip(fd: &VmFd, chip_id: u32) -> Result<kvm_irqchip, VmError> {
    let mut chip = kvm_irqchip {
        chip_id,
        ..Default::default()
    };
    fd.get_irqchip(&mut chip)
        .map_err(VmError::kvm("KVM_GET_IRQCHIP"))?;
    Ok(chip)
}

/// Refuses a VM whose vCPUs have more state than is saved.
pub(super) fn check_size(vm: &VmFd) -> Result<(), StateError> {
    match vm.check_extension_int(Cap::Xsave2) {
        bytes if bytes > XSAVE_BYTES => Err(StateError::Xsave(bytes)),
        _ => Ok(()),
    }
}

impl VmState {
    /// The state of a VM whose vCPUs are paused.
    pub(super) fn of(fd: &VmFd, has_pit: bool) -> Result<Self, VmError> {
        Ok(Self {
            clock: clock::save(fd)?,
            pic_master: irqchip(fd, KVM_IRQCHIP_PIC_MASTER)?,
            pic_slave: irqchip(fd, KVM_IRQCHIP_PIC_SLAVE)?,
            ioapic: irqchip(fd, KVM_IRQCHIP_IOAPIC)?,
            pit: has_pit
                .then(|| fd.get_pit2().map_err(VmError::kvm("KVM_GET_PIT2")))
                .transpose()?,
        })
    }
}

/// Feature bits of CPUID that a guest may have come to rely on: function, index, and the registers EAX to EDX that are
/// sets of features.
const FEATURE_LEAVES: [(u32, u32, [bool; 4]); 9] = [
    (0x1, 0, [false, false, true, true]),
    (0x7, 0, [false, true, true, true]),
    (0x7, 1, [true, false, false, true]),
    (0xd, 0, [true, false, false, true]),
    (0xd, 1, [true, false, true, true]),
    (0x4000_0001, 0, [true, false, false, false]),
    (0x8000_0001, 0, [false, false, true, true]),
    (0x8000_0007, 0, [false, false, false, true]),
    (0x8000_0008, 0, [false, true, false, false]),
];

/// Leaf 1 ECX, OSXSAVE: it follows CR4, so it is state and no feature. The other leaves have no such bits.
const OSXSAVE: u32 = 1 << 27;

fn words(entry: &kvm_cpuid_entry2) -> [u32; 4] {
    [entry.eax, entry.ebx, entry.ecx, entry.edx]
}

fn leaf(entries: &[kvm_cpuid_entry2], function: u32, index: u32) -> Option<[u32; 4]> {
    let found = entries
        .iter()
        .find(|entry| entry.function == function && entry.index == index);
    found.map(words)
}

/// What this host lacks of the CPU that a guest was saved on; `None` where the guest can go on here.
fn lacks(saved: &[kvm_cpuid_entry2], host: &[kvm_cpuid_entry2]) -> Option<String> {
    let vendor = |entries| leaf(entries, 0, 0).map(|[_, ebx, ecx, edx]| [ebx, edx, ecx]);
    let name = |words: Option<[u32; 3]>| {
        let bytes: Vec<u8> = words
            .iter()
            .flatten()
            .flat_map(|w| w.to_le_bytes())
            .collect();
        String::from_utf8_lossy(&bytes).into_owned()
    };
    let (theirs, ours) = (vendor(saved), vendor(host));
    if theirs != ours {
        return Some(format!(
            "of {:?}, and this is one of {:?}",
            name(theirs),
            name(ours)
        ));
    }
    for (function, index, registers) in FEATURE_LEAVES {
        let Some(saved) = leaf(saved, function, index) else {
            continue;
        };
        let host = leaf(host, function, index).unwrap_or_default();
        let names = ["EAX", "EBX", "ECX", "EDX"];
        for (((saved, host), is_set), name) in saved.into_iter().zip(host).zip(registers).zip(names)
        {
            let mut missing = saved & !host;
            if (function, name) == (0x1, "ECX") {
                missing &= !OSXSAVE;
            }
            if is_set && missing != 0 {
                return Some(format!(
                    "this one lacks the features {missing:#010x} of CPUID leaf {function:#x}.{index} {name}"
                ));
            }
        }
    }
    None
}

#[cfg(test)]
impl VmState {
    /// kvm-clock in nanoseconds.
    pub(super) fn clock_ns(&self) -> u64 {
        self.clock.clock
    }

    pub(super) fn set_clock_ns(&mut self, clock: u64) {
        self.clock.clock = clock;
    }

    /// Has it been saved `ns` nanoseconds before its time.
    pub(super) fn made_earlier_by(&mut self, ns: u64) {
        self.clock.realtime -= ns;
    }

    /// As it was saved by versions without a time.
    pub(super) fn forget_time(&mut self) {
        (self.clock.flags, self.clock.realtime) = (0, 0);
    }
}

impl VmState {
    /// Restores the saved state of a VM and of its vCPUs. The VM has not run yet.
    ///
    /// # Errors
    /// [`StateError`]; then the VM must not be started.
    pub(super) fn restore(
        &self,
        fd: &VmFd,
        has_pit: bool,
        (vcpus, states): (&mut [Vcpu], &[VcpuState]),
        clock: ClockOnLoad,
    ) -> Result<(), StateError> {
        if states.len() != vcpus.len() {
            return Err(StateError::Vcpus {
                saved: states.len(),
                present: vcpus.len(),
            });
        }
        if self.pit.is_some() != has_pit {
            return Err(StateError::Pit(self.pit.is_some()));
        }
        for (vcpu, state) in vcpus.iter().zip(states) {
            if let Some(lack) = lacks(&state.cpuid, vcpu.cpuid.as_slice()) {
                return Err(StateError::Processor(lack));
            }
        }
        // The timers of the vCPUs are relative to the clock.
        clock::restore(fd, &self.clock, clock)?;
        let saved = Moment::of(&self.clock);
        let gone = Moment::now(fd)?.since(saved);
        for (vcpu, state) in vcpus.iter_mut().zip(states) {
            vcpu.restore(state, gone)?;
        }
        let now = Moment::now(fd)?;
        for (vcpu, state) in vcpus.iter().zip(states) {
            vcpu.restore_tsc(state, saved, now)?;
        }
        for (vcpu, state) in vcpus.iter().zip(states) {
            vcpu.restore_events(state)?;
        }
        for chip in [&self.pic_master, &self.pic_slave, &self.ioapic] {
            fd.set_irqchip(chip)
                .map_err(VmError::kvm("KVM_SET_IRQCHIP"))?;
        }
        if let Some(pit) = &self.pit {
            fd.set_pit2(pit).map_err(VmError::kvm("KVM_SET_PIT2"))?;
        }
        Ok(())
    }
}

impl VcpuState {
    fn msr(&self, index: u32) -> Option<u64> {
        let found = self.msrs.iter().find(|entry| entry.index == index);
        found.map(|entry| entry.data)
    }
}

impl Vcpu {
    /// The state of a vCPU that is out of the guest, with its last access complete.
    pub(super) fn save(&self) -> Result<VcpuState, StateError> {
        let fd = &self.fd;
        let sregs = fd.get_sregs().map_err(VmError::kvm("KVM_GET_SREGS"))?;
        if sregs.efer & EFER_SVME != 0 || sregs.cr4 & CR4_VMXE != 0 {
            return Err(StateError::Nested(self.index));
        }
        // KVM_GET_MP_STATE also processes events that are about to change the state (an INIT or a start-up IPI), so it
        // comes first.
        let mp_state = fd
            .get_mp_state()
            .map_err(VmError::kvm("KVM_GET_MP_STATE"))?;
        let tsc_khz = fd.get_tsc_khz().ok();
        let is_hosts = tsc_khz.is_some() && tsc_khz == self.host_tsc_khz;
        let tsc_offset = is_hosts.then(|| tsc_offset::get(fd).ok()).flatten();
        Ok(VcpuState {
            cpuid: self.cpuid.as_slice().to_vec(),
            tsc_khz,
            tsc_offset,
            mp_state,
            regs: fd.get_regs().map_err(VmError::kvm("KVM_GET_REGS"))?,
            sregs,
            xsave: fd.get_xsave().map_err(VmError::kvm("KVM_GET_XSAVE"))?,
            xcrs: fd.get_xcrs().map_err(VmError::kvm("KVM_GET_XCRS"))?,
            debug_regs: fd
                .get_debug_regs()
                .map_err(VmError::kvm("KVM_GET_DEBUGREGS"))?,
            lapic: fd.get_lapic().map_err(VmError::kvm("KVM_GET_LAPIC"))?,
            msrs: self.msrs()?,
            events: fd
                .get_vcpu_events()
                .map_err(VmError::kvm("KVM_GET_VCPU_EVENTS"))?,
        })
    }

    /// All MSRs that can be read.
    fn msrs(&self) -> Result<Vec<kvm_msr_entry>, VmError> {
        let mut entries: Vec<kvm_msr_entry> = Vec::with_capacity(self.msrs.len());
        let mut left = &*self.msrs;
        while !left.is_empty() {
            let wanted: Vec<_> = left
                .iter()
                .map(|index| kvm_msr_entry {
                    index: *index,
                    ..Default::default()
                })
                .collect();
            let mut msrs = Msrs::from_entries(&wanted).map_err(|_| VmError::Msr(0))?;
            let got = self
                .fd
                .get_msrs(&mut msrs)
                .map_err(VmError::kvm("KVM_GET_MSRS"))?;
            entries.extend(msrs.as_slice().iter().take(got));
            // An MSR that is listed, and that this CPU does not have, ends the call, so the call is repeated behind it.
            left = left.get(got + 1..).unwrap_or_default();
        }
        let value = |wanted: u32| {
            let found = entries.iter().find(|entry| entry.index == wanted);
            found.map(|entry| entry.data)
        };
        // A deadline that has passed reads as 0, and its interrupt may not have reached the local APIC yet; KVM does
        // not report that. A deadline of now raises the interrupt again, which at worst is an early tick for the guest.
        if value(IA32_TSC_DEADLINE) == Some(0)
            && let Some(now) = value(IA32_TSC)
            && let Some(deadline) = entries
                .iter_mut()
                .find(|entry| entry.index == IA32_TSC_DEADLINE)
        {
            deadline.data = now;
        }
        Ok(entries)
    }

    /// Restores the state of a vCPU, which has not run yet and whose clock has gone on for `gone` nanoseconds since it
    /// was saved. Its TSC follows, and its events, which may depend on that.
    fn restore(&mut self, state: &VcpuState, gone: u64) -> Result<(), VmError> {
        self.cpuid = CpuId::from_entries(&state.cpuid)
            .map_err(|_| VmError::CpuidTooLong(state.cpuid.len()))?;
        let fd = &self.fd;
        fd.set_cpuid2(&self.cpuid)
            .map_err(VmError::kvm("KVM_SET_CPUID2"))?;
        if let Some(khz) = state.tsc_khz
            && fd.get_tsc_khz().ok() != Some(khz)
        {
            fd.set_tsc_khz(khz)
                .map_err(VmError::kvm("KVM_SET_TSC_KHZ"))?;
        }
        fd.set_mp_state(state.mp_state)
            .map_err(VmError::kvm("KVM_SET_MP_STATE"))?;
        fd.set_regs(&state.regs)
            .map_err(VmError::kvm("KVM_SET_REGS"))?;
        fd.set_sregs(&state.sregs)
            .map_err(VmError::kvm("KVM_SET_SREGS"))?;
        // SAFETY: KVM reads as many bytes as KVM_CAP_XSAVE2 returns for the VM. `check_size` refuses states of more
        // than the 4096 of the structure, and `Vm::new` asks for no feature that would make this VM's longer.
        unsafe { fd.set_xsave(&state.xsave) }.map_err(VmError::kvm("KVM_SET_XSAVE"))?;
        // A processor without XSAVE has no XCRs, and refuses to set any.
        if state.xcrs.nr_xcrs > 0 {
            fd.set_xcrs(&state.xcrs)
                .map_err(VmError::kvm("KVM_SET_XCRS"))?;
        }
        fd.set_debug_regs(&state.debug_regs)
            .map_err(VmError::kvm("KVM_SET_DEBUGREGS"))?;
        let mut lapic = state.lapic;
        lapic::advance_timer(&mut lapic, gone);
        fd.set_lapic(&lapic)
            .map_err(VmError::kvm("KVM_SET_LAPIC"))?;
        let is_timeless =
            |entry: &&kvm_msr_entry| !matches!(entry.index, IA32_TSC | IA32_TSC_DEADLINE);
        let msrs: Vec<_> = state.msrs.iter().filter(is_timeless).copied().collect();
        self.set_msrs(&msrs)
    }

    /// Has the TSC run on since it was saved for as long as the clock has until `now`.
    fn restore_tsc(&self, state: &VcpuState, saved: Moment, now: Moment) -> Result<(), VmError> {
        let at_save = state.tsc_offset.and_then(|offset| saved.tsc(offset));
        let Some(at_save) = at_save.or_else(|| state.msr(IA32_TSC)) else {
            return Ok(());
        };
        let khz = self.fd.get_tsc_khz().ok();
        let tsc = clock::advanced(at_save, khz.unwrap_or_default(), now.since(saved));
        // The offset is exact. A TSC that is written is late by the time until then, the same for all vCPUs, as KVM
        // takes such writes in succession for one.
        if khz.is_some()
            && khz == self.host_tsc_khz
            && let Some(offset) = now.offset(tsc)
        {
            match tsc_offset::set(&self.fd, offset) {
                Ok(()) => return Ok(()),
                Err(error) => tracing::debug!(error = %chain(&error), "KVM_VCPU_TSC_OFFSET"),
            }
        }
        self.set_msrs(&[kvm_msr_entry {
            index: IA32_TSC,
            data: tsc,
            ..Default::default()
        }])
    }

    /// Restores what is due at a time of the TSC, and what is pending.
    fn restore_events(&self, state: &VcpuState) -> Result<(), VmError> {
        if let Some(data) = state.msr(IA32_TSC_DEADLINE) {
            self.set_msrs(&[kvm_msr_entry {
                index: IA32_TSC_DEADLINE,
                data,
                ..Default::default()
            }])?;
        }
        self.fd
            .set_vcpu_events(&state.events)
            .map_err(VmError::kvm("KVM_SET_VCPU_EVENTS"))
    }

    /// Makes the changes that a CPU template asks for.
    ///
    /// # Errors
    /// `TemplateMsr`, `Kvm`.
    pub(super) fn apply_template(&self, modifiers: &[MsrModifier]) -> Result<(), VmError> {
        for MsrModifier { addr, bitmap } in modifiers {
            let refused = |value| VmError::TemplateMsr { msr: addr.0, value };
            let value = bitmap.apply(self.msr(addr.0).ok_or_else(|| refused(None))?);
            let entry = kvm_msr_entry {
                index: addr.0,
                data: value,
                ..Default::default()
            };
            self.set_msrs(&[entry]).map_err(|error| match error {
                VmError::Msr(_) => refused(Some(value)),
                other => other,
            })?;
        }
        Ok(())
    }

    fn set_msrs(&self, entries: &[kvm_msr_entry]) -> Result<(), VmError> {
        let mut left = entries;
        while !left.is_empty() {
            let msrs = Msrs::from_entries(left).map_err(|_| VmError::Msr(0))?;
            let set = self
                .fd
                .set_msrs(&msrs)
                .map_err(VmError::kvm("KVM_SET_MSRS"))?;
            let Some(refused) = left.get(set) else {
                break;
            };
            // An MSR that user space may not write (a feature register, for one) may have the saved value already.
            if self.msr(refused.index) != Some(refused.data) {
                return Err(VmError::Msr(refused.index));
            }
            left = left.get(set + 1..).unwrap_or_default();
        }
        Ok(())
    }

    pub(super) fn msr(&self, index: u32) -> Option<u64> {
        let entry = kvm_msr_entry {
            index,
            ..Default::default()
        };
        let mut msrs = Msrs::from_entries(&[entry]).ok()?;
        (self.fd.get_msrs(&mut msrs).ok()? == 1)
            .then(|| msrs.as_slice().first().map(|entry| entry.data))
            .flatten()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            eax,
            ebx,
            ecx,
            edx,
            ..Default::default()
        }
    }

    #[test]
    fn a_guest_goes_on_only_where_every_feature_is_that_it_saw() {
        let saved = [entry(0, [1, 2, 3, 4]), entry(1, [7, 7, 0b101 | OSXSAVE, 1])];
        assert_eq!(lacks(&saved, &saved), None);
        // Model, family and other values that are no features may differ, and so may OSXSAVE.
        let newer = [entry(0, [9, 2, 3, 4]), entry(1, [8, 9, 0b111, 3])];
        assert_eq!(lacks(&saved, &newer), None);
        let older = [entry(0, [1, 2, 3, 4]), entry(1, [7, 7, 0b001, 1])];
        let lack = lacks(&saved, &older).unwrap();
        assert!(
            lack.contains("0x00000004 of CPUID leaf 0x1.0 ECX"),
            "{lack}"
        );
        let other = [entry(0, [1, 0, 3, 4]), entry(1, [7, 7, 0b101, 1])];
        assert!(lacks(&saved, &other).unwrap().contains("this is one of"));
        // A leaf that the host does not have has no features.
        let none = [entry(0, [1, 2, 3, 4])];
        assert!(lacks(&saved, &none).is_some());
    }
}
