//! ELF `vmlinux`: which bytes of the file go where in guest memory, and where execution starts.
//!
//! The file is parsed here rather than by linux-loader, because the ranges are needed as values, so that they can be
//! mapped instead of read, and because an error should name the field that is wrong. Fields: System V ABI, chapter 4;
//! the PVH note: Xen, `elfnote.h`.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use vm_memory::GuestAddress;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, KnownLayout};

use super::BootError;

/// First bytes of an ELF file.
pub(super) const MAGIC: [u8; 4] = *b"\x7fELF";

const CLASS_64: u8 = 2;
const LITTLE_ENDIAN: u8 = 1;
const MACHINE_X86_64: u16 = 62;
const MAX_PROGRAM_HEADERS: u16 = 64;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
/// Flag of a segment that the kernel writes to.
const PF_W: u32 = 2;
/// `XEN_ELFNOTE_PHYS32_ENTRY`: the PVH entry point.
const PHYS32_ENTRY: u32 = 18;
/// The longest note segment: it is read into memory as a whole.
const MAX_NOTES: u64 = 64 << 10;

#[derive(FromBytes, Immutable, KnownLayout)]
#[repr(C)]
struct FileHeader {
    magic: [u8; 4],
    class: u8,
    data: u8,
    ident: [u8; 10],
    kind: U16,
    machine: U16,
    version: U32,
    entry: U64,
    phoff: U64,
    shoff: U64,
    flags: U32,
    ehsize: U16,
    phentsize: U16,
    phnum: U16,
    sections: [U16; 3],
}

#[derive(FromBytes, Immutable, KnownLayout)]
#[repr(C)]
struct ProgramHeader {
    kind: U32,
    flags: U32,
    offset: U64,
    vaddr: U64,
    paddr: U64,
    filesz: U64,
    memsz: U64,
    align: U64,
}

#[derive(FromBytes, Immutable, KnownLayout)]
#[repr(C)]
struct NoteHeader {
    namesz: U32,
    descsz: U32,
    kind: U32,
}

/// A range of the kernel file and where it goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoadSegment {
    /// First byte in the file.
    pub file_offset: u64,
    /// Bytes from the file.
    pub file_len: u64,
    /// First guest physical address.
    pub guest_address: GuestAddress,
    /// Bytes in guest memory; those past `file_len` are zero.
    pub mem_len: u64,
    /// Whether the kernel writes to it while it runs, by the segment's flags.
    pub is_writable: bool,
}

impl LoadSegment {
    /// First byte of the file past the segment.
    pub(super) fn file_end(&self) -> u64 {
        self.file_offset + self.file_len
    }

    /// Guest physical address of a byte of the file that is not before the segment.
    pub(super) fn address_of(&self, file_offset: u64) -> u64 {
        self.guest_address.0 + (file_offset - self.file_offset)
    }
}

/// A parsed kernel. Its segments end below 2^64 and lie inside the file.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Elf {
    pub(super) segments: Vec<LoadSegment>,
    /// 64-bit entry point, guest physical.
    pub(super) entry: GuestAddress,
    /// PVH entry point, guest physical, where the kernel has one.
    pub(super) pvh_entry: Option<GuestAddress>,
}

struct Reader<'a> {
    file: &'a File,
    path: &'a Path,
    len: u64,
}

impl Reader<'_> {
    fn error(&self, offset: u64, expected: impl Into<String>) -> BootError {
        BootError::Elf {
            path: self.path.to_owned(),
            offset,
            expected: expected.into(),
        }
    }

    /// Reads `len` bytes, which the caller has bounded.
    fn bytes(&self, offset: u64, len: usize, what: &str) -> Result<Vec<u8>, BootError> {
        if offset
            .checked_add(len as u64)
            .is_none_or(|end| end > self.len)
        {
            return Err(self.error(
                offset,
                format!(
                    "{what} of {len} bytes ends past the file's {} bytes",
                    self.len
                ),
            ));
        }
        let mut bytes = vec![0; len];
        self.file
            .read_exact_at(&mut bytes, offset)
            .map_err(|source| BootError::File {
                path: self.path.to_owned(),
                role: "kernel",
                action: "read",
                source,
            })?;
        Ok(bytes)
    }

    fn object<T: FromBytes>(&self, offset: u64, what: &str) -> Result<T, BootError> {
        let bytes = self.bytes(offset, size_of::<T>(), what)?;
        T::read_from_bytes(&bytes).map_err(|_| self.error(offset, what))
    }
}

