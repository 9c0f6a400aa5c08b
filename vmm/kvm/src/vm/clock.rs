//! The clocks of a guest across a save and a load: kvm-clock, and the time-stamp counters (TSC) of its vCPUs.
//!
//! A guest reads one or the other: Linux prefers the TSC where the processor says that it never stops, and kvm-clock
//! elsewhere. So both have to go on from the same moment and by the same time, as Linux's Documentation/virt/kvm/
//! devices/vcpu.rst (4.1) describes it: KVM reports kvm-clock, the host's TSC and the host's time of one moment, the
//! guest's TSC at that moment is the host's plus an offset, and at the load the offset is chosen so that the guest's
//! TSC has run for as long as kvm-clock.
//!
//! ```text
//! save:  clock ── of one moment ──> host TSC + offset of the vCPU = its TSC
//! load:  KVM_SET_CLOCK ── forward by the host's time since the save, or not at all
//!        TSC of each vCPU ── forward by as much as kvm-clock
//! ```

use std::time::{Duration, SystemTime};

use kvm_bindings::{KVM_CLOCK_HOST_TSC, KVM_CLOCK_REALTIME, kvm_clock_data};
use kvm_ioctls::{Cap, VmFd};

use super::error::VmError;

/// The latest time of kvm-clock in nanoseconds after the boot: Linux reckons with signed numbers.
const LATEST: u64 = i64::MAX.cast_unsigned();

/// Why a clock cannot be restored.
#[derive(Debug, thiserror::Error)]
pub enum ClockError {
    /// No clock of a guest is that far from its boot.
    #[error(
        "the state says that the guest's clock was {clock} ns after its boot when the host's was {realtime} ns after 1970: no guest has run for so long"
    )]
    Impossible {
        /// kvm-clock, in nanoseconds.
        clock: u64,
        /// The host's time, in nanoseconds since 1970.
        realtime: u64,
    },
    /// KVM refuses it.
    #[error(transparent)]
    Vm(#[from] VmError),
}

/// Where the clocks of a loaded guest go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClockOnLoad {
    /// Where they would be if the guest had run on, so that its wall clock is right.
    Follows,
    /// Where they were when it was saved.
    Kept,
}

/// kvm-clock at a moment, and the host's TSC then.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Moment {
    /// Nanoseconds.
    pub(super) clock: u64,
    /// `None` where the host's own clock is not its TSC.
    host_tsc: Option<u64>,
}

impl Moment {
    pub(super) fn of(data: &kvm_clock_data) -> Self {
        let has_tsc = data.flags & KVM_CLOCK_HOST_TSC != 0;
        Self {
            clock: data.clock,
            host_tsc: has_tsc.then_some(data.host_tsc),
        }
    }

    /// The present one.
    pub(super) fn now(fd: &VmFd) -> Result<Self, VmError> {
        let data = fd.get_clock().map_err(VmError::kvm("KVM_GET_CLOCK"))?;
        Ok(Self::of(&data))
    }

    /// Nanoseconds from an earlier moment of the guest's.
    pub(super) fn since(self, earlier: Self) -> u64 {
        self.clock.saturating_sub(earlier.clock)
    }

    /// The TSC of a vCPU that has this offset to the host's.
    pub(super) fn tsc(self, offset: u64) -> Option<u64> {
        self.host_tsc.map(|tsc| tsc.wrapping_add(offset))
    }

    /// The offset of a vCPU that has this TSC.
    pub(super) fn offset(self, tsc: u64) -> Option<u64> {
        self.host_tsc.map(|host| tsc.wrapping_sub(host))
    }
}

/// A TSC that has run on for `ns` nanoseconds. It wraps, as the processor's does.
pub(super) fn advanced(tsc: u64, khz: u32, ns: u64) -> u64 {
    let ticks = u128::from(ns) * u128::from(khz) / 1_000_000;
    // What is above 64 bits is whole rounds of the counter.
    tsc.wrapping_add((ticks & u128::from(u64::MAX)) as u64)
}

