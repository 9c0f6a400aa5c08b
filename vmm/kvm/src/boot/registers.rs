//! The registers with which the first vCPU enters the kernel, and the tables in guest memory that they point to.

use devices::GuestMemory;
use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment, kvm_sregs};
use vm_memory::{Bytes, GuestAddress};

use super::error::BootError;
use crate::layout::{BOOT_GDT, BOOT_IDT, BOOT_PAGE_TABLES, PVH_START_INFO, ZERO_PAGE};

const CR0_PE: u64 = 1 << 0;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// Bit 1 of RFLAGS is always set; interrupts are off.
const RFLAGS: u64 = 1 << 1;

/// Selectors: the boot protocol names 0x10 for code and 0x18 for data (`__BOOT_CS`, `__BOOT_DS`).
const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;
const TSS_SELECTOR: u16 = 0x20;
/// Entries of the GDT, up to the IDT: two null ones, code and data. The task register is loaded, and neither protocol
/// reads its descriptor again.
const GDT_LEN: usize = 4;
const _: () = assert!(BOOT_GDT + GDT_LEN as u64 * 8 <= BOOT_IDT);

/// A page table entry that is present and writable; `PTE_LARGE` in a page directory makes it map 2 MiB.
const PTE_PRESENT_WRITABLE: u64 = 0b11;
const PTE_LARGE: u64 = 1 << 7;
const PAGE_TABLE_LEN: u64 = 4096;

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

/// How the first vCPU enters the kernel that [`super::load`] has loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BootState {
    pub(super) entry: EntryPoint,
}

impl BootState {
    /// General registers of the first vCPU.
    pub fn regs(&self) -> kvm_regs {
        match self.entry {
            EntryPoint::Linux64 { rip } => kvm_regs {
                rip: rip.0,
                rsi: ZERO_PAGE,
                rflags: RFLAGS,
                ..Default::default()
            },
            EntryPoint::Pvh { rip } => kvm_regs {
                rip: rip.0,
                rbx: PVH_START_INFO,
                rflags: RFLAGS,
                ..Default::default()
            },
        }
    }

    /// Sets segments, descriptor tables and control registers in the values that KVM has after reset.
    pub fn apply_sregs(&self, sregs: &mut kvm_sregs) {
        let long = matches!(self.entry, EntryPoint::Linux64 { .. });
        let code = segment(CODE_SELECTOR, SegmentKind::Code { long });
        let data = segment(DATA_SELECTOR, SegmentKind::Data);
        sregs.cs = code;
        for register in [
            &mut sregs.ds,
            &mut sregs.es,
            &mut sregs.fs,
            &mut sregs.gs,
            &mut sregs.ss,
        ] {
            *register = data;
        }
        sregs.tr = segment(TSS_SELECTOR, SegmentKind::BusyTss);
        sregs.gdt = kvm_dtable {
            base: BOOT_GDT,
            limit: (GDT_LEN * 8 - 1) as u16,
            ..Default::default()
        };
        sregs.idt = kvm_dtable {
            base: BOOT_IDT,
            limit: 0,
            ..Default::default()
        };
        if long {
            sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
            sregs.cr3 = BOOT_PAGE_TABLES;
            sregs.cr4 = CR4_PAE;
            sregs.efer = EFER_LME | EFER_LMA;
        } else {
            sregs.cr0 = CR0_PE | CR0_ET;
            sregs.cr4 = 0;
        }
    }

    /// Writes GDT, IDT and page tables to guest memory.
    pub(super) fn write_tables(&self, memory: &GuestMemory) -> Result<(), BootError> {
        let long = matches!(self.entry, EntryPoint::Linux64 { .. });
        let gdt: [u64; GDT_LEN] = [
            0,
            0,
            descriptor(&segment(CODE_SELECTOR, SegmentKind::Code { long })),
            descriptor(&segment(DATA_SELECTOR, SegmentKind::Data)),
        ];
        for (address, entry) in (BOOT_GDT..).step_by(8).zip(gdt) {
            memory
                .write_obj(entry, GuestAddress(address))
                .map_err(BootError::memory("GDT"))?;
        }
        memory
            .write_obj(0u64, GuestAddress(BOOT_IDT))
            .map_err(BootError::memory("IDT"))?;
        if long {
            write_identity_map(memory)
        } else {
            Ok(())
        }
    }
}

