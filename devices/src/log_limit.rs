//! A limit on the lines of the log that a guest can cause.
//!
//! A guest can have a device refuse the same thing again and again, a hundred thousand times a second. The first lines
//! say what is wrong, and the rest says no more. So each place in the code whose line a guest can cause by itself logs
//! by [`limited`](crate::limited): some lines at once, then one a second, which says how many were left out before it.

use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// Lines at once.
const BURST: u32 = 10;
/// From one line to the next afterwards.
const PAUSE: Duration = Duration::from_secs(1);

/// The limit of one place in the code.
#[derive(Debug)]
pub struct LogLimit(Mutex<Lines>);

#[derive(Debug)]
struct Lines {
    /// How many may come at once.
    left: u32,
    /// When that was counted; absent before the first line.
    at: Option<Instant>,
    left_out: u64,
}

/// A line may be logged, and says how many were left out before it: nothing where none was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Passed {
    /// Lines that were left out since the last one.
    pub left_out: Option<u64>,
}

impl LogLimit {
    /// Nothing has been logged.
    #[allow(clippy::new_without_default, reason = "it is made in statics alone")]
    pub const fn new() -> Self {
        Self(Mutex::new(Lines {
            left: BURST,
            at: None,
            left_out: 0,
        }))
    }

    /// Whether the next line may be logged.
    pub fn pass(&self) -> Option<Passed> {
        self.pass_at(Instant::now())
    }

    fn pass_at(&self, now: Instant) -> Option<Passed> {
        let mut lines = self.0.lock();
        let at = *lines.at.get_or_insert(now);
        let pauses = now.saturating_duration_since(at).as_secs() / PAUSE.as_secs();
        if pauses > 0 {
            let more = u32::try_from(pauses).unwrap_or(u32::MAX);
            lines.left = lines.left.saturating_add(more).min(BURST);
            lines.at = Some(now);
        }
        if lines.left == 0 {
            lines.left_out += 1;
            return None;
        }
        lines.left -= 1;
        let left_out = std::mem::take(&mut lines.left_out);
        Some(Passed {
            left_out: (left_out > 0).then_some(left_out),
        })
    }
}

/// Logs an event of [`tracing`] at a level, such as `warn`, if the limit of this place in the code lets it.
#[macro_export]
macro_rules! limited {
    ($level:ident, $($event:tt)+) => {{
        static LIMIT: $crate::log_limit::LogLimit = $crate::log_limit::LogLimit::new();
        if let Some(passed) = LIMIT.pass() {
            ::tracing::$level!(left_out = passed.left_out, $($event)+);
        }
    }};
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn some_lines_come_at_once_and_then_one_a_second_with_what_was_left_out() {
        let limit = LogLimit::new();
        let begun = Instant::now();
        let pass = |ms| limit.pass_at(begun + Duration::from_millis(ms));
        let passed = |left_out| Some(Passed { left_out });
        for _ in 0..BURST {
            assert_eq!(pass(0), passed(None));
        }
        for ms in 0..1000 {
            assert_eq!(pass(ms), None);
        }
        assert_eq!(pass(1000), passed(Some(1000)));
        assert_eq!(pass(1001), None);
        assert_eq!(pass(2500), passed(Some(1)));
        // After a time of silence, they come at once again, and no more than in the beginning.
        let lines = (0..100).filter(|_| pass(1_000_000).is_some()).count();
        assert_eq!(lines, BURST as usize);
    }

    #[test]
    fn each_place_in_the_code_has_a_limit_of_its_own() {
        let here = || {
            let mut lines = 0;
            for _ in 0..100 {
                static LIMIT: LogLimit = LogLimit::new();
                lines += u32::from(LIMIT.pass().is_some());
            }
            lines
        };
        let there = || {
            let mut lines = 0;
            for _ in 0..100 {
                static LIMIT: LogLimit = LogLimit::new();
                lines += u32::from(LIMIT.pass().is_some());
            }
            lines
        };
        assert_eq!((here(), there()), (BURST, BURST));
    }
}
