//! How long a guest took to boot or to be restored.

use std::time::{Duration, Instant};

/// The moments from which the times of boot and restore are counted.
#[derive(Debug, Default)]
pub(super) struct Times {
    /// The start of the process, until the guest that it is for has been started.
    process: Option<Instant>,
    /// When the guest that boots was asked for.
    boots_since: Option<Instant>,
    /// How long it took to go on from a snapshot.
    pub(super) restore: Option<Duration>,
}

impl Times {
    /// The first guest's time counts from here, if the process starts it without a request.
    pub(super) fn count_from(&mut self, process: Instant) {
        self.process = Some(process);
    }

    /// When the guest that is to be started now was asked for.
    pub(super) fn asked(&mut self) -> Instant {
        self.process.take().unwrap_or_else(Instant::now)
    }

    pub(super) fn boots(&mut self, asked: Instant) {
        self.boots_since = Some(asked);
    }

    pub(super) fn restored(&mut self, asked: Instant) {
        self.restore = Some(asked.elapsed());
    }

    /// How long a guest took to boot that reported at `booted` that it had. `None` for a guest that had booted before
    /// it was saved.
    pub(super) fn boot(&self, booted: Option<Instant>) -> Option<Duration> {
        Some(booted?.saturating_duration_since(self.boots_since?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_guest_counts_from_the_start_of_the_process_and_others_from_when_they_are_asked_for()
     {
        let process = Instant::now();
        let mut times = Times::default();
        times.count_from(process);
        let asked = times.asked();
        assert_eq!(asked, process);
        let took = Duration::from_millis(3);
        assert_eq!(
            times.boot(Some(process + took)),
            None,
            "it does not boot yet"
        );
        times.boots(asked);
        assert_eq!(times.boot(None), None);
        assert_eq!(times.boot(Some(process + took)), Some(took));
        assert!(times.asked() > process);
    }
}
