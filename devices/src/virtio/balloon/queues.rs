//! Which queue is for what (VIRTIO 1.2, 5.5.2).

use virtio_queue::{Queue, QueueT};

use super::super::{ActivateError, RingPosition};
use super::config_space::{F_FREE_PAGE_HINT, F_REPORTING, F_STATS_VQ, bit};

/// Queues of a device, whatever it offers.
pub(super) const QUEUES: usize = 5;
/// The first queue that is there only for a feature.
pub(super) const FIRST_OPTIONAL: usize = 2;

/// What a queue is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    /// Pages go into the balloon.
    Inflate,
    /// Pages leave it.
    Deflate,
    /// The driver says how its memory is used.
    Statistics,
    /// Free pages, while the host wants to know of them.
    Hinting,
    /// Free pages, without end.
    Reporting,
}

/// In the order of their numbers.
const ROLES: [Role; QUEUES] = [
    Role::Inflate,
    Role::Deflate,
    Role::Statistics,
    Role::Hinting,
    Role::Reporting,
];

fn feature(role: Role) -> Option<u32> {
    match role {
        Role::Inflate | Role::Deflate => None,
        Role::Statistics => Some(F_STATS_VQ),
        Role::Hinting => Some(F_FREE_PAGE_HINT),
        Role::Reporting => Some(F_REPORTING),
    }
}

/// The role of each queue for a driver that accepted `features` and made queues ready.
///
/// By the standard each role has its number, also where a lower one is not used. Linux (since 5.1), and the devices it
/// grew up with, number the queues that are used without a gap. Both are the same where there is no gap; else the
/// queues that are ready show which numbering it is.
pub(super) fn roles(features: u64, is_ready: impl Fn(usize) -> bool) -> [Option<Role>; QUEUES] {
    let agreed = |role: Role| feature(role).is_none_or(|feature| features & bit(feature) != 0);
    let standard = ROLES.map(|role| agreed(role).then_some(role));
    let is_standard = (0..)
        .zip(standard)
        .skip(FIRST_OPTIONAL)
        .all(|(queue, role)| role.is_none() || is_ready(queue));
    if is_standard {
        return standard;
    }
    let mut compact = [None; QUEUES];
    for (slot, role) in compact
        .iter_mut()
        .zip(ROLES.into_iter().filter(|role| agreed(*role)))
    {
        *slot = Some(role);
    }
    compact
}

/// The statistics buffer that a device keeps as it starts: none, but of rings that were in use before the guest was
/// saved.
///
/// # Errors
/// Where the rings say that the device keeps other buffers than it does.
pub(super) fn kept_buffer<'a>(
    restored: Option<u16>,
    queues: impl Iterator<Item = &'a (Role, Queue)>,
) -> Result<Option<u16>, ActivateError> {
    let mut kept = None;
    for (role, queue) in queues {
        match (role, RingPosition::of(queue).in_flight()) {
            (_, 0) => {}
            (Role::Statistics, 1) => {
                kept = restored.filter(|head| *head < queue.size());
                if kept.is_none() {
                    return Err(ActivateError::NoStatisticsBuffer);
                }
            }
            (_, _) => return Err(ActivateError::InFlight),
        }
    }
    if kept == restored {
        Ok(kept)
    } else {
        Err(ActivateError::StrayBuffer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(features: &[u32], ready: &[usize]) -> Vec<(usize, Role)> {
        let features = features
            .iter()
            .fold(0, |bits, feature| bits | bit(*feature));
        let roles = roles(features, |queue| ready.contains(&queue));
        let numbered = roles.into_iter().enumerate();
        numbered
            .filter_map(|(queue, role)| Some((queue, role?)))
            .skip(FIRST_OPTIONAL)
            .collect()
    }

    #[test]
    fn queues_are_numbered_by_the_standard_or_without_gaps_as_those_that_are_ready_tell() {
        use Role::{Hinting, Reporting, Statistics};
        let all = [F_STATS_VQ, F_FREE_PAGE_HINT, F_REPORTING];
        let in_order = [(2, Statistics), (3, Hinting), (4, Reporting)];
        assert_eq!(of(&all, &[0, 1, 2, 3, 4]), in_order);
        assert_eq!(of(&[F_REPORTING], &[0, 1, 4]), [(4, Reporting)]);
        assert_eq!(of(&[F_REPORTING], &[0, 1, 2]), [(2, Reporting)]);
        let two = [F_FREE_PAGE_HINT, F_REPORTING];
        assert_eq!(of(&two, &[0, 1, 3, 4]), [(3, Hinting), (4, Reporting)]);
        assert_eq!(of(&two, &[0, 1, 2, 3]), [(2, Hinting), (3, Reporting)]);
        assert_eq!(of(&[F_STATS_VQ], &[0, 1, 2]), [(2, Statistics)]);
        assert_eq!(of(&[], &[0, 1, 2, 3, 4]), []);
    }

    #[test]
    fn every_role_that_was_agreed_on_has_one_queue_whatever_is_ready() {
        for features in 0..64u64 {
            for ready in 0..32u32 {
                let roles = roles(features, |queue| ready & (1 << queue) != 0);
                for role in ROLES {
                    let count = roles.iter().filter(|has| **has == Some(role)).count();
                    let agreed = feature(role).is_none_or(|f| features & bit(f) != 0);
                    assert_eq!(
                        count,
                        usize::from(agreed),
                        "{features:#x} {ready:#x} {role:?}"
                    );
                }
            }
        }
    }
}
