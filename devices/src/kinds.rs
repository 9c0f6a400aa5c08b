//! The table of all kinds of devices.

use crate::legacy::{acpi_pm, boot_timer, i8042, pvpanic, rtc, serial};
use crate::lifecycle::DeviceKind;
use crate::virtio::{balloon, block, mmio, net, pmem, rng, vsock};
use crate::{vmclock, vmgenid};

/// All kinds. A snapshot with a state of a kind that is not here is refused.
pub const KINDS: [&DeviceKind; 15] = [
    &acpi_pm::KIND,
    &balloon::KIND,
    &block::KIND,
    &boot_timer::KIND,
    &i8042::KIND,
    &mmio::KIND,
    &net::KIND,
    &pmem::KIND,
    &pvpanic::KIND,
    &rng::KIND,
    &rtc::KIND,
    &serial::KIND,
    &vmclock::KIND,
    &vmgenid::KIND,
    &vsock::KIND,
];

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::lifecycle::StateKey;

    #[test]
    fn no_two_kinds_have_a_name_a_state_or_a_group_of_metrics_in_common() {
        let mut names = BTreeSet::new();
        let mut keys = BTreeSet::new();
        let mut groups = BTreeSet::new();
        for kind in KINDS {
            assert!(names.insert(kind.name), "{kind:?}");
            match kind.state {
                StateKey::Nothing => {}
                StateKey::One(key) | StateKey::ById(key) | StateKey::InOrder(key) => {
                    assert!(keys.insert(key), "{kind:?}");
                }
            }
            if let Some(group) = kind.metrics {
                assert!(groups.insert(group.name), "{kind:?}");
            }
        }
        // The format of snapshots: what is renamed or left out here cannot be read any more.
        let expected = [
            "balloon",
            "clock",
            "drives",
            "entropy",
            "generation",
            "keyboard",
            "network",
            "pmem",
            "rtc",
            "serial",
            "transports",
            "vsock",
        ];
        assert_eq!(keys, expected.into());
    }
}
