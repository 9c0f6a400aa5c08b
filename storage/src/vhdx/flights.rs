//! Requests in flight, by epoch: space that was freed is used again only when every request that may still move
//! bytes there is over.
//!
//! A request enters the present epoch before it looks anything up. What is freed afterwards waits for the end of
//! the epoch in which it was freed and of all before; a request that enters later cannot have found it.

use std::collections::VecDeque;

/// The counts. The caller locks.
#[derive(Debug)]
pub(super) struct Flights {
    oldest: u64,
    /// Requests of the epochs from the oldest to the present one.
    counts: VecDeque<u64>,
}

impl Default for Flights {
    fn default() -> Self {
        Self {
            oldest: 0,
            counts: VecDeque::from([0]),
        }
    }
}

impl Flights {
    /// A request begins; gives its epoch.
    pub(super) fn enter(&mut self) -> u64 {
        if let Some(count) = self.counts.back_mut() {
            *count += 1;
        }
        self.present()
    }

    /// A request of an epoch is over.
    pub(super) fn exit(&mut self, epoch: u64) {
        let count = epoch
            .checked_sub(self.oldest)
            .and_then(|at| self.counts.get_mut(usize::try_from(at).ok()?));
        debug_assert!(count.is_some(), "a ticket is given back once");
        if let Some(count) = count {
            *count = count.saturating_sub(1);
        }
        while self.counts.len() > 1 && self.counts.front() == Some(&0) {
            self.counts.pop_front();
            self.oldest += 1;
        }
    }

    /// Begins a new epoch; gives the one that ended.
    pub(super) fn advance(&mut self) -> u64 {
        let ended = self.present();
        self.counts.push_back(0);
        while self.counts.len() > 1 && self.counts.front() == Some(&0) {
            self.counts.pop_front();
            self.oldest += 1;
        }
        ended
    }

    /// Whether all requests of an epoch that has ended, and of those before, are over.
    pub(super) fn is_over(&self, epoch: u64) -> bool {
        epoch < self.oldest
    }

    fn present(&self) -> u64 {
        self.oldest + self.counts.len() as u64 - 1
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
}
