//! Why a VM cannot be made.

use vmm_sys_util::errno;

use config::CpuTemplate;
use config::limits::MAX_VCPUS;

use crate::layout::HUGETLBFS_PAGE;

/// Why a VM cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// `/dev/kvm` cannot be opened.
    #[error("cannot open /dev/kvm ({advice})", advice = open_advice(*.0))]
    Open(#[source] errno::Error),
    /// KVM has an API version that no kernel since 2007 has.
    #[error("KVM speaks API version {0}, not 12")]
    ApiVersion(i32),
    /// The host's KVM lacks a capability.
    #[error("the host's KVM lacks {0}; a newer kernel has it")]
    Capability(&'static str),
    /// The host's KVM lacks a capability that a CPU template asks for.
    #[error("cpu-config.kvm_capabilities: the host's KVM lacks capability {0}")]
    CapabilityNumber(u32),
    /// A static CPU template is for other processors.
    #[error(
        "machine-config.cpu_template: {template:?} is for processors {wanted} (vendor and version of CPUID), and this one is {present}"
    )]
    CpuTemplate {
        /// The template.
        template: CpuTemplate,
        /// The processors that it is for.
        wanted: String,
        /// The host's.
        present: String,
    },
    /// A CPU template changes a leaf that KVM does not support.
    #[error(
        "cpu-config.cpuid_modifiers: KVM supports no CPUID leaf {leaf:#x} with subleaf {subleaf:#x}"
    )]
    CpuidLeaf {
        /// The leaf.
        leaf: u32,
        /// The subleaf.
        subleaf: u32,
    },
    /// A CPU template changes an MSR that KVM does not let be read or written so.
    #[error("the CPU template (cpu-config.msr_modifiers, cpu_template): KVM refuses MSR {msr:#x}{}", value.map(|value| format!(" with the value {value:#x}")).unwrap_or_default())]
    TemplateMsr {
        /// The register.
        msr: u32,
        /// The value that it was to have; `None` where it cannot be read.
        value: Option<u64>,
    },
    /// Too few or too many vCPUs.
    #[error("a guest has 1 to {MAX_VCPUS} vCPUs, not {0}")]
    Vcpus(u8),
    /// Guest RAM cannot have this size.
    #[error(
        "guest RAM of {size:#x} bytes: it has to be a multiple of 4 KiB from {min:#x} to {max:#x}"
    )]
    MemorySize {
        /// The size that was requested, in bytes.
        size: u64,
        /// The smallest size, in bytes.
        min: u64,
        /// The largest size, in bytes.
        max: u64,
    },
    /// The host cannot map the RAM.
    #[error("cannot map {size:#x} bytes of guest RAM")]
    MapMemory {
        /// The size that was requested, in bytes.
        size: u64,
        /// The host's error.
        source: std::io::Error,
    },
    /// Guest RAM in huge pages cannot have this size.
    #[error(
        "guest RAM of {size:#x} bytes in huge pages (machine-config.huge_pages): it has to be a multiple of 2 MiB"
    )]
    HugePageSize {
        /// The size that was requested, in bytes.
        size: u64,
    },
    /// The host has not so many huge pages.
    #[error(
        "cannot set aside {} huge pages of 2 MiB for guest RAM (machine-config.huge_pages): reserve them on the host (vm.nr_hugepages), or let control groups give them (hugetlb.2MB.max); HugePages_Free and HugePages_Rsvd of /proc/meminfo say how many are left",
        size / HUGETLBFS_PAGE
    )]
    MapHugePages {
        /// The size that was requested, in bytes.
        size: u64,
        /// The host's error.
        source: std::io::Error,
    },
    /// The guest has no addresses for a window beside RAM.
    #[error(
        "the guest's addresses, of {bits} bits, have no room for {size:#x} bytes above its RAM"
    )]
    WindowSize {
        /// The size that was requested, in bytes.
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
    #[error("{request} failed")]
    Kvm {
        /// The ioctl or system call.
        request: &'static str,
        /// The kernel's error.
        source: errno::Error,
    },
    /// The host cannot start the thread of a vCPU.
    #[error("cannot start the thread of vCPU {index}")]
    Thread {
        /// Number of the vCPU.
        index: u8,
        /// The host's error.
        source: std::io::Error,
    },
}

impl VmError {
    pub(super) fn kvm(request: &'static str) -> impl FnOnce(errno::Error) -> Self {
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
