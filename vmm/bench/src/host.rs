//! The host's memory, by `/proc/meminfo` and `/proc/zoneinfo`.

use std::fs;

use serde::{Deserialize, Serialize};

use super::error::BenchError;

const MEMINFO: &str = "/proc/meminfo";
const ZONEINFO: &str = "/proc/zoneinfo";
const PAGE_KIB: u64 = 4;

/// The host that was measured on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Host {
    /// Its kernel.
    pub kernel: String,
    /// Its CPUs.
    pub cpus: usize,
    /// Its memory.
    pub memory_kib: u64,
    /// Its policy on transparent huge pages.
    pub huge_pages: String,
    /// Whether the page cache was dropped before each reading. Where it was not, readings may contain cached pages of
    /// files.
    pub caches_dropped: bool,
}

/// The host's memory at one moment, in KiB.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostMemory {
    /// What could be allocated without swapping (`MemAvailable`).
    pub available: u64,
    /// Free pages on the lists of each CPU, for its next allocations. `available` does not contain them: they are some
    /// MiB, and their number changes all the time.
    pub at_hand: u64,
    /// Page tables of all processes.
    pub page_tables: u64,
    /// Page tables of all guests, which KVM keeps; 0 before Linux 6.1, which does not count them.
    pub secondary_page_tables: u64,
    /// The kernel's small objects.
    pub slab: u64,
    /// Stacks of threads in the kernel.
    pub kernel_stack: u64,
    /// Anonymous memory.
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

/// The pages on the lists of all CPUs: the sum of `count:` of each `cpu:` of each zone.
fn pages_at_hand(zoneinfo: &str) -> u64 {
    zoneinfo
        .lines()
        .filter_map(|line| line.trim_start().strip_prefix("count:"))
        .filter_map(|count| count.trim().parse::<u64>().ok())
        .sum()
}

fn parse(meminfo: &str, zoneinfo: &str) -> Option<HostMemory> {
    Some(HostMemory {
        available: kibibytes(meminfo, "MemAvailable")?,
        at_hand: pages_at_hand(zoneinfo) * PAGE_KIB,
        page_tables: kibibytes(meminfo, "PageTables")?,
        secondary_page_tables: kibibytes(meminfo, "SecPageTables").unwrap_or(0),
        slab: kibibytes(meminfo, "Slab")?,
        kernel_stack: kibibytes(meminfo, "KernelStack")?,
        anonymous: kibibytes(meminfo, "AnonPages")?,
        mapped: kibibytes(meminfo, "Mapped")?,
    })
}

fn read(path: &str) -> Result<String, BenchError> {
    fs::read_to_string(path).map_err(BenchError::io(format!("read {path}")))
}

fn malformed() -> BenchError {
    BenchError::Malformed {
        path: MEMINFO.into(),
        expected: "Linux' lines on memory",
    }
}

impl HostMemory {
    /// The memory that could be allocated.
    pub(super) fn unused(&self) -> u64 {
        self.available + self.at_hand
    }

    /// Drops the page cache that nobody maps, where this process may, and reads the memory.
    pub(super) fn read() -> Result<Self, BenchError> {
        drop_caches();
        // This adds the counters of each CPU to the host's; only root may request it.
        let _ = fs::write("/proc/sys/vm/stat_refresh", "1");
        parse(&read(MEMINFO)?, &read(ZONEINFO)?).ok_or_else(malformed)
    }
}

/// Drops the page cache, and returns whether this process may do so: only root may.
fn drop_caches() -> bool {
    rustix::fs::sync();
    fs::write("/proc/sys/vm/drop_caches", "3").is_ok()
}

/// Describes this host.
pub(super) fn describe() -> Result<Host, BenchError> {
    let total = kibibytes(&read(MEMINFO)?, "MemTotal").ok_or_else(malformed)?;
    // These are only shown, so that an error leaves them empty.
    let word = |path| read(path).map_or(String::new(), |text| text.trim().to_owned());
    Ok(Host {
        kernel: word("/proc/sys/kernel/osrelease"),
        cpus: std::thread::available_parallelism().map_or(0, std::num::NonZero::get),
        memory_kib: total,
        huge_pages: word("/sys/kernel/mm/transparent_hugepage/enabled"),
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

    const ZONES: &str = "\
Node 0, zone      DMA
  pages free     2816
  pagesets
    cpu: 0
              count: 0
              high:  0
              batch: 1
Node 0, zone   Normal
        count_of_nothing 7
    cpu: 0
              count: 500
              high:  1800
    cpu: 1
              count: 100
";

    #[test]
    fn meminfo_is_read_by_whole_names() {
        let memory = parse(SAMPLE, ZONES).unwrap();
        assert_eq!(
            (memory.at_hand, memory.unused()),
            (4 * 600, 3_872_244 + 2400)
        );
        assert_eq!(
            (memory.page_tables, memory.secondary_page_tables),
            (444, 12)
        );
        assert_eq!(memory.available, 3_872_244);
        let older = SAMPLE.replace("SecPageTables", "Other");
        assert_eq!(parse(&older, "").unwrap().secondary_page_tables, 0);
        assert_eq!(parse(&SAMPLE.replace("Slab:", "Slub:"), ZONES), None);
    }

    #[test]
    fn this_host_is_described() {
        let host = describe().unwrap();
        assert!(host.memory_kib > 0 && host.cpus > 0 && !host.kernel.is_empty());
        assert!(HostMemory::read().unwrap().available <= host.memory_kib);
    }
}
