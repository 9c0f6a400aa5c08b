//! By which bytes a file is known for what it is: the one table of them.
//!
//! A file that is in the table and that cannot be read here is refused rather than taken for a raw disk, since its
//! bytes are not those of the disk. The table has no formats that a guest itself can make use of: an ISO 9660 image, a
//! `squashfs` or an encrypted volume is a disk.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use crate::vhdx;

/// A format of disks that a conversion reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SourceFormat {
    /// The file is the disk.
    Raw,
    /// [MS-VHDX].
    Vhdx,
    /// QEMU's qcow2.
    Qcow2,
    /// Virtual Hard Disk, of Virtual PC and Azure.
    Vhd,
    /// VMware's virtual disk.
    Vmdk,
}

impl SourceFormat {
    /// The name that a user knows it by.
    pub fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Vhdx => "vhdx",
            Self::Qcow2 => "qcow2",
            Self::Vhd => "vhd",
            Self::Vmdk => "vmdk",
        }
    }
}

/// What reads a format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reader {
    /// A module of this crate.
    Here(SourceFormat),
    /// Another program, by the command that makes a raw disk of the file, or unpacks it.
    Elsewhere(&'static str),
}

/// A format, as its files show it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Signature {
    /// What a user calls it, with an article.
    pub name: &'static str,
    /// What reads it.
    pub reader: Reader,
    /// All of which a file of the format has.
    marks: &'static [Mark],
}

