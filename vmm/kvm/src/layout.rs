//! The layout of guest physical memory and of the I/O port bus.
//!
//! ```text
//! 0x0000_0000  RAM: boot structures (GDT, zero page or PVH start info, page tables, command line)
//! 0x0009_fc00  end of low RAM
//! 0x000e_0000  ACPI tables (reserved, backed by RAM)
//! 0x0010_0000  RAM: kernel; the initrd at the end of RAM below the hole
//! 0xc000_0000  MMIO hole: virtio-mmio devices, IOAPIC, local APICs, KVM's own pages
//! 0x1_0000_0000  RAM beyond 3 GiB; above it the windows of pmem devices
//! ```

use config::limits::MAX_VIRTIO_DEVICES;

/// GDT of the boot vCPU.
pub const BOOT_GDT: u64 = 0x500;
/// IDT of the boot vCPU (empty).
pub const BOOT_IDT: u64 = 0x520;
/// `hvm_start_info` of the PVH boot protocol; its module list and memory map follow it.
pub const PVH_START_INFO: u64 = 0x6000;
/// `boot_params` (the zero page) of the Linux boot protocol.
pub const ZERO_PAGE: u64 = 0x7000;
/// Page tables of the boot vCPU: PML4, PDPT, PD, a page each.
pub const BOOT_PAGE_TABLES: u64 = 0x9000;
/// The kernel command line.
pub const CMDLINE: u64 = 0x2_0000;
/// End of RAM below the EBDA.
pub const LOW_RAM_END: u64 = 0x9_fc00;
/// ACPI tables, RSDP first.
pub const ACPI_START: u64 = 0xe_0000;
/// The vmclock page: the tables end before it.
pub const VM_CLOCK: u64 = 0xf_e000;
/// The generation ID of the VM, 16 bytes.
pub const VM_GENERATION_ID: u64 = 0xf_f000;
/// Where a CPU starts after a reset, in real mode.
pub const RESET_VECTOR: u64 = 0xf_fff0;
/// End of the ACPI area.
pub const ACPI_END: u64 = 0x10_0000;
/// Start of RAM above the first MiB; kernels load here or higher.
pub const HIGH_RAM_START: u64 = 0x10_0000;

/// Size in bytes of the huge pages that RAM may be in, and of which its regions are multiples then.
pub const HUGETLBFS_PAGE: u64 = 2 << 20;

/// Start of the hole in RAM below 4 GiB.
pub const MMIO_HOLE_START: u64 = 0xc000_0000;
/// End of the hole.
pub const MMIO_HOLE_END: u64 = 0x1_0000_0000;
/// The alignment of memory beside RAM, that is of each window: huge pages can map it, and no memory block of the
/// guest's kernel has both RAM and a window in it.
pub const WINDOW_ALIGNMENT: u64 = 1 << 30;
/// First virtio-mmio device; each takes [`VIRTIO_MMIO_SIZE`] bytes.
pub const VIRTIO_MMIO_START: u64 = 0xc000_1000;
/// Size in bytes of the register window of a virtio-mmio device.
pub const VIRTIO_MMIO_SIZE: u64 = 0x1000;
/// The IOAPIC of KVM's irqchip.
pub const IOAPIC: u32 = 0xfec0_0000;
/// The local APIC of each vCPU.
pub const LOCAL_APIC: u32 = 0xfee0_0000;
/// KVM's identity map page (`KVM_SET_IDENTITY_MAP_ADDR`).
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;
/// KVM's three TSS pages (`KVM_SET_TSS_ADDR`).
pub const KVM_TSS: u64 = 0xfffb_d000;

/// COM1.
pub const SERIAL_PORT: u16 = 0x3f8;
/// GSI of COM1.
pub const SERIAL_GSI: u32 = 4;
/// Data port of the i8042; the command port is 0x64.
pub const I8042_PORT: u16 = 0x60;
/// GSI of the i8042 keyboard.
pub const I8042_GSI: u32 = 1;
/// GSI of the event device that notifies of a new generation ID, and of the change of the vmclock page with it. It is
/// the GSI of COM2, which guests do not have.
pub const GENERATION_GSI: u32 = 3;
/// Index port of the CMOS RTC; the data port follows.
pub const RTC_PORT: u16 = 0x70;
/// pvpanic (ACPI `QEMU0001`): the guest reports that it panicked.
pub const PVPANIC_PORT: u16 = 0x505;
/// Sleep control, sleep status and reset registers of hardware-reduced ACPI: three one-byte ports
/// (the FADT of `boot::acpi` names them).
pub const ACPI_PM_PORT: u16 = 0x600;
/// The boot timer: the guest reports that it has booted. On a PC, this port is the floppy controller's.
pub const BOOT_TIMER_PORT: u16 = 0x3f0;
/// GSIs for virtio-mmio devices, in order of use.
pub const VIRTIO_GSIS: [u32; MAX_VIRTIO_DEVICES] = [
    5, 6, 7, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23,
];
