//! The memory of a guest's process.

use std::ops::Range;

use super::BenchError;
use host::procfs::{self, Mapping, ProcError, Usage};

/// A process's memory at one moment, in KiB.
#[derive(Clone, Copy, Debug)]
pub(super) struct ProcessMemory {
    /// All of its memory.
    pub(super) whole: Usage,
    /// Guest RAM.
    pub(super) ram: Usage,
    /// Everything else, which is the VMM's.
    pub(super) beside: Usage,
    /// Page tables of the process.
    pub(super) page_tables: u64,
    /// The number of mappings of guest RAM.
    pub(super) ram_mappings: usize,
}

/// The mappings of a process, and the addresses of the `mebibytes` of its guest's RAM.
pub(super) fn mappings(pid: u32, mebibytes: u32) -> Result<(Vec<Mapping>, Range<u64>), BenchError> {
    let mappings = procfs::mappings(pid)?;
    let ram = procfs::guest_ram(&mappings, u64::from(mebibytes) << 20)
        .ok_or(BenchError::NoRam(u64::from(mebibytes) << 10))?;
    Ok((mappings, ram))
}

impl ProcessMemory {
    /// Reads the memory of a process with a guest of so many MiB.
    pub(super) fn of(pid: u32, mebibytes: u32) -> Result<Self, BenchError> {
        let (mappings, range) = mappings(pid, mebibytes)?;
        let (ram, beside) = procfs::split(&mappings, &range);
        let status = procfs::read(pid, "status")?;
        let page_tables = status
            .lines()
            .find_map(|line| {
                line.strip_prefix("VmPTE:")?
                    .strip_suffix("kB")?
                    .trim()
                    .parse()
                    .ok()
            })
            .ok_or_else(|| ProcError::Malformed {
                path: format!("/proc/{pid}/status").into(),
                expected: "VmPTE",
            })?;
        Ok(Self {
            whole: procfs::memory(pid)?,
            ram,
            beside,
            page_tables,
            ram_mappings: mappings
                .iter()
                .filter(|mapping| range.contains(&mapping.range.start))
                .count(),
        })
    }
}
