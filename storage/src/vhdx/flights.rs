//! Requests in flight, by epoch: space that was freed is used again only when every request that may still move
//! bytes there is over.
//!
//! A request enters the present epoch before it looks anything up. What is freed afterwards waits for the end of
//! the epoch in which it was freed and of all before; a request that enters later cannot have found it.

use std::collections::VecDeque;

/// The counts. The caller locks.
#[derive(Debug)]
pub(super) struct Flights {
    /// Epochs that have requests, and how many, by age; the present one is the last, whether it has some or not. So a request that
    /// lasts, such as that of a mapping, keeps no memory for the epochs that pass meanwhile.
    epochs: VecDeque<(u64, u64)>,
}

impl Default for Flights {
    fn default() -> Self {
        Self {
            epochs: VecDeque::from([(0, 0)]),
        }
    }
}

impl Flights {
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
        debug_assert!(found.is_ok(), "a ticket is given back once");
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
        let mut flights = Flights::default();
        let first = flights.enter();
        let ended = flights.advance();
        let second = flights.enter();
        let later = flights.advance();
        assert!(!flights.is_over(ended) && !flights.is_over(later));
        flights.exit(second);
        assert!(!flights.is_over(later));
        flights.exit(first);
        assert!(flights.is_over(ended) && flights.is_over(later));
        let empty = flights.advance();
        assert!(flights.is_over(empty));
    }

    #[test]
    fn a_request_that_lasts_keeps_its_epoch_and_no_memory_for_those_that_pass() {
        let mut flights = Flights::default();
        let lasting = flights.enter();
        let ended = flights.advance();
        for _ in 0..1000 {
            let epoch = flights.enter();
            let passed = flights.advance();
            flights.exit(epoch);
            assert!(!flights.is_over(ended) && !flights.is_over(passed));
        }
        assert_eq!(flights.epochs.len(), 2);
        let last = flights.advance();
        flights.exit(lasting);
        assert!(flights.is_over(ended) && flights.is_over(last));
    }
}
