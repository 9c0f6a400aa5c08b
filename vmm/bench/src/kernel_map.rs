//! Where the parts of a kernel are in guest memory, by the section headers of its ELF file.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, KnownLayout};

use kvm::boot::LoadSegment;

/// The most sections and bytes of names that are read: more than any kernel has.
const MAX_SECTIONS: u16 = 4096;
const MAX_NAMES: u64 = 1 << 20;
/// The fields of the ELF header for the section headers (System V ABI, chapter 4): `e_shoff`, and `e_shentsize` with
/// what follows it.
const SHOFF: u64 = 40;
const SHENTSIZE: u64 = 58;
const WRITE: u64 = 1;
const ALLOC: u64 = 2;

#[derive(FromBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Counts {
    entry_size: U16,
    count: U16,
    names: U16,
}

#[derive(FromBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Section {
    name: U32,
    kind: U32,
    flags: U64,
    address: U64,
    offset: U64,
    size: U64,
    link: U32,
    info: U32,
    align: U64,
    entry_size: U64,
}

/// A part of a kernel in guest memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Part {
    pub(super) name: String,
    /// Guest physical.
    pub(super) range: Range<u64>,
}

fn object<T: FromBytes>(file: &File, at: u64) -> Option<T> {
    let mut bytes = vec![0; size_of::<T>()];
    file.read_exact_at(&mut bytes, at).ok()?;
    T::read_from_bytes(&bytes).ok()
}

/// Linux on x86-64 maps its image here, from guest physical address 0 on, except for the per-CPU template
/// (`__START_KERNEL_map`).
const KERNEL_MAP: u64 = 0xffff_ffff_8000_0000;
/// Sections that are only used while the kernel boots.
const INIT: [&str; 11] = [
    ".init",
    ".exit",
    ".alt",
    ".parainstructions",
    ".retpoline_sites",
    ".return_sites",
    ".smp_locks",
    ".data_nosave",
    ".data..percpu",
    ".x86_cpu_dev",
    ".apicdrivers",
];
/// Sections that are not written to, whatever their flags say.
const READ_ONLY: [&str; 3] = [".rodata", "__modver", ".orc_unwind"];

/// The part of the kernel that a section belongs to, by Linux' names of sections.
fn class(name: &str, flags: u64) -> &'static str {
    let starts = |prefixes: &[&str]| prefixes.iter().any(|prefix| name.starts_with(prefix));
    if starts(&[".bss", ".brk"]) {
        "kernel bss"
    } else if starts(&INIT) {
        "kernel init, per-CPU template"
    } else if starts(&[".text"]) {
        "kernel text"
    } else if flags & WRITE != 0 && !starts(&READ_ONLY) {
        "kernel data"
    } else {
        "kernel rodata"
    }
}

/// The guest physical address of a section, if a segment loads it.
fn guest_address(section: &Section, segments: &[LoadSegment]) -> Option<u64> {
    // The offset of a section that is not in the file has no meaning, so its address is used.
    if let Some(address) = section.address.get().checked_sub(KERNEL_MAP) {
        return Some(address);
    }
    segments.iter().find_map(|segment| {
        let into = section.offset.get().checked_sub(segment.file_offset)?;
        (into < segment.file_len).then(|| segment.guest_address.0.checked_add(into))?
    })
}

/// The sections as (guest address, class), by address. `None` where there are none, or their headers are invalid.
fn sections(file: &File, segments: &[LoadSegment]) -> Option<Vec<(u64, &'static str)>> {
    let start: U64 = object(file, SHOFF)?;
    let counts: Counts = object(file, SHENTSIZE)?;
    let count = counts.count.get();
    if usize::from(counts.entry_size.get()) != size_of::<Section>() || count > MAX_SECTIONS {
        return None;
    }
    let header = |index: u16| {
        let at = start
            .get()
            .checked_add(u64::from(index) * size_of::<Section>() as u64)?;
        object::<Section>(file, at)
    };
    let names = header(counts.names.get())?;
    let mut text = vec![0; names.size.get().min(MAX_NAMES) as usize];
    file.read_exact_at(&mut text, names.offset.get()).ok()?;
    let mut found = Vec::new();
    for index in 0..count {
        let section = header(index)?;
        let flags = section.flags.get();
        if flags & ALLOC == 0 || section.size.get() == 0 {
            continue;
        }
        let name = text.get(section.name.get() as usize..)?;
        let name = name.split(|byte| *byte == 0).next()?;
        if let Some(address) = guest_address(&section, segments) {
            found.push((address, class(&String::from_utf8_lossy(name), flags)));
        }
    }
    found.sort_unstable();
    (!found.is_empty()).then_some(found)
}

