//! Writes unpacked bytes to a file, with holes for pages of zeros.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;

/// The most bytes that are unpacked. A file that expands further is not a kernel.
const MAX_UNPACKED: u64 = 1 << 30;
/// Granularity of holes.
const PAGE: usize = 4096;

/// Unpacked bytes that are buffered before they are written; a multiple of the page size.
const BUFFER: usize = 64 << 10;

/// Writes unpacked bytes to a file, with holes for pages of zeros.
pub(super) struct PageWriter {
    file: File,
    buffer: Vec<u8>,
    /// Bytes that are written to the file, which those in the buffer follow.
    written: u64,
}

impl PageWriter {
    pub(super) fn new(file: File) -> Self {
        Self {
            file,
            buffer: Vec::with_capacity(BUFFER),
            written: 0,
        }
    }

    /// Writes the complete pages of the buffer.
    fn write_pages(&mut self) -> io::Result<()> {
        let is_zero = |page: &[u8; PAGE]| page.iter().all(|byte| *byte == 0);
        let (pages, _) = self.buffer.as_chunks::<PAGE>();
        for run in pages.chunk_by(|a, b| is_zero(a) == is_zero(b)) {
            if !run.first().is_some_and(is_zero) {
                self.file.write_all_at(run.as_flattened(), self.written)?;
            }
            self.written += run.as_flattened().len() as u64;
        }
        let complete = self.buffer.len() / PAGE * PAGE;
        self.buffer.drain(..complete);
        Ok(())
    }

    /// Adds zeros up to the next page.
    pub(super) fn pad_to_page(&mut self) -> io::Result<()> {
        let tail = self.buffer.len() % PAGE;
        let padding = [0; PAGE];
        self.write_all(padding.get(..(PAGE - tail) % PAGE).unwrap_or_default())
    }

    pub(super) fn finish(mut self) -> io::Result<File> {
        self.write_pages()?;
        self.file.write_all_at(&self.buffer, self.written)?;
        self.file.set_len(self.written + self.buffer.len() as u64)?;
        Ok(self.file)
    }
}

impl Write for PageWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let room = BUFFER - self.buffer.len();
        let taken = bytes.get(..room).unwrap_or(bytes);
        if self.written + (self.buffer.len() + taken.len()) as u64 > MAX_UNPACKED {
            let error = format!("it unpacks to more than {MAX_UNPACKED} bytes");
            return Err(io::Error::other(error));
        }
        self.buffer.extend_from_slice(taken);
        if self.buffer.len() == BUFFER {
            self.write_pages()?;
        }
        Ok(taken.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_unpacks_to_a_bounded_length() {
        let mut writer = PageWriter::new(tempfile::tempfile().unwrap());
        writer.written = MAX_UNPACKED - 1;
        writer.write_all(b"x").unwrap();
        assert!(writer.write_all(b"x").is_err());
    }
}
