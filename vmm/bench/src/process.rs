//! What the process of a guest holds of the host's memory.

use std::ops::Range;

use super::BenchError;
use host::procfs::{self, Mapping, ProcError, Usage};

/// A process's memory at one moment, in KiB.
#[derive(Clone, Copy, Debug)]
pub(super) struct ProcessMemory {
    /// All of it.
    pub(super) whole: Usage,
    /// Guest RAM.
    pub(super) ram: Usage,
    /// The rest: the VMM's own.
    pub(super) beside: Usage,
    /// Page tables of the process.
    pub(super) page_tables: u64,
    /// Mappings that guest RAM is made of.
    pub(super) ram_mappings: usize,
}

/// The mappings of a process, and where the `mebibytes` of its guest are.
pub(super) fn mappings(pid: u32, mebibytes: u32) -> Result<(Vec<Mapping>, Range<u64>), BenchError> {
    let mappings = procfs::mappings(pid)?;
    let ram = procfs::guest_ram(&mappings, u64::from(mebibytes) << 20)
        .ok_or(BenchError::NoRam(u64::from(mebibytes) << 10))?;
    Ok((mappings, ram))
}

impl ProcessMemory {
    /// Of a process with a guest of so many MiB.
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