/// Bytes at a place of a file.
#[derive(Clone, Copy, Debug)]
enum Mark {
    /// From this offset on.
    At(u64, &'static [u8]),
    /// From this many bytes before the end of the file on.
    BeforeEnd(u64, &'static [u8]),
}

/// The longest mark in bytes.
const LONGEST: usize = 32;

const QEMU_IMG: Reader = Reader::Elsewhere("qemu-img convert -O raw");

const fn format(name: &'static str, reader: Reader, marks: &'static [Mark]) -> Signature {
    Signature {
        name,
        reader,
        marks,
    }
}

/// In the order in which they are looked for.
#[rustfmt::skip] // a line a format
static SIGNATURES: &[Signature] = &[
    format("a VHDX", Reader::Here(SourceFormat::Vhdx), &[Mark::At(0, b"vhdxfile")]),
    // Both versions: the reader says of the first that it is too old.
    format("a qcow2 image", Reader::Here(SourceFormat::Qcow2), &[Mark::At(0, b"QFI\xfb")]),
    format("a VMDK", Reader::Here(SourceFormat::Vmdk), &[Mark::At(0, b"KDMV")]),
    format("a VMDK", Reader::Here(SourceFormat::Vmdk), &[Mark::At(0, b"# Disk DescriptorFile")]),
    format("a VHD", Reader::Here(SourceFormat::Vhd), &[Mark::At(0, b"conectix")]),
    format("a VHD", Reader::Here(SourceFormat::Vhd), &[Mark::BeforeEnd(512, b"conectix")]),
    format("a VMDK of the kind that ESX 3 made", QEMU_IMG, &[Mark::At(0, b"COWD\x01\0\0\0")]),
    format("a VDI image of VirtualBox", QEMU_IMG, &[Mark::At(0x40, b"\x7f\x10\xda\xbe")]),
    format("a QED image of QEMU", QEMU_IMG, &[Mark::At(0, b"QED\0")]),
    format("a disk image of Parallels", QEMU_IMG, &[Mark::At(0, b"WithoutFreeSpace")]),
    format("a disk image of Parallels", QEMU_IMG, &[Mark::At(0, b"WithouFreSpacExt")]),
    format("a disk image of Bochs", QEMU_IMG, &[Mark::At(0, b"Bochs Virtual HD Image")]),
    format("a disk image of macOS (DMG)", QEMU_IMG, &[Mark::BeforeEnd(512, b"koly\0\0\0\x04\0\0\x02\0")]),
    format("a sparse image of Android", Reader::Elsewhere("simg2img"), &[Mark::At(0, b"\x3a\xff\x26\xed\x01\0")]),
    format("an Expert Witness image (EWF)", Reader::Elsewhere("ewfexport"), &[Mark::At(0, b"EVF\x09\x0d\x0a\xff\0")]),
    format("a Windows image (WIM)", Reader::Elsewhere("wimapply"), &[Mark::At(0, b"MSWIM\0\0\0")]),
    format("compressed by gzip", Reader::Elsewhere("gunzip"), &[Mark::At(0, b"\x1f\x8b\x08")]),
    format("compressed by xz", Reader::Elsewhere("unxz"), &[Mark::At(0, b"\xfd7zXZ\0")]),
    format("compressed by zstd", Reader::Elsewhere("unzstd"), &[Mark::At(0, b"\x28\xb5\x2f\xfd")]),
    // The level of compression lies between the two marks.
    format("compressed by bzip2", Reader::Elsewhere("bunzip2"), &[Mark::At(0, b"BZh"), Mark::At(4, b"\x31\x41\x59\x26\x53\x59")]),
    format("compressed by lz4", Reader::Elsewhere("unlz4"), &[Mark::At(0, b"\x04\x22\x4d\x18")]),
    format("compressed by lzip", Reader::Elsewhere("lzip -d"), &[Mark::At(0, b"LZIP\x01")]),
    format("a ZIP archive", Reader::Elsewhere("unzip"), &[Mark::At(0, b"PK\x03\x04")]),
    format("a 7z archive", Reader::Elsewhere("7z x"), &[Mark::At(0, b"7z\xbc\xaf\x27\x1c")]),
];

impl Mark {
    fn bytes(&self) -> &'static [u8] {
        match *self {
            Self::At(_, bytes) | Self::BeforeEnd(_, bytes) => bytes,
        }
    }

    /// Where it begins in a file of `len` bytes; `None` where such a file is too short to have the place.
    fn offset(&self, len: u64) -> Option<u64> {
        match *self {
            Self::At(offset, _) => Some(offset),
            Self::BeforeEnd(back, _) => len.checked_sub(back),
        }
    }

    fn is_in(&self, file: &File, len: u64) -> io::Result<bool> {
        match self.offset(len) {
            Some(offset) => is_at(file, offset, self.bytes()),
            None => Ok(false),
        }
    }
}

/// Whether a file has these bytes, at most 32, at an offset.
pub(crate) fn is_at(file: &File, offset: u64, bytes: &[u8]) -> io::Result<bool> {
    let mut found = [0; LONGEST];
    let found = &mut found[..bytes.len()];
    match file.read_exact_at(found, offset) {
        Ok(()) => Ok(found == bytes),
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        Err(e) => Err(e),
    }
}

/// What a file is by its signature; `None` where it has none that is known, as a raw disk.
pub(crate) fn recognise(file: &File) -> io::Result<Option<&'static Signature>> {
    let len = file.metadata()?.len();
    for signature in SIGNATURES {
        let mut marks = signature.marks.iter();
        if marks.try_fold(true, |all, mark| {
            Ok::<_, io::Error>(all && mark.is_in(file, len)?)
        })? {
            return Ok(Some(signature));
        }
    }
    Ok(None)
}

/// Bytes of a sector: no mark crosses one.
const SECTOR: u64 = 512;

/// Where the sectors begin, in a raw disk of `len` bytes, in which a signature is looked for; in order.
pub(crate) fn marked_sectors(len: u64) -> Vec<u64> {
    let mut sectors: Vec<u64> = SIGNATURES
        .iter()
        .flat_map(|signature| signature.marks)
        .filter_map(|mark| mark.offset(len))
        .chain(vhdx::HEADER_OFFSETS)
        .map(|offset| offset / SECTOR * SECTOR)
        .filter(|sector| sector + SECTOR <= len)
        .collect();
    sectors.sort_unstable();
    sectors.dedup();
    sectors
}

