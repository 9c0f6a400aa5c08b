//! Huge pages of the host for a test that needs some.

use std::fs::{self, File};

use rustix::fs::{FlockOperation, flock};

use crate::{because, unless_root};

const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";

/// Huge pages of 2 MiB that the host keeps for as long as this lives.
#[derive(Debug)]
pub struct HugePages {
    added: u64,
}

/// Held while the number of pages is changed, as other tests change it, too.
fn lock() -> Option<File> {
    let file = File::open(format!("{POOL}/nr_hugepages")).ok()?;
    flock(&file, FlockOperation::LockExclusive).ok()?;
    Some(file)
}

fn number(name: &str) -> Option<u64> {
    let text = fs::read_to_string(format!("{POOL}/{name}")).ok()?;
    text.trim().parse().ok()
}

fn set(pages: u64) -> std::io::Result<()> {
    fs::write(format!("{POOL}/nr_hugepages"), pages.to_string())
}

impl HugePages {
    /// Has the host reserve so many more. `None` where it cannot; then the calling test is recorded as not run.
    pub fn reserve(pages: u64) -> Option<Self> {
        if !unless_root() {
            return None;
        }
        let _lock = lock();
        let Some(before) = number("nr_hugepages") else {
            because("the host has no huge pages of 2 MiB");
            return None;
        };
        let all = before + pages;
        let is_reserved = set(all).is_ok() && number("nr_hugepages") == Some(all);
        if !is_reserved {
            // The host may have reserved some of them.
            let _ = set(before);
            because(&format!("the host cannot reserve {pages} huge pages"));
            return None;
        }
        Some(Self { added: pages })
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        let _lock = lock();
        if let Some(now) = number("nr_hugepages") {
            // Nothing but memory is lost where this fails.
            let _ = set(now.saturating_sub(self.added));
        }
    }
}