/// Parses `file`, of `len` bytes.
pub(super) fn parse(file: &File, path: &Path, len: u64) -> Result<Elf, BootError> {
    let reader = Reader { file, path, len };
    let header: FileHeader = reader.object(0, "the ELF header")?;
    if header.class != CLASS_64 {
        return Err(reader.error(
            4,
            format!("class {CLASS_64} (64-bit) expected, found {}", header.class),
        ));
    }
    if header.data != LITTLE_ENDIAN {
        return Err(reader.error(
            5,
            format!(
                "little-endian data expected, found encoding {}",
                header.data
            ),
        ));
    }
    if header.machine != MACHINE_X86_64 {
        return Err(reader.error(
            18,
            format!(
                "machine {MACHINE_X86_64} (x86-64) expected, found {}",
                header.machine
            ),
        ));
    }
    if usize::from(header.phentsize) != size_of::<ProgramHeader>() {
        return Err(reader.error(
            54,
            format!(
                "program headers of 56 bytes expected, found {}",
                header.phentsize
            ),
        ));
    }
    let count = header.phnum.get();
    if !(1..=MAX_PROGRAM_HEADERS).contains(&count) {
        return Err(reader.error(
            56,
            format!("1 to {MAX_PROGRAM_HEADERS} program headers expected, found {count}"),
        ));
    }
    let (mut segments, mut pvh_entry) = (Vec::new(), None);
    for index in 0..u64::from(count) {
        let at = header
            .phoff
            .get()
            .checked_add(index * size_of::<ProgramHeader>() as u64)
            .ok_or_else(|| reader.error(32, "program headers past the end of the address space"))?;
        let program: ProgramHeader = reader.object(at, "a program header")?;
        match program.kind.get() {
            PT_LOAD if program.memsz.get() > 0 => {
                segments.push(load_segment(&reader, at, &program)?);
            }
            PT_NOTE if pvh_entry.is_none() => pvh_entry = pvh_note(&reader, at, &program)?,
            _ => {}
        }
    }
    if segments.is_empty() {
        return Err(reader.error(header.phoff.get(), "no segment to load"));
    }
    Ok(Elf {
        segments,
        entry: GuestAddress(header.entry.get()),
        pvh_entry,
    })
}

fn load_segment(
    reader: &Reader<'_>,
    at: u64,
    program: &ProgramHeader,
) -> Result<LoadSegment, BootError> {
    let (offset, filesz, memsz, paddr) = (
        program.offset.get(),
        program.filesz.get(),
        program.memsz.get(),
        program.paddr.get(),
    );
    if offset
        .checked_add(filesz)
        .is_none_or(|end| end > reader.len)
    {
        let message = format!(
            "segment {offset:#x}+{filesz:#x} ends past the file's {:#x} bytes",
            reader.len
        );
        return Err(reader.error(at + 8, message));
    }
    if filesz > memsz || paddr.checked_add(memsz).is_none() {
        let message = format!("segment of {filesz:#x} bytes, {memsz:#x} in memory at {paddr:#x}");
        return Err(reader.error(at + 24, message));
    }
    Ok(LoadSegment {
        file_offset: offset,
        file_len: filesz,
        guest_address: GuestAddress(paddr),
        mem_len: memsz,
        is_writable: program.flags.get() & PF_W != 0,
    })
}

/// Looks for the PVH entry in a note segment.
fn pvh_note(
    reader: &Reader<'_>,
    at: u64,
    program: &ProgramHeader,
) -> Result<Option<GuestAddress>, BootError> {
    let size = program.filesz.get();
    if size > MAX_NOTES {
        return Err(reader.error(
            at + 32,
            format!("notes of at most {MAX_NOTES} bytes expected, found {size}"),
        ));
    }
    let notes = reader.bytes(program.offset.get(), size as usize, "the notes")?;
    let align = if program.align.get() == 8 { 8 } else { 4 };
    let mut rest: &[u8] = &notes;
    while let Ok((header, body)) = NoteHeader::read_from_prefix(rest) {
        let name_len = (header.namesz.get() as usize).next_multiple_of(align);
        let desc_len = header.descsz.get() as usize;
        let (Some(name), Some(desc)) = (
            body.get(..header.namesz.get() as usize),
            body.get(name_len..name_len.saturating_add(desc_len)),
        ) else {
            return Ok(None);
        };
        if name == b"Xen\0"
            && header.kind.get() == PHYS32_ENTRY
            && let Some(entry) = desc.first_chunk::<4>()
        {
            return Ok(Some(GuestAddress(u32::from_le_bytes(*entry).into())));
        }
        let next = name_len.saturating_add(desc_len.next_multiple_of(align));
        rest = body.get(next..).unwrap_or_default();
    }
    Ok(None)
}