/// What a raw disk of `len` bytes would be taken for if `bytes`, the sector at `offset`, were written. What the other
/// sectors hold does not matter, as all marks of a format lie in one.
pub(crate) fn recognise_sector(len: u64, offset: u64, bytes: &[u8]) -> Option<&'static str> {
    let holds = |at: u64, mark: &[u8]| {
        at.checked_sub(offset)
            .and_then(|start| bytes.get(usize::try_from(start).ok()?..)?.get(..mark.len()))
            .is_some_and(|found| found == mark)
    };
    let by_marks = SIGNATURES.iter().find(|signature| {
        signature
            .marks
            .iter()
            .all(|mark| mark.offset(len).is_some_and(|at| holds(at, mark.bytes())))
    });
    let is_header = || {
        vhdx::HEADER_OFFSETS
            .iter()
            .any(|at| holds(*at, vhdx::HEADER_SIGNATURE))
    };
    by_marks
        .map(|signature| signature.name)
        .or_else(|| is_header().then_some("a VHDX that is damaged"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file of 4 KiB with nothing but these marks.
    fn marked(marks: &[Mark]) -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4096).unwrap();
        for mark in marks {
            let (offset, bytes) = match *mark {
                Mark::At(offset, bytes) => (offset, bytes),
                Mark::BeforeEnd(back, bytes) => (4096 - back, bytes),
            };
            file.write_all_at(bytes, offset).unwrap();
        }
        file
    }

    #[test]
    fn every_format_is_known_by_its_marks_and_by_no_fewer() {
        for signature in SIGNATURES {
            assert!(
                signature
                    .marks
                    .iter()
                    .all(|mark| (3..=LONGEST).contains(&mark.bytes().len()))
            );
            let found = recognise(&marked(signature.marks)).unwrap().unwrap();
            assert_eq!(found.name, signature.name);
            let fewer = &signature.marks[1..];
            assert!(
                recognise(&marked(fewer)).unwrap().is_none(),
                "{}",
                signature.name
            );
        }
    }

    #[test]
    fn all_marks_of_a_format_lie_in_one_sector_that_is_looked_at() {
        // What a guarded disk relies on: each sector of a write can be judged alone.
        for len in [512, 4096, 65536, 1 << 20, (1 << 30) + 512] {
            let sectors = marked_sectors(len);
            assert!(sectors.contains(&0) && sectors.contains(&(len - 512)));
            for signature in SIGNATURES {
                let mut of_marks = signature.marks.iter().flat_map(|mark| {
                    let first = mark.offset(len).unwrap();
                    [first, first + mark.bytes().len() as u64 - 1].map(|at| at / 512 * 512)
                });
                let sector = of_marks.next().unwrap();
                assert!(of_marks.all(|other| other == sector), "{}", signature.name);
                assert!(sectors.contains(&sector), "{}", signature.name);
            }
        }
        assert_eq!(
            marked_sectors(1 << 20),
            [0, 64 << 10, 128 << 10, (1 << 20) - 512]
        );
    }

    #[test]
    fn a_file_that_ends_before_a_mark_or_inside_it_is_not_of_the_format() {
        for bytes in [&b""[..], b"v", b"vhdxfil", b"QFI"] {
            let file = tempfile::tempfile().unwrap();
            file.write_all_at(bytes, 0).unwrap();
            assert!(recognise(&file).unwrap().is_none(), "{bytes:?}");
        }
    }

    #[test]
    fn what_a_guest_can_use_as_it_is_has_no_signature() {
        // ISO 9660, squashfs, a boot sector, ext4.
        for mark in [
            Mark::At(32769, b"CD001"),
            Mark::At(0, b"hsqs"),
            Mark::At(510, b"\x55\xaa"),
            Mark::At(1080, b"\x53\xef"),
        ] {
            assert!(recognise(&marked(&[mark])).unwrap().is_none(), "{mark:?}");
        }
    }
}
