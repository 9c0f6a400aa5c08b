//! How many connections there are at a time, and which of them have a request in hand.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::{Condvar, Mutex, MutexGuard};

/// Connections that are served at the same time.
pub(super) const MAX_CONNECTIONS: usize = 8;

#[derive(Default)]
struct Counts {
    open: usize,
    busy: usize,
}

/// How many connections there are, and how many of them have a request in hand.
#[derive(Default)]
pub(super) struct Connections {
    counts: Mutex<Counts>,
    changed: Condvar,
}

impl Connections {
    fn counts(&self) -> MutexGuard<'_, Counts> {
        self.counts.lock()
    }

    /// Waits until no connection is busy, at most for `limit`; `false` where one still is.
    pub(super) fn wait_until_idle(&self, limit: Duration) -> bool {
        let busy = |counts: &mut Counts| counts.busy > 0;
        let mut counts = self.counts();
        let waited = self.changed.wait_while_for(&mut counts, busy, limit);
        !waited.timed_out()
    }

    #[cfg(test)]
    pub(super) fn open(&self) -> usize {
        self.counts().open
    }

    fn change(&self, change: impl FnOnce(&mut Counts)) {
        change(&mut self.counts());
        self.changed.notify_all();
    }

    /// Waits until a connection has been closed where there are as many as there may be, and counts another.
    pub(super) fn admit(self: &Arc<Self>) -> OpenConnection {
        let full = |counts: &mut Counts| counts.open >= MAX_CONNECTIONS;
        let mut counts = self.counts();
        self.changed.wait_while(&mut counts, full);
        counts.open += 1;
        OpenConnection(self.clone())
    }
}

/// Counts a connection as open for as long as it lives.
pub(super) struct OpenConnection(Arc<Connections>);

impl OpenConnection {
    /// Counts the connection as busy for as long as what is returned lives.
    pub(super) fn busy(&self) -> Busy<'_> {
        self.0.change(|counts| counts.busy += 1);
        Busy(&self.0)
    }
}

impl Drop for OpenConnection {
    fn drop(&mut self) {
        self.0.change(|counts| counts.open -= 1);
    }
}

pub(super) struct Busy<'a>(&'a Connections);

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        self.0.change(|counts| counts.busy -= 1);
    }
}
