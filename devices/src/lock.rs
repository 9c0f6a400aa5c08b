//! How a device's mutex is locked.
//!
//! It is the standard library's, as the event loop takes no other: `event-manager` implements its traits for that one.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Locks a device, also after a thread has panicked while it held the lock: the release build aborts on a panic, and
/// tests go on.
pub fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
