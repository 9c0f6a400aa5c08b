//! How a device's mutex is locked.
//!
//! It is the standard library's, as the event loop takes no other: `event-manager` implements its traits for that one.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Locks a device. One whose holder has panicked is used on: the program aborts where a panic is to be the end of the guest.
pub fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
