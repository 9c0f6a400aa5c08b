//! Reads where the host has the pages of a process.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use super::error::BenchError;

pub(super) const PAGE: u64 = 4096;
/// `pagemap` and `kpageflags` have 64 bits for each page (Linux, Documentation/admin-guide/mm/pagemap.rst).
pub(super) const ENTRY: u64 = 8;

/// The entries of `/proc/PID/pagemap` for a range of addresses.
pub(super) fn pagemap(pid: u32, range: &Range<u64>) -> Result<Vec<u64>, BenchError> {
    let path = format!("/proc/{pid}/pagemap");
    let pages = (range.end - range.start) / PAGE;
    let mut bytes = vec![0; (pages * ENTRY) as usize];
    File::open(&path)
        .and_then(|file| file.read_exact_at(&mut bytes, range.start / PAGE * ENTRY))
        .map_err(BenchError::io(format!("read {path}")))?;
    let (entries, _) = bytes.as_chunks();
    Ok(entries
        .iter()
        .map(|entry| u64::from_ne_bytes(*entry))
        .collect())
}
