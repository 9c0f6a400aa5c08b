//! From a kernel file to a guest that can run: loads kernel, initrd and command line into guest memory, writes the
//! boot parameters and ACPI tables, and says with which registers the first vCPU starts.

pub mod acpi;

use std::path::PathBuf;

use devices::GuestMemory;
use kvm_bindings::{kvm_regs, kvm_sregs};
use vm_memory::GuestAddress;

/// What to boot.
#[derive(Clone, Debug)]
pub struct BootSource {
    /// ELF `vmlinux` or `bzImage`.
    pub kernel: PathBuf,
    /// Initial RAM file system.
    pub initrd: Option<PathBuf>,
    /// The kernel command line, complete.
    pub cmdline: String,
}

/// How the first vCPU enters the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EntryPoint {
    /// 64-bit Linux boot protocol (Linux, Documentation/arch/x86/boot.rst): long mode, `rsi` = zero page.
    Linux64 {
        /// First instruction, guest physical.
        rip: GuestAddress,
    },
    /// PVH (Xen, docs/misc/pvh.pandoc): 32-bit protected mode, no paging, `ebx` = start info.
    Pvh {
        /// First instruction, guest physical.
        rip: GuestAddress,
    },
}
