//! The virtual machine as KVM sees it: memory slots, interrupt controllers, vCPUs.
//!
//! ```text
//! Vm::new ── register_irqfd, register_ioevent, memory ──> Vm::start ──> Vcpus: pause <─> resume ── stop
//! ```

use std::fs::File;
use std::os::fd::{FromRawFd, IntoRawFd};
use std::sync::{Arc, OnceLock};

use devices::GuestMemory;
use devices::bus::Bus;
use kvm_bindings::{
    KVM_API_VERSION, KVM_PIT_SPEAKER_DUMMY, kvm_pit_config, kvm_regs, kvm_sregs,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, VmFd};
use vmm_sys_util::errno;
use vmm_sys_util::eventfd::EventFd;

use config::limits::MAX_VCPUS;

use crate::layout::{KVM_IDENTITY_MAP, KVM_TSS};

mod cpuid;
mod exits;
mod memory;
mod pmu;
mod slots;
mod state;
mod threads;
mod vcpu;

#[cfg(test)]
mod native_kvm;

pub use exits::{ExitCounters, ExitKind};
pub use memory::HugePages;
#[cfg(test)]
pub(crate) use memory::shared as shared_memory;
pub use slots::{DirtyLog, PlacedWindow, WindowAccess};
pub use state::{StateError, VcpuState, VmState};
pub use threads::{Brake, Held, Vcpus};
pub use vcpu::{VcpuError, VcpuExit};

/// Gives away what the calling thread does not need.
pub type ConfineThread = fn() -> std::io::Result<()>;

/// Size and shape of a VM.
#[derive(Clone, Copy, Debug)]
pub struct VmSettings {
    /// Guest RAM in bytes, a multiple of 4 KiB.
    pub memory_bytes: u64,
    /// vCPUs, 1 to 32.
    pub vcpus: u8,
    /// How RAM is backed.
    pub huge_pages: HugePages,
    /// Called by each vCPU's thread before its vCPU enters the guest, to give away what a vCPU does not need; an error ends the guest.
    pub confine_vcpu: ConfineThread,
}

/// The port I/O and memory-mapped I/O of a VM.
pub struct Buses {
    /// I/O ports.
    pub pio: Bus,
    /// Guest physical addresses outside RAM.
    pub mmio: Bus,
}

/// Why a VM cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// `/dev/kvm` cannot be opened.
    #[error("cannot open /dev/kvm: {0}; {advice}", advice = open_advice(*.0))]
    Open(errno::Error),
    /// An API that no kernel since 2007 speaks.
    #[error("KVM speaks API version {0}, not 12")]
    ApiVersion(i32),
    /// The host's KVM lacks a capability.
    #[error("the host's KVM lacks {0}; a newer kernel has it")]
    Capability(&'static str),
    /// Too few or too many vCPUs.
    #[error("a guest has 1 to {MAX_VCPUS} vCPUs, not {0}")]
    Vcpus(u8),
    /// A size of RAM that cannot be.
    #[error(
        "guest RAM of {size:#x} bytes: it has to be a multiple of 4 KiB from {min:#x} to {max:#x}"
    )]
    MemorySize {
        /// Asked for, in bytes.
        size: u64,
        /// Least, in bytes.
        min: u64,
        /// Most, in bytes.
        max: u64,
    },
    /// The host does not map the RAM.
    #[error("cannot map {size:#x} bytes of guest RAM: {source}")]
    MapMemory {
        /// Asked for, in bytes.
        size: u64,
        /// What the host said.
        source: std::io::Error,
    },
    /// Memory beside RAM that the guest has no addresses for.
    #[error(
        "the guest's addresses, of {bits} bits, have no room for {size:#x} bytes above its RAM"
    )]
    WindowSize {
        /// Asked for, in bytes.
        size: u64,
        /// Bits of a guest physical address.
        bits: u32,
    },
    /// More CPUID leaves than KVM takes.
    #[error("CPUID of {0} leaves is longer than KVM takes")]
    CpuidTooLong(usize),
    /// KVM does not let an MSR be set.
    #[error("KVM refuses to set MSR {0:#x}")]
    Msr(u32),
    /// A KVM request failed.
    #[error("{request} failed: {source}")]
    Kvm {
        /// The ioctl or system call.
        request: &'static str,
        /// What the kernel said.
        source: errno::Error,
    },
    /// The host starts no more threads.
    #[error("cannot start the thread of vCPU {index}: {source}")]
    Thread {
        /// Number of the vCPU.
        index: u8,
        /// What the host said.
        source: std::io::Error,
    },
}

