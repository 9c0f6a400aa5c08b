//! Requests in flight, by epoch: space that was freed is used again only when every request that may still move
//! bytes there is over.
//!
//! A request enters the present epoch before it looks anything up. What is freed afterwards waits for the end of
//! the epoch in which it was freed and of all before; a request that enters later cannot have found it.

use std::collections::VecDeque;

/// The counts. The caller locks.
#[derive(Debug)]
pub(super) struct RequestsInFlight {
    /// Epochs that have requests, and how many, by age; the present one is the last, whether it has some or not. So a
    /// request that lasts, such as that of a mapping, keeps no memory for the epochs that pass meanwhile.
    epochs: VecDeque<(u64, u64)>,
}

impl Default for RequestsInFlight {
    fn default() -> Self {
        Self {
            epochs: VecDeque::from([(0, 0)]),
        }
    }
}

impl RequestsInFlight {
    /// A request begins; gives its epoch.
    pub(super) fn enter(&mut self) -> u64 {
        if let Some((_, count)) = self.epochs.back_mut() {
            *count += 1;
        }
        self.present()
    }

    /// A request of an epoch is over.
    pub(super) fn exit(&mut self, epoch: u64) {
        let found = self
            .epochs
            .binary_search_by_key(&epoch, |(epoch, _)| *epoch);
        debug_assert!(found.is_ok(), "a request ends once");
        let Ok(at) = found else { return };
        let (_, count) = &mut self.epochs[at];
        *count = count.saturating_sub(1);
        if *count == 0 && at + 1 < self.epochs.len() {
            self.epochs.remove(at);
        }
    }

    /// Begins a new epoch; gives the one that ended.
    pub(super) fn advance(&mut self) -> u64 {
        let ended = self.present();
        match self.epochs.back_mut() {
            Some((present, 0)) => *present += 1,
            Some(_) | None => self.epochs.push_back((ended + 1, 0)),
        }
        ended
    }

    /// Whether all requests of an epoch that has ended, and of those before, are over.
    pub(super) fn is_over(&self, epoch: u64) -> bool {
        self.epochs
            .front()
            .is_none_or(|(oldest, _)| epoch < *oldest)
    }

    fn present(&self) -> u64 {
        self.epochs.back().map_or(0, |(present, _)| *present)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_epoch_is_over_when_it_and_all_before_have_no_request_left() {
        let mut in_flight = RequestsInFlight::default();
        let first = in_flight.enter();
        let ended = in_flight.advance();
        let second = in_flight.enter();
        let later = in_flight.advance();
        assert!(!in_flight.is_over(ended) && !in_flight.is_over(later));
        in_flight.exit(second);
        assert!(!in_flight.is_over(later));
        in_flight.exit(first);
        assert!(in_flight.is_over(ended) && in_flight.is_over(later));
        let empty = in_flight.advance();
        assert!(in_flight.is_over(empty));
    }

    #[test]
    fn a_request_that_lasts_keeps_its_epoch_and_no_memory_for_those_that_pass() {
        let mut in_flight = RequestsInFlight::default();
        let lasting = in_flight.enter();
        let ended = in_flight.advance();
        for _ in 0..1000 {
            let epoch = in_flight.enter();
            let passed = in_flight.advance();
            in_flight.exit(epoch);
            assert!(!in_flight.is_over(ended) && !in_flight.is_over(passed));
        }
        assert_eq!(in_flight.epochs.len(), 2);
        let last = in_flight.advance();
        in_flight.exit(lasting);
        assert!(in_flight.is_over(ended) && in_flight.is_over(last));
    }
}
