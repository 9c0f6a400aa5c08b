//! Limits of the host that bound how many guests it holds, and how large.

use std::fmt::Display;
use std::fs;

use rustix::process::{Resource, getrlimit};

use super::check::Check;
use host::report::chain;

const MAPPINGS: &str = "max_map_count";
const OPEN_FILES: &str = "open_files";
const LOCKED_MEMORY: &str = "locked_memory";
const HUGE_PAGES: &str = "transparent_huge_pages";
const MEMORY: &str = "memory";

/// Linux's default. A guest whose every second page is a mapping of its own needs one for each 4 KiB: enough for 128
/// MiB at worst.
const LEAST_MAPPINGS: u64 = 65_530;
/// Linux's default of the soft limit.
const LEAST_OPEN_FILES: u64 = 1024;
/// Linux's default since 5.16.
const LEAST_LOCKED_MEMORY: u64 = 8 << 20;
/// Enough for a few guests and the host's page cache.
const LEAST_MEMORY: u64 = 512 << 20;

pub(super) fn checks() -> Vec<Check> {
    vec![
        mappings(),
        open_files(getrlimit(Resource::Nofile).current),
        locked_memory(getrlimit(Resource::Memlock).current),
        huge_pages(),
        memory(),
    ]
}

fn unread(name: &'static str, path: &str, why: impl Display) -> Check {
    let found = format!("{path} cannot be read: {why}");
    Check::warn(name, found, "mount /proc")
}

fn mappings() -> Check {
    const PATH: &str = "/proc/sys/vm/max_map_count";
    let text = match fs::read_to_string(PATH) {
        Ok(text) => text,
        Err(error) => return unread(MAPPINGS, PATH, chain(&error)),
    };
    match text.trim().parse::<u64>() {
        Ok(count) if count >= LEAST_MAPPINGS => {
            Check::ok(MAPPINGS, format!("{count} mappings a process"))
        }
        Ok(count) => Check::warn(
            MAPPINGS,
            format!("{count} mappings a process: large guests share fewer pages"),
            format!("sysctl -w vm.max_map_count={LEAST_MAPPINGS}"),
        ),
        Err(error) => unread(MAPPINGS, PATH, chain(&error)),
    }
}

fn open_files(limit: Option<u64>) -> Check {
    let found = describe(limit, "files a process", 1);
    match limit {
        Some(limit) if limit < LEAST_OPEN_FILES => {
            Check::warn(OPEN_FILES, found, format!("ulimit -n {LEAST_OPEN_FILES}"))
        }
        Some(_) | None => Check::ok(OPEN_FILES, found),
    }
}

fn locked_memory(limit: Option<u64>) -> Check {
    let found = describe(limit, "KiB a user", 1024);
    match limit {
        Some(limit) if limit < LEAST_LOCKED_MEMORY => Check::warn(
            LOCKED_MEMORY,
            format!("{found}: before Linux 5.12 the rings of io_uring count against it"),
            format!("ulimit -l {}", LEAST_LOCKED_MEMORY / 1024),
        ),
        Some(_) | None => Check::ok(LOCKED_MEMORY, found),
    }
}

fn describe(limit: Option<u64>, unit: &str, bytes: u64) -> String {
    match limit {
        Some(limit) => format!("{} {unit}", limit / bytes),
        None => "unlimited".to_owned(),
    }
}

/// Reports the mode of transparent huge pages. Every mode is fine, because guests have small pages unless they are
/// configured otherwise; the mode explains how much memory such guests take.
fn huge_pages() -> Check {
    let text = fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled");
    let mode = text.as_deref().ok().and_then(chosen);
    Check::ok(
        HUGE_PAGES,
        match mode {
            Some(mode) => format!("{mode}; guests have 4 KiB pages unless they ask for huge ones"),
            None => "the kernel has none".to_owned(),
        },
    )
}

/// The bracketed word of a kernel setting (`always [madvise] never`).
fn chosen(text: &str) -> Option<&str> {
    text.split_once('[')?
        .1
        .split_once(']')
        .map(|(chosen, _)| chosen)
}

fn memory() -> Check {
    const PATH: &str = "/proc/meminfo";
    let text = match fs::read_to_string(PATH) {
        Ok(text) => text,
        Err(error) => return unread(MEMORY, PATH, chain(&error)),
    };
    let bytes = |key| kibibytes(&text, key).map(|kib| kib.saturating_mul(1024));
    let (Some(available), Some(total)) = (bytes("MemAvailable:"), bytes("MemTotal:")) else {
        return unread(MEMORY, PATH, "no MemAvailable or MemTotal");
    };
    let found = format!("{} MiB available of {}", available >> 20, total >> 20);
    if available < LEAST_MEMORY {
        Check::warn(MEMORY, found, "free some memory before guests start")
    } else {
        Check::ok(MEMORY, found)
    }
}

/// A value of `/proc/meminfo`, in KiB.
fn kibibytes(meminfo: &str, key: &str) -> Option<u64> {
    let value = meminfo.lines().find_map(|line| line.strip_prefix(key))?;
    value.strip_suffix("kB")?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::super::Status;
    use super::*;

    #[test]
    fn limits_below_the_defaults_of_linux_are_warned_of() {
        for (check, status) in [
            (open_files(Some(256)), Status::Warn),
            (open_files(Some(1024)), Status::Ok),
            (open_files(None), Status::Ok),
            (locked_memory(Some(64 << 10)), Status::Warn),
            (locked_memory(Some(8 << 20)), Status::Ok),
            (locked_memory(None), Status::Ok),
        ] {
            assert_eq!(check.status, status, "{check:?}");
            assert_eq!(check.advice.is_some(), status != Status::Ok, "{check:?}");
        }
    }

    #[test]
    fn kernel_files_are_read_as_the_kernel_writes_them() {
        assert_eq!(chosen("always [madvise] never\n"), Some("madvise"));
        assert_eq!(chosen("nothing\n"), None);
        let meminfo = "MemTotal:       16384 kB\nMemFree:  1 kB\nMemAvailable:    8192 kB\n";
        assert_eq!(kibibytes(meminfo, "MemTotal:"), Some(16384));
        assert_eq!(kibibytes(meminfo, "MemAvailable:"), Some(8192));
        assert_eq!(kibibytes(meminfo, "Swap:"), None);
    }
}