impl VmError {
    fn kvm(request: &'static str) -> impl FnOnce(errno::Error) -> Self {
        move |source| Self::Kvm { request, source }
    }
}

/// What to do where `/dev/kvm` cannot be opened.
pub fn open_advice(error: errno::Error) -> &'static str {
    match error.errno() {
        libc::ENOENT | libc::ENODEV | libc::ENXIO => {
            "load kvm_amd or kvm_intel; if that fails, enable virtualization in the firmware, or nesting in the hypervisor below"
        }
        libc::EACCES | libc::EPERM => "add yourself to the group kvm, and log in again",
        _ => "see dmesg for what KVM says",
    }
}

/// What the VM cannot do without.
pub const REQUIRED_CAPABILITIES: [(Cap, &str); 7] = [
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
];

/// KVM, opened before the process lost the right to.
static KEPT: OnceLock<File> = OnceLock::new();

/// Opens KVM for later, for a process that is about to become a user who may not. Where this user may not either, that is told later.
pub fn keep_kvm_open() {
    if let Ok(kvm) = File::options().read(true).write(true).open("/dev/kvm") {
        KEPT.get_or_init(|| kvm);
    }
}

fn open_kvm() -> Result<Kvm, VmError> {
    match KEPT.get().map(File::try_clone) {
        Some(Ok(kvm)) => {
            // SAFETY: the descriptor is of /dev/kvm, and nobody else knows this copy of it.
            Ok(unsafe { Kvm::from_raw_fd(kvm.into_raw_fd()) })
        }
        Some(Err(_)) | None => Kvm::new().map_err(VmError::Open),
    }
}

/// What tells the CPU of a guest with so many vCPUs from that of a guest elsewhere.
///
/// # Errors
/// `Open`, and `Kvm` and `CpuidTooLong` where KVM does not tell.
pub fn cpu_model(vcpus: u8) -> Result<Vec<u8>, VmError> {
    let kvm = open_kvm()?;
    cpuid::Template::of_host(&kvm, vcpus)?.digest()
}

/// A virtual machine whose vCPUs do not run yet.
pub struct Vm {
    fd: Arc<VmFd>,
    memory: GuestMemory,
    windows: slots::Windows,
    cpuid: cpuid::Template,
    has_pit: bool,
    vcpus: Vec<vcpu::Vcpu>,
    /// Its state is that of another, which has run.
    restored: bool,
    confine_vcpu: ConfineThread,
}

impl Vm {
    /// Makes the VM: RAM, irqchip, and vCPUs as after reset.
    pub fn new(settings: VmSettings) -> Result<Self, VmError> {
        let VmSettings {
            memory_bytes,
            vcpus,
            huge_pages,
            confine_vcpu,
        } = settings;
        if !(1..=MAX_VCPUS).contains(&vcpus) {
            return Err(VmError::Vcpus(vcpus));
        }
        let kvm = open_kvm()?;
        if u32::try_from(kvm.get_api_version()) != Ok(KVM_API_VERSION) {
            return Err(VmError::ApiVersion(kvm.get_api_version()));
        }
        for (capability, name) in REQUIRED_CAPABILITIES {
            if !kvm.check_extension(capability) {
                return Err(VmError::Capability(name));
            }
        }
        let memory = memory::map(memory_bytes, huge_pages)?;
        let cpuid = cpuid::Template::of_host(&kvm, vcpus)?;
        let fd = kvm.create_vm().map_err(VmError::kvm("KVM_CREATE_VM"))?;
        // Intel hosts without unrestricted guest need pages of their own; both lie in the hole.
        fd.set_identity_map_address(KVM_IDENTITY_MAP)
            .map_err(VmError::kvm("KVM_SET_IDENTITY_MAP_ADDR"))?;
        fd.set_tss_address(KVM_TSS as usize)
            .map_err(VmError::kvm("KVM_SET_TSS_ADDR"))?;
        fd.create_irq_chip()
            .map_err(VmError::kvm("KVM_CREATE_IRQCHIP"))?;
        if !cpuid.tsc_deadline {
            create_pit(&fd)?;
        }
        pmu::disable(&fd)?;
        let msrs = state::msrs_to_save(&kvm)?;
        add_slots(&fd, &memory)?;
        let mut made = Vec::with_capacity(vcpus.into());
        for index in 0..vcpus {
            let vcpu_fd = fd
                .create_vcpu(index.into())
                .map_err(VmError::kvm("KVM_CREATE_VCPU"))?;
            let of_vcpu = cpuid.for_vcpu(index)?;
            vcpu_fd
                .set_cpuid2(&of_vcpu)
                .map_err(VmError::kvm("KVM_SET_CPUID2"))?;
            let vcpu = vcpu::Vcpu {
                fd: vcpu_fd,
                index,
                cpuid: of_vcpu,
                msrs: msrs.clone(),
                exits: Arc::default(),
            };
            vcpu.reset()?;
            made.push(vcpu);
        }
        Ok(Self {
            fd: Arc::new(fd),
            memory,
            windows: slots::Windows::default(),
            has_pit: !cpuid.tsc_deadline,
            cpuid,
            vcpus: made,
            restored: false,
            confine_vcpu,
        })
    }

