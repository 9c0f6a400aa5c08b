//! Extrapolates how many guests a larger host holds, from the memory that each further guest took of this one.

use serde::{Deserialize, Serialize};

use super::number::float;

/// The memory of the hosts that are extrapolated to, in GiB.
pub(super) const HOSTS: [u64; 2] = [64, 256];
/// The part of a host's memory that guests may take; the rest is for the host itself.
const FOR_GUESTS: f64 = 0.96;

/// How the figures are computed, as a text below the table.
pub(super) const METHOD: &str = "Guests of a host: (96 % of its memory - fixed) / each further guest. That is the median of what each guest but the first has added to the memory in\nuse, \
so that pages of files which one of them is the first to map are not taken for its own; fixed is the median of what is left of the memory in use\nwithout that much for each guest. \
In use is what the host's free and reclaimable memory was before, less what it is (MemAvailable, and the\npages that CPUs keep at hand).";

/// The memory that guests take: `fixed_kib` for all together, and `guest_kib` for each.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Line {
    /// What the first guest takes for all guests, such as files that all of them map.
    pub fixed_kib: f64,
    /// What each guest takes.
    pub guest_kib: f64,
}

/// How many guests a host holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Extrapolation {
    /// Memory of the host in GiB.
    pub host_gib: u64,
    /// Guests.
    pub guests: u64,
}

/// The median. `None` of no values.
fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let above = values.get(values.len() / 2)?;
    let below = values.get((values.len() - 1) / 2)?;
    Some(f64::midpoint(*below, *above))
}

impl Line {
    /// The line through points (guests, KiB in use), in their order, whose slope is the median of the slopes from one
    /// to the next; through the origin where there is only one. `None` where there are no points, or guests seem to
    /// take nothing, which is noise.
    pub(super) fn through(points: &[(f64, f64)]) -> Option<Self> {
        let slopes = points.iter().zip(points.iter().skip(1));
        let slopes = slopes.map(|(from, to)| (to.1 - from.1) / (to.0 - from.0));
        let line = if let [(guests, used)] = points {
            Self {
                fixed_kib: 0.0,
                guest_kib: used / guests,
            }
        } else {
            let guest_kib = median(slopes.collect())?;
            let left = points
                .iter()
                .map(|(guests, used)| used - guest_kib * guests);
            Self {
                fixed_kib: median(left.collect())?,
                guest_kib,
            }
        };
        (line.guest_kib.is_finite() && line.guest_kib > 0.0).then_some(line)
    }

    /// The number of guests that a host with so much memory holds.
    #[allow(
        clippy::cast_sign_loss,
        reason = "a negative number of guests becomes none"
    )]
    pub(super) fn guests(&self, host_gib: u64) -> u64 {
        let room = float(host_gib << 20) * FOR_GUESTS;
        // Noise can make the fixed part a little less than zero, which makes no room for guests.
        ((room - self.fixed_kib.max(0.0)) / self.guest_kib).max(0.0) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::super::Configuration;
    use super::super::report::tests::run;
    use super::*;

    fn close(a: f64, b: f64) -> bool {
        (a - b).abs() < 1e-6
    }

    #[test]
    fn a_straight_line_is_found_and_what_happens_once_is_no_part_of_its_slope() {
        let line = Line::through(&[(3.0, 130.0), (4.0, 140.0), (5.0, 150.0)]).unwrap();
        assert!(
            close(line.fixed_kib, 100.0) && close(line.guest_kib, 10.0),
            "{line:?}"
        );
        let noisy = [
            (1.0, 11.0),
            (2.0, 20.0),
            (3.0, 31.0),
            (4.0, 81.0),
            (5.0, 91.0),
        ];
        let line = Line::through(&noisy).unwrap();
        assert!(
            close(line.guest_kib, 10.5) && close(line.fixed_kib, 0.5),
            "{line:?}"
        );
    }

    #[test]
    fn one_point_makes_a_line_through_the_origin_and_none_or_no_growth_makes_no_line() {
        let line = Line::through(&[(4.0, 40.0)]).unwrap();
        assert!(close(line.fixed_kib, 0.0) && close(line.guest_kib, 10.0));
        assert_eq!(Line::through(&[]), None);
        assert_eq!(Line::through(&[(1.0, 5.0), (2.0, 5.0)]), None);
        assert_eq!(Line::through(&[(1.0, 5.0), (2.0, 3.0)]), None);
        assert_eq!(Line::through(&[(0.0, 5.0)]), None);
    }

    #[test]
    fn what_the_first_guest_takes_for_all_is_no_part_of_each_further_one() {
        let run = run(Configuration::ShareOff, 40 << 10, 10 << 10);
        let line = run.line.unwrap();
        assert!(close(line.fixed_kib, 40.0 * 1024.0) && close(line.guest_kib, 10.0 * 1024.0));
        // (64 * 1024 * 0.96 - 40) / 10 MiB, cut to whole guests.
        assert_eq!(
            run.extrapolation[0],
            Extrapolation {
                host_gib: 64,
                guests: 6287
            }
        );
        assert_eq!(
            run.extrapolation[1],
            Extrapolation {
                host_gib: 256,
                guests: 25161
            }
        );
    }

    #[test]
    fn a_host_too_small_for_what_is_fixed_holds_no_guest() {
        let line = Line {
            fixed_kib: 2e9,
            guest_kib: 10.0,
        };
        assert_eq!(line.guests(64), 0);
    }
}