/// The parts of a kernel, by address. Where the file has no sections, they are the segments that are loaded.
pub(super) fn parts(file: &File, segments: &[LoadSegment]) -> Vec<Part> {
    let sections = sections(file, segments).unwrap_or_default();
    let mut parts: Vec<Part> = Vec::new();
    for (number, segment) in (1..).zip(segments) {
        let start = segment.guest_address.0;
        let end = start.saturating_add(segment.mem_len);
        let inside: Vec<_> = sections
            .iter()
            .filter(|(at, _)| (start..end).contains(at))
            .collect();
        if inside.is_empty() {
            parts.push(Part {
                name: format!("kernel segment {number}"),
                range: start..end,
            });
        }
        for (index, (at, class)) in inside.iter().enumerate() {
            // A part ends where the next section begins, so that padding belongs to the part before it.
            let next = inside.get(index + 1).map_or(end, |(next, _)| *next);
            match parts.last_mut() {
                Some(last) if last.name == *class && last.range.end == *at => last.range.end = next,
                Some(_) | None => parts.push(Part {
                    name: (*class).to_owned(),
                    range: *at..next,
                }),
            }
        }
    }
    parts
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use vm_memory::GuestAddress;

    use super::*;

    const NAMES: &str = "\0.text\0.rodata\0.data\0.bss\0.shstrtab\0";

    fn section(name: &str, flags: u64, address: u64, offset: u64, size: u64) -> Vec<u8> {
        let at = NAMES
            .find(&format!("\0{name}\0"))
            .map_or(0, |at| at as u32 + 1);
        let mut bytes = Vec::new();
        bytes.extend(at.to_le_bytes());
        bytes.extend(1u32.to_le_bytes());
        for value in [flags, address, offset, size] {
            bytes.extend(value.to_le_bytes());
        }
        bytes.extend([0; 24]);
        bytes
    }

    fn kernel() -> File {
        let mut bytes = vec![0; 64];
        bytes[40..48].copy_from_slice(&0x6000u64.to_le_bytes());
        for (at, value) in [(58, 64u16), (60, 6), (62, 5)] {
            bytes[at..at + 2].copy_from_slice(&value.to_le_bytes());
        }
        bytes.resize(0x5000, 0);
        bytes.extend(NAMES.as_bytes());
        bytes.resize(0x6000, 0);
        bytes.extend([0; 64]);
        bytes.extend(section(
            ".text",
            ALLOC | 4,
            KERNEL_MAP + 0x100_0000,
            0x1000,
            0x1800,
        ));
        bytes.extend(section(
            ".rodata",
            ALLOC | WRITE,
            KERNEL_MAP + 0x100_2000,
            0x3000,
            0x800,
        ));
        bytes.extend(section(".data", ALLOC | WRITE, 0, 0x4000, 0x1000));
        bytes.extend(section(
            ".bss",
            ALLOC | WRITE,
            KERNEL_MAP + 0x200_1000,
            0x4000,
            0x3000,
        ));
        bytes.extend(section(".shstrtab", 0, 0, 0x5000, NAMES.len() as u64));
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&bytes).unwrap();
        file
    }

    fn segments() -> [LoadSegment; 2] {
        let segment = |file_offset, file_len, address, mem_len| LoadSegment {
            file_offset,
            file_len,
            guest_address: GuestAddress(address),
            mem_len,
            is_writable: true,
        };
        [
            segment(0x1000, 0x3000, 0x100_0000, 0x3000),
            segment(0x4000, 0x1000, 0x200_0000, 0x4000),
        ]
    }

    #[test]
    fn sections_cover_all_of_their_segments_also_those_that_are_not_in_the_file() {
        let parts = parts(&kernel(), &segments());
        let parts: Vec<_> = parts
            .iter()
            .map(|part| (part.name.as_str(), part.range.clone()))
            .collect();
        assert_eq!(
            parts,
            [
                ("kernel text", 0x100_0000..0x100_2000),
                ("kernel rodata", 0x100_2000..0x100_3000),
                ("kernel data", 0x200_0000..0x200_1000),
                ("kernel bss", 0x200_1000..0x200_4000),
            ]
        );
    }

    #[test]
    fn a_kernel_without_sections_is_its_segments() {
        let empty = tempfile::tempfile().unwrap();
        let parts = parts(&empty, &segments());
        assert_eq!(parts.len(), 2);
        assert_eq!(
            (parts[1].name.as_str(), parts[1].range.clone()),
            ("kernel segment 2", 0x200_0000..0x200_4000)
        );
    }
}
