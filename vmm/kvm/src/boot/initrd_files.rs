//! The files of an initrd, as a guest unpacks them: each begins at a page.
//!
//! A guest unpacks its initrd into pages of its own, at any address, and runs from them, so that every guest has the
//! same bytes. In this file they are arranged as in the guest's page cache, in whole pages of which the last is filled
//! up with zeros, so that they can be mapped in place of the guest's pages.

use std::io::{self, BufRead, BufReader, Read, Seek};

use cpio::newc;
use rustix::fs::{MemfdFlags, memfd_create};

use super::compression::Compression;
use super::page_writer::PageWriter;

/// The bits of a mode for the type of a file, and their value for a regular one (Linux,
/// Documentation/driver-api/early-userspace/buffer-format.rst).
const TYPE: u32 = 0o170_000;
const REGULAR: u32 = 0o100_000;
/// First bytes of an archive, `newc` with checksums or without.
const ARCHIVE: &[u8] = b"07070";
/// Bytes by which an archive or a compression is recognised.
const START: u64 = 6;

/// Whether archives may be compressed: an archive that was compressed is not compressed twice.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Nesting {
    Outer,
    Unpacked,
}

/// Writes the files of all archives of an initrd, which follow one another, compressed or not (Linux,
/// buffer-format.rst).
///
/// # Errors
/// Where the initrd is not made of archives, or one is damaged; or where the files cannot be written.
pub(super) fn write(source: &mut dyn BufRead, out: &mut PageWriter) -> io::Result<()> {
    write_archives(source, out, Nesting::Outer)
}

fn write_archives(
    source: &mut dyn BufRead,
    out: &mut PageWriter,
    nesting: Nesting,
) -> io::Result<()> {
    while skip_zeros(source)? {
        let mut start = Vec::new();
        source.take(START).read_to_end(&mut start)?;
        let mut segment = start.chain(&mut *source);
        if start.starts_with(ARCHIVE) {
            write_archive(&mut segment, out)?;
            continue;
        }
        let compression = Compression::of(&start).filter(|_| nesting == Nesting::Outer);
        let compression = compression.ok_or_else(|| {
            io::Error::other(format!(
                "the initrd has something that is no archive: {start:02x?}"
            ))
        })?;
        // The unpacked archive is in memory, with holes, until it is closed.
        let memory = memfd_create("initrd", MemfdFlags::CLOEXEC)?;
        let mut unpacked = PageWriter::new(memory.into());
        compression.decode(segment, &mut unpacked)?;
        let mut unpacked = unpacked.finish()?;
        unpacked.rewind()?;
        write_archives(&mut BufReader::new(unpacked), out, Nesting::Unpacked)?;
    }
    Ok(())
}

/// Skips the zeros that archives are filled up with, and returns whether anything follows.
fn skip_zeros(source: &mut dyn BufRead) -> io::Result<bool> {
    loop {
        let bytes = source.fill_buf()?;
        let zeros = bytes.iter().take_while(|byte| **byte == 0).count();
        if zeros < bytes.len() {
            source.consume(zeros);
            return Ok(true);
        }
        if zeros == 0 {
            return Ok(false);
        }
        source.consume(zeros);
    }
}

fn write_archive(source: &mut impl BufRead, out: &mut PageWriter) -> io::Result<()> {
    loop {
        let mut file = newc::Reader::new(&mut *source)?;
        let entry = file.entry();
        let is_file = entry.mode() & TYPE == REGULAR;
        let (len, is_last) = (u64::from(entry.file_size()), entry.is_trailer());
        if is_file {
            out.pad_to_page()?;
            if io::copy(&mut file, out)? < len {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        file.finish()?;
        if is_last {
            return Ok(());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::fs::FileExt;

    use super::*;
    use crate::boot::compression::tests as compression;

    fn archive(files: &[(&str, u32, &[u8])]) -> Vec<u8> {
        let mut archive = Vec::new();
        for (name, mode, bytes) in files {
            let entry = newc::Builder::new(name).mode(*mode);
            let mut entry = entry.write(&mut archive, bytes.len() as u32);
            entry.write_all(bytes).unwrap();
            entry.finish().unwrap();
        }
        newc::trailer(&mut archive).unwrap();
        archive
    }

    fn written(initrd: &[u8]) -> io::Result<Vec<u8>> {
        let mut writer = PageWriter::new(tempfile::tempfile()?);
        write(&mut &initrd[..], &mut writer)?;
        let file = writer.finish()?;
        let mut bytes = vec![0; file.metadata()?.len() as usize];
        file.read_exact_at(&mut bytes, 0)?;
        Ok(bytes)
    }

    #[test]
    fn files_of_all_archives_begin_at_a_page_each() {
        let microcode = archive(&[
            ("kernel", 0o040_755, b""),
            ("kernel/x", 0o100_644, b"micro"),
        ]);
        let main = archive(&[
            ("init", 0o100_755, &[7; 5000]),
            ("bin/sh", 0o120_777, b"busybox"),
            ("empty", 0o100_644, b""),
            ("etc/x", 0o100_644, b"etc"),
        ]);
        for (kind, packed) in compression::packed(&main) {
            let mut initrd = microcode.clone();
            initrd.resize(initrd.len().next_multiple_of(512), 0);
            initrd.extend(packed);
            let bytes = written(&initrd).unwrap();
            assert_eq!(bytes.len(), 3 * 4096 + 3, "{kind:?}");
            assert_eq!(&bytes[..8], b"micro\0\0\0");
            assert!(bytes[4096..4096 + 5000].iter().all(|byte| *byte == 7));
            assert!(bytes[4096 + 5000..3 * 4096].iter().all(|byte| *byte == 0));
            assert_eq!(&bytes[3 * 4096..], b"etc");
        }
    }

    #[test]
    fn what_is_damaged_or_no_archive_is_an_error() {
        let whole = archive(&[("init", 0o100_755, &[7; 5000])]);
        assert!(written(&whole).is_ok());
        for len in 1..whole.len() {
            assert!(written(&whole[..len]).is_err(), "{len}");
        }
        assert!(written(b"text, and not an archive").is_err());
        let twice = compression::lz4_legacy(&compression::lz4_legacy(&whole));
        assert!(written(&twice).is_err());
        assert_eq!(written(&[0; 600]).unwrap(), b"");
    }
}