/// Maps the first GiB onto itself by 2 MiB pages: the kernel and its boot parameters are there, or it maps them itself
/// (boot protocol, "64-bit Boot Protocol": an identity map for the kernel, `boot_params` and command line).
fn write_identity_map(memory: &GuestMemory) -> Result<(), BootError> {
    let (pml4, pdpt, pd) = (
        BOOT_PAGE_TABLES,
        BOOT_PAGE_TABLES + PAGE_TABLE_LEN,
        BOOT_PAGE_TABLES + 2 * PAGE_TABLE_LEN,
    );
    let put = |address: u64, entry: u64| {
        memory
            .write_obj(entry, GuestAddress(address))
            .map_err(BootError::memory("page tables"))
    };
    put(pml4, pdpt | PTE_PRESENT_WRITABLE)?;
    put(pdpt, pd | PTE_PRESENT_WRITABLE)?;
    for page in 0..512 {
        put(
            pd + page * 8,
            (page << 21) | PTE_LARGE | PTE_PRESENT_WRITABLE,
        )?;
    }
    Ok(())
}

#[derive(Clone, Copy)]
enum SegmentKind {
    Code { long: bool },
    Data,
    BusyTss,
}

/// A flat segment (Intel SDM volume 3, 3.4.5): base 0, 4 GiB, accessed.
fn segment(selector: u16, kind: SegmentKind) -> kvm_segment {
    let flat = kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        present: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    match kind {
        SegmentKind::Code { long } => kvm_segment {
            type_: 0xb,
            l: long.into(),
            db: (!long).into(),
            ..flat
        },
        SegmentKind::Data => kvm_segment {
            type_: 0x3,
            db: 1,
            ..flat
        },
        SegmentKind::BusyTss => kvm_segment {
            type_: 0xb,
            s: 0,
            g: 0,
            limit: 0x67,
            ..flat
        },
    }
}

/// The segment as an entry of the GDT.
fn descriptor(segment: &kvm_segment) -> u64 {
    let limit = u64::from(if segment.g == 1 {
        segment.limit >> 12
    } else {
        segment.limit
    });
    let access =
        u64::from(segment.type_) | (u64::from(segment.s) << 4) | (u64::from(segment.present) << 7);
    let flags =
        (u64::from(segment.l) << 1) | (u64::from(segment.db) << 2) | (u64::from(segment.g) << 3);
    (limit & 0xffff) | (access << 40) | ((limit >> 16) << 48) | (flags << 52)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory() -> GuestMemory {
        GuestMemory::from_ranges(&[(GuestAddress(0), 2 << 20)]).unwrap()
    }

    #[test]
    fn the_64_bit_protocol_enters_in_long_mode_with_the_zero_page_in_rsi() {
        let state = BootState {
            entry: EntryPoint::Linux64 {
                rip: GuestAddress(0x100_0200),
            },
        };
        assert_eq!(
            (state.regs().rip, state.regs().rsi),
            (0x100_0200, ZERO_PAGE)
        );
        let mut sregs = kvm_sregs::default();
        state.apply_sregs(&mut sregs);
        assert_eq!(
            (
                sregs.cs.selector,
                sregs.cs.l,
                sregs.cs.db,
                sregs.ds.selector
            ),
            (0x10, 1, 0, 0x18)
        );
        assert_eq!(sregs.efer, EFER_LME | EFER_LMA);
        let memory = memory();
        state.write_tables(&memory).unwrap();
        let entry = |address| memory.read_obj::<u64>(GuestAddress(address)).unwrap();
        assert_eq!(entry(BOOT_GDT + 0x10), 0x00af_9b00_0000_ffff);
        assert_eq!(entry(BOOT_GDT + 0x18), 0x00cf_9300_0000_ffff);
        assert_eq!(entry(sregs.cr3), sregs.cr3 + 0x1003);
        assert_eq!(entry(sregs.cr3 + 0x2000 + 511 * 8), (511 << 21) | 0x83);
    }

    #[test]
    fn pvh_enters_in_flat_protected_mode_with_the_start_info_in_ebx() {
        let state = BootState {
            entry: EntryPoint::Pvh {
                rip: GuestAddress(0x100_0000),
            },
        };
        assert_eq!(
            (state.regs().rip, state.regs().rbx),
            (0x100_0000, PVH_START_INFO)
        );
        let mut sregs = kvm_sregs {
            efer: 0,
            ..Default::default()
        };
        state.apply_sregs(&mut sregs);
        assert_eq!(
            (sregs.cs.l, sregs.cs.db, sregs.cs.base, sregs.cs.limit),
            (0, 1, 0, u32::MAX)
        );
        assert_eq!(
            (sregs.cr0 & (CR0_PE | CR0_PG), sregs.cr4, sregs.efer),
            (CR0_PE, 0, 0)
        );
    }
}
