//! The boot parameters of the kernel: the zero page of the Linux boot protocol, or the start info of PVH. Both carry
//! the memory map, the command line, the initrd and the address of the RSDP.

use devices::GuestMemory;
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::loader::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use vm_memory::{Address, ByteValued, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::BootError;
use config::limits::CMDLINE_MAX;

use crate::layout::{
    ACPI_END, ACPI_START, CMDLINE, HIGH_RAM_START, LOW_RAM_END, PVH_START_INFO, ZERO_PAGE,
};

/// Types of the memory map (ACPI 6.5, 15): the same numbers in e820 and PVH.
const RAM: u32 = 1;
const ACPI_DATA: u32 = 3;

/// `boot_flag`, `header` and `type_of_loader` of a boot loader without an assigned number.
const BOOT_FLAG: u16 = 0xaa55;
const HEADER_MAGIC: u32 = 0x5372_6448;
const LOADER_UNDEFINED: u8 = 0xff;

/// `XEN_HVM_START_MAGIC_VALUE`.
const PVH_MAGIC: u32 = 0x336e_c578;
/// Version 1 of the start info has the memory map.
const PVH_VERSION: u32 = 1;
/// The module list and the memory map follow the start info, up to the zero page.
const PVH_MODULES: u64 = PVH_START_INFO + 0x40;
const PVH_MEMORY_MAP: u64 = PVH_START_INFO + 0x80;

/// An initrd in guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Initrd {
    pub(super) address: GuestAddress,
    /// Length in bytes.
    pub(super) len: u64,
}

/// Where the initrd and the ACPI tables are. Both protocols pass that to the kernel.
pub(super) struct BootInfo {
    pub(super) initrd: Option<Initrd>,
    pub(super) rsdp: GuestAddress,
}

/// A line of the memory map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct MapEntry {
    start: u64,
    len: u64,
    kind: u32,
}

/// The memory map of the guest. It leaves out the legacy area between 640 KiB and 1 MiB, except for the ACPI tables.
fn memory_map(memory: &GuestMemory) -> Vec<MapEntry> {
    let mut map = vec![
        MapEntry {
            start: 0,
            len: LOW_RAM_END,
            kind: RAM,
        },
        MapEntry {
            start: ACPI_START,
            len: ACPI_END - ACPI_START,
            kind: ACPI_DATA,
        },
    ];
    for region in memory.iter() {
        let start = region.start_addr().raw_value().max(HIGH_RAM_START);
        let end = region.start_addr().raw_value() + region.len();
        map.push(MapEntry {
            start,
            len: end - start,
            kind: RAM,
        });
    }
    map
}

/// Writes the command line.
///
/// # Errors
/// `CmdlineTooLong` past `max` bytes, `CmdlineZeroByte`.
pub(super) fn write_cmdline(
    memory: &GuestMemory,
    cmdline: &str,
    max: usize,
) -> Result<(), BootError> {
    let max = max.min(CMDLINE_MAX as usize - 1);
    if cmdline.len() > max {
        return Err(BootError::CmdlineTooLong {
            len: cmdline.len(),
            max,
        });
    }
    if let Some(at) = cmdline.bytes().position(|byte| byte == 0) {
        return Err(BootError::CmdlineZeroByte(at));
    }
    let end = GuestAddress(CMDLINE + cmdline.len() as u64);
    memory
        .write_slice(cmdline.as_bytes(), GuestAddress(CMDLINE))
        .map_err(BootError::memory("command line"))?;
    memory
        .write_obj(0u8, end)
        .map_err(BootError::memory("command line"))
}

/// Writes the zero page. `header` is the setup header of the bzImage, where the kernel comes from one.
pub(super) fn write_zero_page(
    memory: &GuestMemory,
    header: Option<setup_header>,
    cmdline_len: usize,
    boot: &BootInfo,
) -> Result<(), BootError> {
    let mut params = boot_params {
        hdr: header.unwrap_or_default(),
        ..Default::default()
    };
    params.hdr.boot_flag = BOOT_FLAG;
    params.hdr.header = HEADER_MAGIC;
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.cmd_line_ptr = CMDLINE as u32;
    params.hdr.cmdline_size = cmdline_len as u32;
    params.acpi_rsdp_addr = boot.rsdp.raw_value();
    if let Some(initrd) = boot.initrd {
        // The initrd lies below 4 GiB: it was placed below the hole.
        params.hdr.ramdisk_image = initrd.address.raw_value() as u32;
        params.hdr.ramdisk_size = initrd.len as u32;
    }
    for (slot, entry) in params.e820_table.iter_mut().zip(memory_map(memory)) {
        *slot = boot_e820_entry {
            addr: entry.start,
            size: entry.len,
            r#type: entry.kind,
        };
        params.e820_entries += 1;
    }
    memory
        .write_slice(params.as_slice(), GuestAddress(ZERO_PAGE))
        .map_err(BootError::memory("zero page"))
}

