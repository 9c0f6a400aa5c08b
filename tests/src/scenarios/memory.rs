//! Measures the memory that guests take of the lab's host.

use std::fs;

use crate::result::Failure;

const PAGE_KIB: u64 = 4;

fn read(path: &str) -> Result<String, Failure> {
    fs::read_to_string(path).map_err(Failure::io(path))
}

/// Drops the page cache, and returns how many KiB the lab's host could give to new guests. Pages on the lists of its
/// CPUs are free, too, and are not in `MemAvailable`.
pub fn available() -> Result<u64, Failure> {
    // Dirty pages cannot be dropped, so they are written first.
    rustix::fs::sync();
    fs::write("/proc/sys/vm/drop_caches", "3").map_err(Failure::io("drop caches"))?;
    let (meminfo, zoneinfo) = (read("/proc/meminfo")?, read("/proc/zoneinfo")?);
    let numbers = |text: &str, name: &str| -> Vec<u64> {
        let lines = text.lines();
        let of_name = lines.filter_map(|line| line.trim_start().strip_prefix(name));
        of_name
            .filter_map(|rest| rest.split_whitespace().next()?.parse().ok())
            .collect()
    };
    let at_hand: u64 = numbers(&zoneinfo, "count:").into_iter().sum();
    match numbers(&meminfo, "MemAvailable:")[..] {
        [available] => Ok(available + at_hand * PAGE_KIB),
        _ => Failure::claim("the host does not say what memory is available"),
    }
}

/// The MiB that each of `count` guests takes, by the KiB that were available before and after.
pub fn mib_each(before: u64, after: u64, count: u32) -> f64 {
    let kib = before.cast_signed() - after.cast_signed();
    // The lab's hosts have less than 2 TiB.
    f64::from(i32::try_from(kib).unwrap_or(i32::MAX)) / 1024.0 / f64::from(count)
}

/// Has KVM of the lab's host use the MMU that is KVM's default. `guest/build.sh` explains why the lab otherwise uses
/// the other one.
pub fn newer_mmu() -> Result<(), Failure> {
    fs::write("/sys/module/kvm/parameters/tdp_mmu", "Y").map_err(Failure::io("choose the MMU"))
}
