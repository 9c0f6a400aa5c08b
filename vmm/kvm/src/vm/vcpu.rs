//! One vCPU: its state at reset, and the loop of its thread.

use std::sync::Arc;

use kvm_bindings::{CpuId, Msrs, kvm_lapic_state, kvm_msr_entry, kvm_regs, kvm_sregs};
use kvm_bindings::{KVM_SYSTEM_EVENT_CRASH, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN};
use kvm_ioctls::{VcpuExit as KvmExit, VcpuFd};
use vmm_sys_util::errno;

use host::exit::GuestEnd;
use host::report::chain;

use super::error::VmError;
use super::exits::{ExitCounters, ExitKind};
use super::lapic;
use super::settings::Buses;

/// Why a vCPU ends the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VcpuExit {
    /// A triple fault (`KVM_EXIT_SHUTDOWN`).
    TripleFault,
    /// The guest asked for power-off through KVM (`KVM_SYSTEM_EVENT_SHUTDOWN`).
    Shutdown,
    /// The guest asked for a reset through KVM.
    Reset,
    /// The guest reported a crash through KVM.
    Crash,
    /// The vCPU cannot go on.
    Failed(VcpuError),
}

impl From<VcpuExit> for GuestEnd {
    fn from(exit: VcpuExit) -> Self {
        match exit {
            VcpuExit::Shutdown => Self::PowerOff,
            VcpuExit::Reset => Self::Reset,
            VcpuExit::Crash => Self::Panic,
            VcpuExit::TripleFault => Self::TripleFault,
            VcpuExit::Failed(error) => Self::Failed(chain(&error).to_string()),
        }
    }
}

/// A vCPU cannot go on: a fault of the guest that KVM cannot emulate, or of the host.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum VcpuError {
    /// `KVM_RUN` failed.
    #[error("vCPU {index}: KVM_RUN failed")]
    Run {
        /// Number of the vCPU.
        index: u8,
        /// KVM's error.
        source: errno::Error,
    },
    /// The processor refused the vCPU's state (`KVM_EXIT_FAIL_ENTRY`).
    #[error(
        "vCPU {index}: the processor refused to enter the guest (reason {reason:#x}, rip {rip:#x})"
    )]
    Entry {
        /// Number of the vCPU.
        index: u8,
        /// `hardware_entry_failure_reason`.
        reason: u64,
        /// Instruction pointer of the guest.
        rip: u64,
    },
    /// KVM cannot emulate what the guest does (`KVM_EXIT_INTERNAL_ERROR`).
    #[error("vCPU {index}: KVM cannot emulate the guest (internal error {suberror}, rip {rip:#x})")]
    Internal {
        /// Number of the vCPU.
        index: u8,
        /// `internal.suberror` of `kvm_run`.
        suberror: u32,
        /// Instruction pointer of the guest.
        rip: u64,
    },
    /// An exit that this VM never asked for.
    #[error("vCPU {index}: unexpected exit {exit}")]
    Unexpected {
        /// Number of the vCPU.
        index: u8,
        /// KVM's name of the exit.
        exit: String,
    },
    /// The thread of the vCPU could not give up the rights that it does not need.
    #[error("vCPU {index}: no filter of system calls: {reason}")]
    Filter {
        /// Number of the vCPU.
        index: u8,
        /// The host's error.
        reason: String,
    },
    /// The thread of the vCPU panicked: a defect of this program.
    #[error("vCPU {index}: its thread panicked")]
    Panicked {
        /// Number of the vCPU.
        index: u8,
    },
}

/// How a call of [`Vcpu::run`] ended.
pub(super) enum Step {
    /// An access was served, and the vCPU can run again.
    Handled,
    /// A signal or `immediate_exit`: the vCPU is to leave the guest.
    Interrupted,
    /// The guest has ended.
    Ended(VcpuExit),
}

/// A vCPU that is not running. Owned by its thread once the VM starts.
pub(super) struct Vcpu {
    pub(super) fd: VcpuFd,
    pub(super) index: u8,
    /// What the guest sees of its CPU.
    pub(super) cpuid: CpuId,
    /// The MSRs that have to be saved.
    pub(super) msrs: Arc<[u32]>,
    /// The frequency of its TSC when it was made, which is that of the host's, where KVM reports it.
    pub(super) host_tsc_khz: Option<u32>,
    /// The counters of its exits.
    pub(super) exits: Arc<ExitCounters>,
}

/// The MSRs at boot, as firmware leaves them: fast string operations, and write-back as the default memory type.
const BOOT_MSRS: [(u32, u64); 11] = [
    (0x174, 0),         // IA32_SYSENTER_CS
    (0x175, 0),         // IA32_SYSENTER_ESP
    (0x176, 0),         // IA32_SYSENTER_EIP
    (0xc000_0081, 0),   // STAR
    (0xc000_0082, 0),   // LSTAR
    (0xc000_0083, 0),   // CSTAR
    (0xc000_0084, 0),   // SYSCALL_MASK
    (0xc000_0102, 0),   // KERNEL_GS_BASE
    (0x10, 0),          // IA32_TSC
    (0x1a0, 1),         // IA32_MISC_ENABLE: fast strings
    (0x2ff, 0x800 | 6), // IA32_MTRR_DEF_TYPE: enabled, write-back
];

/// Delivery mode `ExtINT` in bits 10:8.
const DELIVERY_EXTINT: u32 = 7 << 8;
/// Delivery mode NMI.
const DELIVERY_NMI: u32 = 4 << 8;
const DELIVERY_MASK: u32 = 7 << 8;