#[cfg(test)]
pub(super) mod tests {
    use std::io::Write;

    use proptest::prelude::*;

    use super::*;

    fn phdr(kind: u32, offset: u64, paddr: u64, filesz: u64, memsz: u64) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend(kind.to_le_bytes());
        bytes.extend(7u32.to_le_bytes());
        for field in [offset, paddr, paddr, filesz, memsz, 4] {
            bytes.extend(field.to_le_bytes());
        }
        bytes
    }

    /// A kernel with one segment of 16 bytes at 1 MiB that takes `memsz`, and a PVH note.
    pub(in crate::boot) fn kernel(memsz: u64) -> Vec<u8> {
        let mut bytes = b"\x7fELF\x02\x01\x01".to_vec();
        bytes.resize(16, 0);
        bytes.extend([2, 0, 62, 0, 1, 0, 0, 0]);
        bytes.extend(0x10_0000u64.to_le_bytes());
        bytes.extend(64u64.to_le_bytes());
        bytes.extend([0; 12]);
        bytes.extend([64, 0, 56, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
        bytes.extend(phdr(PT_LOAD, 0x100, 0x10_0000, 16, memsz));
        bytes.extend(phdr(PT_NOTE, 0xc0, 0, 20, 20));
        bytes.resize(0xc0, 0);
        bytes.extend([4, 0, 0, 0, 4, 0, 0, 0, 18, 0, 0, 0]);
        bytes.extend(b"Xen\0");
        bytes.extend(0x10_0008u32.to_le_bytes());
        bytes.resize(0x100, 0);
        bytes.extend([0xf4; 16]);
        bytes
    }

    fn parse_bytes(bytes: &[u8]) -> Result<Elf, BootError> {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        parse(&file, Path::new("vmlinux"), bytes.len() as u64)
    }

    #[test]
    fn segments_and_both_entries_are_found() {
        let elf = parse_bytes(&kernel(0x1000)).unwrap();
        let segment = LoadSegment {
            file_offset: 0x100,
            file_len: 16,
            guest_address: GuestAddress(0x10_0000),
            mem_len: 0x1000,
            is_writable: true,
        };
        assert_eq!(elf.segments, [segment]);
        assert_eq!(elf.entry, GuestAddress(0x10_0000));
        assert_eq!(elf.pvh_entry, Some(GuestAddress(0x10_0008)));
    }

    #[test]
    fn an_elf_for_another_machine_is_refused_by_field() {
        for (offset, value, names) in [
            (4, 1, "64-bit"),
            (5, 2, "little-endian"),
            (18, 183, "x86-64"),
            (56, 0, "headers"),
        ] {
            let mut bytes = kernel(16);
            bytes[offset] = value;
            let error = parse_bytes(&bytes).unwrap_err().to_string();
            assert!(
                error.contains(names) && error.contains(&format!("offset {offset:#x}")),
                "{error}"
            );
        }
    }

    #[test]
    fn a_truncated_kernel_is_refused_wherever_it_ends() {
        let whole = kernel(16);
        for len in 0..whole.len() {
            assert!(
                matches!(parse_bytes(&whole[..len]), Err(BootError::Elf { .. })),
                "{len}"
            );
        }
    }

    proptest! {
        #[test]
        fn mutated_kernels_never_panic(changes in prop::collection::vec((0..0x110usize, any::<u8>()), 1..24)) {
            let mut bytes = kernel(0x1000);
            for (at, value) in changes {
                bytes[at] = value;
            }
            if let Ok(elf) = parse_bytes(&bytes) {
                for segment in elf.segments {
                    prop_assert!(segment.file_offset + segment.file_len <= bytes.len() as u64);
                    prop_assert!(segment.guest_address.0.checked_add(segment.mem_len).is_some());
                }
            }
        }
    }
}
