//! Runs of pages in a memory file, and their checksums.

use std::fs::File;
use std::io::ErrorKind;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::LazyLock;

use memshare::{PAGE_SIZE, is_zero};
use serde::{Deserialize, Serialize};

use super::error::SnapshotError;
use super::file::NewFile;

/// Bytes that share a checksum.
const BLOCK: u64 = 1 << 20;

/// A run of pages in a memory file, by its place in RAM or in the pmem device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedRun {
    /// First byte.
    pub offset: u64,
    /// Length in bytes.
    pub len: u64,
    /// CRC-32C of each block of 1 MiB of it, the last of which may be shorter.
    pub checksums: Vec<u32>,
}

impl SavedRun {
    fn end(&self) -> Option<u64> {
        self.offset.checked_add(self.len)
    }

    fn blocks(&self) -> impl Iterator<Item = (Range<u64>, u32)> + '_ {
        let starts = (0..self.len).step_by(BLOCK as usize);
        let ranges = starts.map(move |start| start..(start + BLOCK).min(self.len));
        ranges.zip(self.checksums.iter().copied())
    }

    /// Checks that runs are whole pages of `bytes`, in order, with a checksum for each block.
    ///
    /// # Errors
    /// `Contradiction`.
    pub(super) fn validate(runs: &[Self], bytes: u64, label: &str) -> Result<(), SnapshotError> {
        let mut end = 0;
        for run in runs {
            let Self { offset, len, .. } = run;
            let run_end = run.end().filter(|run_end| *run_end <= bytes);
            let is_whole =
                *len > 0 && offset.is_multiple_of(PAGE_SIZE) && len.is_multiple_of(PAGE_SIZE);
            let run_end = run_end.filter(|_| is_whole && *offset >= end);
            end = run_end.ok_or_else(|| {
                let what = format!("{label} holds {offset:#x}+{len:#x} of {bytes:#x} bytes");
                SnapshotError::Contradiction(what)
            })?;
            if run.checksums.len() as u64 != len.div_ceil(BLOCK) {
                let what = format!("{} checksums of {len:#x} bytes", run.checksums.len());
                return Err(SnapshotError::Contradiction(what));
            }
        }
        Ok(())
    }

    /// Compares the checksums with the file, which has the run at `at`.
    ///
    /// # Errors
    /// `File`, `Damaged`.
    pub(super) fn verify(&self, at: u64, file: &File, path: &Path) -> Result<(), SnapshotError> {
        let mut block = vec![0; BLOCK.min(self.len) as usize];
        for (range, checksum) in self.blocks() {
            let bytes = &mut block[..(range.end - range.start) as usize];
            file.read_exact_at(bytes, at + range.start)
                .map_err(SnapshotError::file("read", path))?;
            if self::checksum(bytes) != checksum {
                return Err(SnapshotError::Damaged {
                    path: path.to_owned(),
                    offset: at + range.start,
                });
            }
        }
        Ok(())
    }
}

/// The buffer in which each block of a file is assembled.
pub(super) struct Blocks(Vec<u8>);

impl Blocks {
    /// Allocates the buffer. A host without memory refuses that; then there is no snapshot, and the guest goes on.
    ///
    /// # Errors
    /// `Memory`.
    pub(super) fn new() -> Result<Self, SnapshotError> {
        let mut buffer = Vec::new();
        buffer
            .try_reserve_exact(BLOCK as usize)
            .map_err(|_| SnapshotError::Memory(ErrorKind::OutOfMemory.into()))?;
        Ok(Self(buffer))
    }

    /// Writes a range of memory to the file at `file_at`. `read` fills a buffer of zeros with what a part of the range
    /// holds.
    ///
    /// # Errors
    /// `File`.
    pub(super) fn write(
        &mut self,
        new: &NewFile,
        file_at: u64,
        range: Range<u64>,
        read: impl Fn(Range<u64>, &mut [u8]),
    ) -> Result<SavedRun, SnapshotError> {
        let Self(block) = self;
        let mut checksums = Vec::new();
        for at in range.clone().step_by(BLOCK as usize) {
            let end = range.end.min(at + BLOCK);
            block.clear();
            block.resize((end - at) as usize, 0);
            read(at..end, block);
            checksums.push(checksum(block));
            write_pages(new.file(), file_at + (at - range.start), block)
                .map_err(SnapshotError::file("write", new.path()))?;
        }
        Ok(SavedRun {
            offset: range.start,
            len: range.end - range.start,
            checksums,
        })
    }
}

/// CRC-32C. Most of a small guest's memory is zeros, for which a comparison is faster than a checksum.
fn checksum(bytes: &[u8]) -> u32 {
    static OF_ZERO_BLOCK: LazyLock<u32> =
        LazyLock::new(|| crc32c::crc32c(&vec![0; BLOCK as usize]));
    if bytes.len() as u64 == BLOCK && is_zero(bytes) {
        *OF_ZERO_BLOCK
    } else {
        crc32c::crc32c(bytes)
    }
}

/// Writes a block, with holes where its pages are zeros.
fn write_pages(file: &File, at: u64, block: &[u8]) -> std::io::Result<()> {
    let pages = block.chunks(PAGE_SIZE as usize);
    let mut run = 0..0;
    for page in pages {
        let end = run.end + page.len();
        if is_zero(page) {
            flush(file, at, block, run)?;
            run = end..end;
        } else {
            run.end = end;
        }
    }
    flush(file, at, block, run)
}

fn flush(file: &File, at: u64, block: &[u8], run: Range<usize>) -> std::io::Result<()> {
    let start = at + run.start as u64;
    block
        .get(run)
        .map_or(Ok(()), |bytes| file.write_all_at(bytes, start))
}