    /// Guest RAM. The mapping lives as long as any clone of it.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Guest RAM, of which pages can be shared within `limits`. Called once: each answer keeps its own record of what is mapped.
    pub fn share(&self, limits: memshare::Limits) -> memshare::SharedMemory {
        memory::shared(&self.memory, limits)
    }

    /// A write to `event` raises `gsi`.
    pub fn register_irqfd(&self, event: &EventFd, gsi: u32) -> Result<(), VmError> {
        self.fd
            .register_irqfd(event, gsi)
            .map_err(VmError::kvm("KVM_IRQFD"))
    }

    /// A four-byte guest write of `value` at guest physical `address` signals `event` and does not exit.
    pub fn register_ioevent(
        &self,
        event: &EventFd,
        address: u64,
        value: u32,
    ) -> Result<(), VmError> {
        self.fd
            .register_ioevent(event, &IoEventAddress::Mmio(address), value)
            .map_err(VmError::kvm("KVM_IOEVENTFD"))
    }

    /// Starts the vCPUs: the first with `regs`, and with what `set_sregs` makes of its system registers; the others wait for it to
    /// start them.
    ///
    /// `on_exit` is called once, from a vCPU thread, when a vCPU ends the guest; it must not wait for the vCPUs.
    pub fn start(
        self,
        buses: Buses,
        regs: &kvm_regs,
        set_sregs: impl FnOnce(&mut kvm_sregs),
        on_exit: impl Fn(VcpuExit) + Send + Sync + 'static,
    ) -> Result<Vcpus, VmError> {
        if let Some(first) = self.vcpus.first() {
            first.enter_at(regs, set_sregs)?;
        }
        let vcpus = self.start_paused(buses, on_exit)?;
        vcpus.resume();
        Ok(vcpus)
    }

    /// Starts the vCPU threads of a guest that has its state from another; they stand still until [`Vcpus::resume`].
    ///
    /// `on_exit` is as for [`Vm::start`].
    pub fn start_paused(
        self,
        buses: Buses,
        on_exit: impl Fn(VcpuExit) + Send + Sync + 'static,
    ) -> Result<Vcpus, VmError> {
        let parts = threads::Parts {
            vm: self.fd,
            vcpus: self.vcpus,
            has_pit: self.has_pit,
            memory: (self.memory, self.windows.mapped),
            restored: self.restored,
            confine: self.confine_vcpu,
        };
        Vcpus::start(parts, buses, Box::new(on_exit))
    }
}

/// The PIT costs a kernel thread and ticks: only guests without TSC-deadline timer need it, to calibrate theirs.
fn create_pit(fd: &VmFd) -> Result<(), VmError> {
    let config = kvm_pit_config {
        flags: KVM_PIT_SPEAKER_DUMMY,
        ..Default::default()
    };
    fd.create_pit2(config)
        .map_err(VmError::kvm("KVM_CREATE_PIT2"))
}

fn add_slots(fd: &VmFd, memory: &GuestMemory) -> Result<(), VmError> {
    for (slot, guest_phys_addr, memory_size, userspace_addr) in memory::slots(memory) {
        let region = kvm_userspace_memory_region {
            slot,
            guest_phys_addr,
            memory_size,
            userspace_addr,
            flags: 0,
        };
        // SAFETY: the range is a whole mapping of `memory`, which the `Vm`, and after its start `Vcpus`, keeps mapped until no vCPU can
        // run. Slots and guest ranges come from a checked memory map and do not overlap.
        unsafe { fd.set_user_memory_region(region) }
            .map_err(VmError::kvm("KVM_SET_USER_MEMORY_REGION"))?;
    }
    Ok(())
}
