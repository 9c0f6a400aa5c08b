//! The settings of a VM, and the buses that its vCPUs access.

use devices::bus::Bus;

use super::cpu_template::GuestCpu;
use super::memory::HugePages;

/// A function that gives up the rights that the calling thread does not need.
pub type ConfineThread = fn() -> std::io::Result<()>;

/// Size and shape of a VM.
#[derive(Clone, Debug)]
pub struct VmSettings {
    /// Guest RAM in bytes, a multiple of 4 KiB.
    pub memory_bytes: u64,
    /// vCPUs, 1 to 32.
    pub vcpus: u8,
    /// Whether each core has two threads.
    pub smt: bool,
    /// The CPU that the guest sees.
    pub cpu: GuestCpu,
    /// Whether the guest has run, and goes on from a state.
    pub is_saved: bool,
    /// How RAM is backed.
    pub huge_pages: HugePages,
    /// Called by each vCPU's thread before its vCPU enters the guest, to give up the rights that it does not need. An
    /// error ends the guest.
    pub confine_vcpu: ConfineThread,
}

/// The port I/O and memory-mapped I/O of a VM.
pub struct Buses {
    /// I/O ports.
    pub pio: Bus,
    /// Guest physical addresses outside RAM.
    pub mmio: Bus,
}