fn host_time() -> u64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    now.map_or(0, |since| {
        u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
    })
}

/// The clock of a guest that is paused, always with the host's time.
pub(super) fn save(fd: &VmFd) -> Result<kvm_clock_data, VmError> {
    let mut data = fd.get_clock().map_err(VmError::kvm("KVM_GET_CLOCK"))?;
    if data.flags & KVM_CLOCK_REALTIME == 0 {
        // KVM has read no time of the host with it: it is of before Linux 5.16, or the host's clock is not its TSC.
        data.realtime = host_time();
        data.flags |= KVM_CLOCK_REALTIME;
    }
    Ok(data)
}

/// What KVM is to be told, and why the clock does not follow where it should.
#[derive(Debug, PartialEq, Eq)]
struct Setting {
    clock: u64,
    /// The host's time that goes with it, for KVM to add the time since.
    realtime: Option<u64>,
    kept_because: Option<String>,
}

/// How to set the clock that was saved, at `now` on a host whose KVM can add the time since the save or cannot.
fn setting(
    saved: &kvm_clock_data,
    wanted: ClockOnLoad,
    now: u64,
    kvm_adds: bool,
) -> Result<Setting, ClockError> {
    let refused = ClockError::Impossible {
        clock: saved.clock,
        realtime: saved.realtime,
    };
    if saved.clock > LATEST {
        return Err(refused);
    }
    let kept = |kept_because| Setting {
        clock: saved.clock,
        realtime: None,
        kept_because,
    };
    if wanted == ClockOnLoad::Kept {
        return Ok(kept(None));
    }
    if saved.flags & KVM_CLOCK_REALTIME == 0 {
        return Ok(kept(Some(
            "the snapshot does not say at what time it was made".to_owned(),
        )));
    }
    let Some(gone) = now.checked_sub(saved.realtime) else {
        let ahead = Duration::from_nanos(saved.realtime - now);
        return Ok(kept(Some(format!(
            "the snapshot is from {} s in this host's future: one of the hosts' clocks is wrong",
            ahead.as_secs()
        ))));
    };
    let clock = saved.clock.checked_add(gone);
    let Some(clock) = clock.filter(|clock| *clock <= LATEST) else {
        return Err(refused);
    };
    Ok(if kvm_adds {
        Setting {
            clock: saved.clock,
            realtime: Some(saved.realtime),
            kept_because: None,
        }
    } else {
        Setting {
            clock,
            realtime: None,
            kept_because: None,
        }
    })
}

