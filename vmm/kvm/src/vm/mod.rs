//! The virtual machine in KVM: memory slots, interrupt controllers, vCPUs.
//!
//! ```text
//! Vm::new ── register_irqfd, register_ioevent, memory ──> Vm::start ──> Vcpus: pause <─> resume ── stop
//! ```

use std::fs::File;
use std::os::fd::{FromRawFd, IntoRawFd};
use std::sync::{Arc, OnceLock};

use devices::GuestMemory;
use kvm_bindings::{
    KVM_API_VERSION, KVM_PIT_SPEAKER_DUMMY, kvm_pit_config, kvm_regs, kvm_sregs,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, VmFd};
use memshare::Window;
use vmm_sys_util::eventfd::EventFd;

use config::CpuConfig;
use config::limits::MAX_VCPUS;

use crate::layout::{KVM_IDENTITY_MAP, KVM_TSS};

mod clock;
mod cpu_template;
mod cpuid;
mod error;
mod exits;
mod lapic;
mod memory;
mod pmu;
mod settings;
mod slots;
mod state;
mod threads;
mod tsc_offset;
mod vcpu;

#[cfg(test)]
mod native_kvm;

pub use clock::{ClockError, ClockOnLoad};
pub use cpu_template::GuestCpu;
pub use error::{VmError, open_advice};
pub use exits::{ExitCounters, ExitKind};
pub use memory::HugePages;
#[cfg(test)]
pub(crate) use memory::shared as shared_memory;
pub use settings::{Buses, ConfineThread, VmSettings};
pub use slots::{DirtyLog, PlacedWindow, WindowAccess};
pub use state::{StateError, VcpuState, VmState};
pub use threads::{VcpuHold, VcpuHolder, Vcpus};
pub use vcpu::{VcpuError, VcpuExit};

/// The capabilities of KVM that a VM needs, with their names.
pub const REQUIRED_CAPABILITIES: [(Cap, &str); 7] = [
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
];

/// KVM, where it was opened before the process lost the right to open it.
static OPENED_EARLY: OnceLock<File> = OnceLock::new();

/// Opens KVM now, for a process that is about to become a user who may not open it. An error is not reported here, but
/// when a VM is made.
pub fn open_kvm_early() {
    if let Ok(kvm) = File::options().read(true).write(true).open("/dev/kvm") {
        OPENED_EARLY.get_or_init(|| kvm);
    }
}

fn open_kvm() -> Result<Kvm, VmError> {
    match OPENED_EARLY.get().map(File::try_clone) {
        Some(Ok(kvm)) => {
            // SAFETY: the descriptor is of /dev/kvm, and nobody else knows this copy of it.
            Ok(unsafe { Kvm::from_raw_fd(kvm.into_raw_fd()) })
        }
        Some(Err(_)) | None => Kvm::new().map_err(VmError::Open),
    }
}

/// A digest of the CPU that a guest with so many vCPUs has on this host, which distinguishes it from that of a guest on
/// another host.
///
/// # Errors
/// `Open`, and `Kvm` and `CpuidTooLong` where KVM does not report its CPUID.
pub fn cpu_model(vcpus: u8) -> Result<Vec<u8>, VmError> {
    let kvm = open_kvm()?;
    cpuid::CommonCpuid::of_host(&kvm, vcpus)?.digest()
}

/// A virtual machine whose vCPUs do not run yet.
pub struct Vm {
    fd: Arc<VmFd>,
    memory: GuestMemory,
    windows: slots::Windows,
    cpuid: cpuid::CommonCpuid,
    has_pit: bool,
    vcpus: Vec<vcpu::Vcpu>,
    /// Whether its state was restored, so that it has run before.
    restored: bool,
    confine_vcpu: ConfineThread,
}

impl Vm {
    /// Makes the VM: RAM, irqchip, and vCPUs as after reset.
    pub fn new(settings: VmSettings) -> Result<Self, VmError> {
        let VmSettings {
            memory_bytes,
            vcpus,
            smt,
            cpu,
            is_saved,
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
        let mut cpuid = cpuid::CommonCpuid::of_host(&kvm, vcpus)?;
        let template = if is_saved {
            cpu.saved_template(&cpuid.entries)
        } else {
            cpu.template(&cpuid.entries)?
        };
        check_capabilities(&kvm, &template)?;
        cpu_template::apply(&mut cpuid.entries, &template.cpuid_modifiers)?;
        cpuid.smt = smt;
        let memory = memory::map(memory_bytes, huge_pages)?;
        let fd = kvm.create_vm().map_err(VmError::kvm("KVM_CREATE_VM"))?;
        // Intel hosts without unrestricted guest need these pages of KVM's; both are in the hole.
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
        let msrs = state::msrs_to_save(&kvm, &template)?;
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
                host_tsc_khz: vcpu_fd.get_tsc_khz().ok(),
                fd: vcpu_fd,
                index,
                cpuid: of_vcpu,
                msrs: msrs.clone(),
                exits: Arc::default(),
            };
            vcpu.reset()?;
            if !is_saved {
                vcpu.apply_template(&template.msr_modifiers)?;
            }
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

    /// Guest RAM whose pages can be shared within `limits`. To be called once, because each value keeps its own table
    /// of what is mapped.
    pub fn share(&self, limits: memshare::Limits) -> memshare::SharedMemory {
        memory::shared(&self.memory, limits)
    }

    /// Places a window among the guest's addresses, after RAM and the windows before it.
    pub fn add_window(
        &mut self,
        window: Arc<Window>,
        access: WindowAccess,
    ) -> Result<PlacedWindow, VmError> {
        let physical_bits = self.cpuid.physical_bits();
        self.windows
            .add(&self.fd, (&self.memory, physical_bits), window, access)
    }

    /// Restores the saved state of a VM and of its vCPUs, whose clocks go on as `clock` says. The VM has not run yet.
    ///
    /// # Errors
    /// [`StateError`]; then the VM must not be started.
    pub fn restore(
        &mut self,
        state: &VmState,
        vcpus: &[VcpuState],
        clock: ClockOnLoad,
    ) -> Result<(), StateError> {
        state.restore(&self.fd, self.has_pit, (&mut self.vcpus, vcpus), clock)?;
        self.restored = true;
        Ok(())
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

    /// Starts the vCPUs: the first with `regs`, and with its system registers as `set_sregs` changes them. The others
    /// wait until the guest starts them.
    ///
    /// `on_exit` is called once, by the thread of a vCPU that ends the guest; it must not wait for the vCPUs.
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

    /// Starts the vCPU threads of a guest whose state was restored. They wait until [`Vcpus::resume`].
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

fn check_capabilities(kvm: &Kvm, template: &CpuConfig) -> Result<(), VmError> {
    let required = REQUIRED_CAPABILITIES.map(|(capability, name)| (capability as u32, name));
    cpu_template::check_capabilities(template, required, |number| {
        kvm.check_extension_raw(number.into()) > 0
    })
}

/// Creates the PIT. It costs a kernel thread and timer ticks, and only guests without TSC-deadline timer need it, to
/// calibrate their timer.
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
        // SAFETY: the range is a whole mapping of `memory`, which the `Vm`, and after its start `Vcpus`, keeps mapped
        // until no vCPU can run. Slots and guest ranges come from a checked memory map and do not overlap.
        unsafe { fd.set_user_memory_region(region) }
            .map_err(VmError::kvm("KVM_SET_USER_MEMORY_REGION"))?;
    }
    Ok(())
}
