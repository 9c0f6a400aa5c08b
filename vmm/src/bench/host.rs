//! The host's memory, by `/proc/meminfo`.

use std::fs;

use serde::{Deserialize, Serialize};

use super::{BenchError, Host};

const MEMINFO: &str = "/proc/meminfo";

/// The host's memory at one moment, in KiB.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostMemory {
    /// What could be used without swapping.
    pub available: u64,
    /// Page tables of all processes.
    pub page_tables: u64,
    /// Page tables of all guests, which KVM keeps; 0 before Linux 6.1, which counts them nowhere.
    pub secondary_page_tables: u64,
    /// The kernel's small objects.
    pub slab: u64,
    /// Stacks of threads in the kernel.
    pub kernel_stack: u64,
    /// Memory that is of no file.
    pub anonymous: u64,
    /// Pages of files that are mapped.
    pub mapped: u64,
}

/// A value of `/proc/meminfo` in KiB.
fn kibibytes(meminfo: &str, key: &str) -> Option<u64> {
    let value = meminfo
        .lines()
        .find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
    value.strip_suffix("kB")?.trim().parse().ok()
}

fn parse(meminfo: &str) -> Option<HostMemory> {
    Some(HostMemory {
        available: kibibytes(meminfo, "MemAvailable")?,
        page_tables: kibibytes(meminfo, "PageTables")?,
        secondary_page_tables: kibibytes(meminfo, "SecPageTables").unwrap_or(0),
        slab: kibibytes(meminfo, "Slab")?,
        kernel_stack: kibibytes(meminfo, "KernelStack")?,
        anonymous: kibibytes(meminfo, "AnonPages")?,
        mapped: kibibytes(meminfo, "Mapped")?,
    })
}

fn meminfo() -> Result<String, BenchError> {
    fs::read_to_string(MEMINFO).map_err(BenchError::io(format!("read {MEMINFO}")))
}

fn malformed() -> BenchError {
    BenchError::Malformed {
        path: MEMINFO.into(),
        expected: "Linux' lines on memory",
    }
}

impl HostMemory {
    /// Reads it, once the page cache of nobody's mappings is dropped, where this process may.
    pub(super) fn read() -> Result<Self, BenchError> {
        drop_caches();
        parse(&meminfo()?).ok_or_else(malformed)
    }
}

/// Gives back what the host holds only because it may be read again. True where this process may do so: only root may.
fn drop_caches() -> bool {
    rustix::fs::sync();
    fs::write("/proc/sys/vm/drop_caches", "3").is_ok()
}

/// What is measured on.
pub(super) fn describe() -> Result<Host, BenchError> {
    let total = kibibytes(&meminfo()?, "MemTotal").ok_or_else(malformed)?;
    let read = |path: &str| fs::read_to_string(path).map(|text| text.trim().to_owned());
    Ok(Host {
        kernel: read("/proc/sys/kernel/osrelease").unwrap_or_default(),
        cpus: std::thread::available_parallelism().map_or(0, std::num::NonZero::get),
        memory_kib: total,
        huge_pages: read("/sys/kernel/mm/transparent_hugepage/enabled").unwrap_or_default(),
        caches_dropped: drop_caches(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAMPLE: &str = "\
MemTotal:        4025336 kB
MemFree:         3883072 kB
MemAvailable:    3872244 kB
AnonPages:          6140 kB
Mapped:             4160 kB
Slab:              16844 kB
KernelStack:        1024 kB
PageTables:          444 kB
SecPageTables:        12 kB
";

    #[test]
    fn meminfo_is_read_by_whole_names() {
        let memory = parse(SAMPLE).unwrap();
        assert_eq!(
            (memory.page_tables, memory.secondary_page_tables),
            (444, 12)
        );
        assert_eq!(memory.available, 3_872_244);
        let older = SAMPLE.replace("SecPageTables", "Other");
        assert_eq!(parse(&older).unwrap().secondary_page_tables, 0);
        assert_eq!(parse(&SAMPLE.replace("Slab:", "Slub:")), None);
    }

    #[test]
    fn this_host_is_described() {
        let host = describe().unwrap();
        assert!(host.memory_kib > 0 && host.cpus > 0 && !host.kernel.is_empty());
        assert!(HostMemory::read().unwrap().available <= host.memory_kib);
    }
}
