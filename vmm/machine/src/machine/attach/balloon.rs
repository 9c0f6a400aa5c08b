//! The balloon of a machine.

use std::sync::{Arc, Mutex};

use devices::virtio::balloon::{GiveBack, VirtioBalloon};
use vm_memory::Address;

use super::builder::Builder;
use super::events::new_interrupt;
use crate::machine::error::{StartError, host};
use config::{BalloonConfig, VmConfig};
use kvm::layout::HUGETLBFS_PAGE;
use memshare::PAGE_SIZE;

/// Its name among the devices.
pub(in crate::machine) const ID: &str = "balloon";

/// Adds the balloon that is asked for, or, where all is to be shared, one by which the guest reports the pages that it
/// frees: that is the better part of what a guest need not hold.
pub(super) fn attach(builder: &mut Builder<'_>, config: &VmConfig) -> Result<(), StartError> {
    let unasked = (builder.plan.is_all() && builder.has_room()).then(BalloonConfig::reporting);
    let page = if config.machine_config.has_hugetlbfs() {
        HUGETLBFS_PAGE
    } else {
        PAGE_SIZE
    };
    let Some(config) = config.balloon.or(unasked) else {
        return Ok(());
    };
    let memory = builder.plan.memory().clone();
    let give_back: GiveBack = Arc::new(move |address, len| {
        let (address, len) = whole_pages(address.raw_value(), len, page);
        memory.give_back(address, len)
    });
    let device = VirtioBalloon::new(&config.into(), give_back, new_interrupt("balloon")?)
        .map_err(host("balloon"))?;
    builder.add_virtio(ID, Arc::new(Mutex::new(device)))?;
    // A guest that reported single pages would do so for nothing where the host has none of that size.
    builder.attached.reports_free_pages = config.free_page_reporting && page == PAGE_SIZE;
    Ok(())
}

/// The whole pages of a range: first address, and length in bytes, which may be 0.
fn whole_pages(address: u64, len: u64, page: u64) -> (u64, u64) {
    let start = address.checked_next_multiple_of(page);
    let end = address.saturating_add(len) / page * page;
    start.map_or((address, 0), |start| (start, end.saturating_sub(start)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_pages_go_back() {
        const HUGE: u64 = HUGETLBFS_PAGE;
        let cases = [
            ((0, HUGE), (0, HUGE)),
            ((HUGE, 3 * HUGE), (HUGE, 3 * HUGE)),
            ((4096, HUGE), (HUGE, 0)),
            ((HUGE - 4096, HUGE + 8192), (HUGE, HUGE)),
            ((HUGE, HUGE - 4096), (HUGE, 0)),
            ((u64::MAX - 4095, 4096), (u64::MAX - 4095, 0)),
        ];
        for ((address, len), expected) in cases {
            assert_eq!(
                whole_pages(address, len, HUGE),
                expected,
                "{address:#x} {len:#x}"
            );
        }
        assert_eq!(whole_pages(8192, 4096, PAGE_SIZE), (8192, 4096));
    }
}