impl Vcpu {
    /// Sets MSRs and local APIC as firmware would leave them.
    pub(super) fn reset(&self) -> Result<(), VmError> {
        let entries = BOOT_MSRS.map(|(index, data)| kvm_msr_entry {
            index,
            data,
            ..Default::default()
        });
        let msrs = Msrs::from_entries(&entries).map_err(|_| VmError::Msr(0))?;
        let set = self
            .fd
            .set_msrs(&msrs)
            .map_err(VmError::kvm("KVM_SET_MSRS"))?;
        if let Some(refused) = BOOT_MSRS.get(set) {
            return Err(VmError::Msr(refused.0));
        }
        let mut state = self.fd.get_lapic().map_err(VmError::kvm("KVM_GET_LAPIC"))?;
        set_delivery(&mut state, lapic::LVT_LINT0, DELIVERY_EXTINT);
        set_delivery(&mut state, lapic::LVT_LINT1, DELIVERY_NMI);
        self.fd
            .set_lapic(&state)
            .map_err(VmError::kvm("KVM_SET_LAPIC"))
    }

    /// Puts the vCPU at the kernel's entry point.
    pub(super) fn enter_at(
        &self,
        regs: &kvm_regs,
        set_sregs: impl FnOnce(&mut kvm_sregs),
    ) -> Result<(), VmError> {
        let mut sregs = self.fd.get_sregs().map_err(VmError::kvm("KVM_GET_SREGS"))?;
        set_sregs(&mut sregs);
        self.fd
            .set_sregs(&sregs)
            .map_err(VmError::kvm("KVM_SET_SREGS"))?;
        self.fd.set_regs(regs).map_err(VmError::kvm("KVM_SET_REGS"))
    }

    fn rip(&self) -> u64 {
        self.fd.get_regs().map_or(0, |regs| regs.rip)
    }

    /// Runs the guest up to its next exit and serves that.
    pub(super) fn run(&mut self, buses: &Buses) -> Step {
        let index = self.index;
        let failed = |error| Step::Ended(VcpuExit::Failed(error));
        match self.fd.run() {
            Ok(KvmExit::IoIn(port, data)) => {
                self.exits.count(ExitKind::IoIn);
                let data = &raw mut *data;
                let size = element_size(&mut self.fd);
                // SAFETY: the bytes lie in the mapping of `fd`'s `kvm_run`, behind the structure itself. Nobody else
                // refers to them, and KVM writes them only in the next run of this vCPU, which `&mut self` holds back.
                for element in unsafe { &mut *data }.chunks_exact_mut(size) {
                    if !buses.pio.read(port.into(), element) {
                        element.fill(0xff);
                        tracing::trace!(port, "read of an unclaimed port");
                    }
                }
                Step::Handled
            }
            Ok(KvmExit::IoOut(port, data)) => {
                self.exits.count(ExitKind::IoOut);
                let data = &raw const *data;
                let size = element_size(&mut self.fd);
                // SAFETY: as for `IoIn`.
                for element in unsafe { &*data }.chunks_exact(size) {
                    if !buses.pio.write(port.into(), element) {
                        tracing::trace!(port, "write to an unclaimed port");
                    }
                }
                Step::Handled
            }
            Ok(KvmExit::MmioRead(address, data)) => {
                self.exits.count(ExitKind::MmioRead);
                if !buses.mmio.read(address, data) {
                    data.fill(0xff);
                    tracing::trace!(address, "read of an unclaimed address");
                }
                Step::Handled
            }
            Ok(KvmExit::MmioWrite(address, data)) => {
                self.exits.count(ExitKind::MmioWrite);
                if !buses.mmio.write(address, data) {
                    tracing::trace!(address, "write to an unclaimed address");
                }
                Step::Handled
            }
            Ok(KvmExit::Intr) => Step::Interrupted,
            Ok(KvmExit::Shutdown) => Step::Ended(VcpuExit::TripleFault),
            Ok(KvmExit::SystemEvent(event, _)) => Step::Ended(match event {
                KVM_SYSTEM_EVENT_SHUTDOWN => VcpuExit::Shutdown,
                KVM_SYSTEM_EVENT_RESET => VcpuExit::Reset,
                KVM_SYSTEM_EVENT_CRASH => VcpuExit::Crash,
                other => VcpuExit::Failed(VcpuError::Unexpected {
                    index,
                    exit: format!("system event {other}"),
                }),
            }),
            Ok(KvmExit::FailEntry(reason, _)) => failed(VcpuError::Entry {
                index,
                reason,
                rip: self.rip(),
            }),
            Ok(KvmExit::InternalError) => {
                let suberror = internal_suberror(&mut self.fd);
                failed(VcpuError::Internal {
                    index,
                    suberror,
                    rip: self.rip(),
                })
            }
            Ok(other) => failed(VcpuError::Unexpected {
                index,
                exit: format!("{other:?}"),
            }),
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => Step::Interrupted,
            Err(source) => failed(VcpuError::Run { index, source }),
        }
    }
}

fn set_delivery(lapic: &mut kvm_lapic_state, register: usize, delivery: u32) {
    let value = (lapic::register(lapic, register) & !DELIVERY_MASK) | delivery;
    lapic::set_register(lapic, register, value);
}

/// Bytes of each element of the port access that the last run ended with: a string instruction brings many in one exit,
/// all for the same port.
fn element_size(fd: &mut VcpuFd) -> usize {
    // SAFETY: the last exit was KVM_EXIT_IO, for which KVM fills this member of the union; any bits are a valid u8.
    let size = unsafe { fd.get_kvm_run().__bindgen_anon_1.io.size };
    usize::from(size).max(1)
}

fn internal_suberror(fd: &mut VcpuFd) -> u32 {
    // SAFETY: the last exit was KVM_EXIT_INTERNAL_ERROR, for which KVM fills this member of the union; any bits
    // are a valid u32.
    unsafe { fd.get_kvm_run().__bindgen_anon_1.internal.suberror }
}