/// Writes the start info of PVH.
pub(super) fn write_pvh_start_info(memory: &GuestMemory, boot: &BootInfo) -> Result<(), BootError> {
    let map = memory_map(memory);
    let mut info = hvm_start_info {
        magic: PVH_MAGIC,
        version: PVH_VERSION,
        cmdline_paddr: CMDLINE,
        rsdp_paddr: boot.rsdp.raw_value(),
        memmap_paddr: PVH_MEMORY_MAP,
        memmap_entries: map.len() as u32,
        ..Default::default()
    };
    if let Some(initrd) = boot.initrd {
        let module = hvm_modlist_entry {
            paddr: initrd.address.raw_value(),
            size: initrd.len,
            ..Default::default()
        };
        memory
            .write_slice(module.as_slice(), GuestAddress(PVH_MODULES))
            .map_err(BootError::memory("PVH module list"))?;
        info.nr_modules = 1;
        info.modlist_paddr = PVH_MODULES;
    }
    let size = size_of::<hvm_memmap_table_entry>();
    for (address, entry) in (PVH_MEMORY_MAP..ZERO_PAGE).step_by(size).zip(map) {
        let entry = hvm_memmap_table_entry {
            addr: entry.start,
            size: entry.len,
            type_: entry.kind,
            ..Default::default()
        };
        memory
            .write_slice(entry.as_slice(), GuestAddress(address))
            .map_err(BootError::memory("PVH memory map"))?;
    }
    memory
        .write_slice(info.as_slice(), GuestAddress(PVH_START_INFO))
        .map_err(BootError::memory("PVH start info"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    fn memory() -> GuestMemory {
        let ranges = [
            (GuestAddress(0), 16 << 20),
            (GuestAddress(4 * GIB), 8 << 20),
        ];
        GuestMemory::from_ranges(&ranges).unwrap()
    }

    fn info() -> BootInfo {
        BootInfo {
            initrd: Some(Initrd {
                address: GuestAddress(0xf0_0000),
                len: 0x1234,
            }),
            rsdp: GuestAddress(ACPI_START),
        }
    }

    #[test]
    fn the_memory_map_names_ram_on_both_sides_of_the_hole_and_not_the_legacy_area() {
        let entry = |start, len, kind| MapEntry { start, len, kind };
        assert_eq!(
            memory_map(&memory()),
            [
                entry(0, LOW_RAM_END, RAM),
                entry(ACPI_START, 0x2_0000, ACPI_DATA),
                entry(1 << 20, 15 << 20, RAM),
                entry(4 * GIB, 8 << 20, RAM),
            ]
        );
    }

    #[test]
    fn the_zero_page_has_command_line_initrd_rsdp_and_memory_map() {
        let memory = memory();
        write_zero_page(&memory, None, 7, &info()).unwrap();
        let params: boot_params = memory.read_obj(GuestAddress(ZERO_PAGE)).unwrap();
        let (header, rsdp) = (params.hdr, params.acpi_rsdp_addr);
        let (image, size, cmdline) = (
            header.ramdisk_image,
            header.ramdisk_size,
            header.cmd_line_ptr,
        );
        assert_eq!(
            (image, size, cmdline, rsdp),
            (0xf0_0000, 0x1234, CMDLINE as u32, ACPI_START)
        );
        assert_eq!(params.e820_entries, 4);
    }

    #[test]
    fn the_pvh_start_info_has_command_line_initrd_rsdp_and_memory_map() {
        let memory = memory();
        write_pvh_start_info(&memory, &info()).unwrap();
        let info: hvm_start_info = memory.read_obj(GuestAddress(PVH_START_INFO)).unwrap();
        assert_eq!(
            (info.magic, info.nr_modules, info.memmap_entries),
            (PVH_MAGIC, 1, 4)
        );
        let module: hvm_modlist_entry = memory.read_obj(GuestAddress(info.modlist_paddr)).unwrap();
        assert_eq!((module.paddr, module.size), (0xf0_0000, 0x1234));
        let last: hvm_memmap_table_entry = memory
            .read_obj(GuestAddress(info.memmap_paddr + 3 * 24))
            .unwrap();
        assert_eq!((last.addr, last.type_), (4 * GIB, RAM));
    }

    #[test]
    fn command_lines_that_a_kernel_cannot_take_are_refused() {
        let memory = memory();
        write_cmdline(&memory, "console", 7).unwrap();
        let written: [u8; 8] = memory.read_obj(GuestAddress(CMDLINE)).unwrap();
        assert_eq!(&written, b"console\0");
        assert!(matches!(
            write_cmdline(&memory, "console=", 7),
            Err(BootError::CmdlineTooLong { len: 8, max: 7 })
        ));
        assert!(matches!(
            write_cmdline(&memory, "a\0b", 7),
            Err(BootError::CmdlineZeroByte(1))
        ));
    }
}
