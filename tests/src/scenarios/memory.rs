//! What guests cost the lab's host.

use std::fs;

use crate::result::Failure;

const PAGE_KIB: u64 = 4;

fn read(path: &str) -> Result<String, Failure> {
    fs::read_to_string(path).map_err(Failure::io(path))
}

/// KiB that the lab's host could give to new guests, its page cache dropped. Pages that its CPUs keep at hand are free,
/// too, and not in `MemAvailable`.
pub fn available() -> Result<u64, Failure> {
    // What is still to be written cannot be dropped.
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

/// MiB that each of `count` guests takes, where so many KiB were available before and after.
pub fn mib_each(before: u64, after: u64, count: u32) -> f64 {
    let kib = before.cast_signed() - after.cast_signed();
    // The lab's hosts have less than 2 TiB.
    f64::from(i32::try_from(kib).unwrap_or(i32::MAX)) / 1024.0 / f64::from(count)
}

/// Has KVM of the lab's host use the MMU that it uses where nobody says otherwise: `guest/build.sh` says why the lab
/// does.
pub fn newer_mmu() -> Result<(), Failure> {
    fs::write("/sys/module/kvm/parameters/tdp_mmu", "Y").map_err(Failure::io("choose the MMU"))
}