/// Sets kvm-clock of a VM that has not run.
///
/// # Errors
/// `Impossible`, `Vm`.
pub(super) fn restore(
    fd: &VmFd,
    saved: &kvm_clock_data,
    wanted: ClockOnLoad,
) -> Result<(), ClockError> {
    // Since Linux 5.16 KVM adds the time itself, at the moment when it sets the clock.
    let flags = fd.check_extension_int(Cap::AdjustClock);
    let kvm_adds = flags > 0 && flags.cast_unsigned() & KVM_CLOCK_REALTIME != 0;
    let setting = setting(saved, wanted, host_time(), kvm_adds)?;
    match &setting.kept_because {
        Some(why) => tracing::warn!("the guest's clock goes on where it was saved: {why}"),
        None if wanted == ClockOnLoad::Follows && !kvm_adds => tracing::info!(
            "the guest's clock follows within milliseconds: KVM lacks KVM_CLOCK_REALTIME (Linux 5.16)"
        ),
        None => {}
    }
    let data = kvm_clock_data {
        clock: setting.clock,
        flags: setting.realtime.map_or(0, |_| KVM_CLOCK_REALTIME),
        realtime: setting.realtime.unwrap_or_default(),
        ..Default::default()
    };
    fd.set_clock(&data).map_err(VmError::kvm("KVM_SET_CLOCK"))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;
    const NOW: u64 = 1_800_000_000 * SECOND;

    fn saved(clock: u64, realtime: u64) -> kvm_clock_data {
        kvm_clock_data {
            clock,
            flags: KVM_CLOCK_REALTIME,
            realtime,
            ..Default::default()
        }
    }

    #[test]
    fn the_clock_follows_the_host_or_stays_where_it_was() {
        let hour_ago = saved(7 * SECOND, NOW - 3600 * SECOND);
        let set = |wanted, kvm_adds| setting(&hour_ago, wanted, NOW, kvm_adds).unwrap();
        let by_kvm = set(ClockOnLoad::Follows, true);
        assert_eq!(
            (by_kvm.clock, by_kvm.realtime, by_kvm.kept_because),
            (7 * SECOND, Some(NOW - 3600 * SECOND), None)
        );
        let by_hand = set(ClockOnLoad::Follows, false);
        assert_eq!(
            (by_hand.clock, by_hand.realtime, by_hand.kept_because),
            (3607 * SECOND, None, None)
        );
        for kvm_adds in [false, true] {
            let kept = set(ClockOnLoad::Kept, kvm_adds);
            assert_eq!(
                (kept.clock, kept.realtime, kept.kept_because),
                (7 * SECOND, None, None)
            );
        }
    }

    #[test]
    fn a_clock_that_cannot_follow_is_kept_with_a_reason_and_an_impossible_one_is_refused() {
        let follow = |saved: &kvm_clock_data| setting(saved, ClockOnLoad::Follows, NOW, true);
        let old = kvm_clock_data {
            flags: 0,
            ..saved(7, NOW - 9)
        };
        for (data, why) in [
            (old, "at what time"),
            (saved(7, NOW + 5 * SECOND), "5 s in this host's future"),
            (saved(7, u64::MAX), "future"),
        ] {
            let kept = follow(&data).unwrap();
            assert_eq!((kept.clock, kept.realtime), (7, None), "{why}");
            assert!(kept.kept_because.unwrap().contains(why), "{why}");
        }
        // A host without a clock of its own says 1970 until it is set.
        assert_eq!(follow(&saved(7, 0)).unwrap().realtime, Some(0));
        for data in [
            saved(u64::MAX, NOW),
            saved(LATEST + 1, NOW),
            saved(LATEST, NOW - 1),
            saved(LATEST - NOW + 1, 0),
        ] {
            let refused = follow(&data).unwrap_err();
            assert!(
                matches!(refused, ClockError::Impossible { .. }),
                "{refused}"
            );
        }
        let kept = setting(&saved(LATEST, 0), ClockOnLoad::Kept, NOW, true);
        assert_eq!(kept.unwrap().clock, LATEST);
    }

    #[test]
    fn a_tsc_runs_as_fast_as_it_is_said_to_and_wraps() {
        assert_eq!(advanced(5, 2_100_000, SECOND), 2_100_000_005);
        assert_eq!(advanced(5, 2_100_000, 0), 5);
        assert_eq!(advanced(u64::MAX, 1_000_000, 3), 2);
        let most = u128::from(u64::MAX) * u128::from(u32::MAX) / 1_000_000;
        let rounds = (most % (1 << 64)) as u64;
        assert_eq!(advanced(9, u32::MAX, u64::MAX), rounds.wrapping_add(9));
    }

    #[test]
    fn an_offset_is_what_makes_the_tsc_of_the_host_that_of_the_vcpu() {
        let moment = Moment {
            clock: 10,
            host_tsc: Some(1000),
        };
        assert_eq!(moment.tsc(5), Some(1005));
        assert_eq!(moment.offset(5), Some(5u64.wrapping_sub(1000)));
        assert_eq!(moment.tsc(moment.offset(5).unwrap()), Some(5));
        let without = Moment::of(&saved(10, 0));
        assert_eq!((without.tsc(5), without.offset(5)), (None, None));
        assert_eq!(moment.since(Moment { clock: 4, ..moment }), 6);
        assert_eq!(
            moment.since(Moment {
                clock: 40,
                ..moment
            }),
            0
        );
    }
}
