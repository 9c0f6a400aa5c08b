//! What is at the host's end of the device.

use std::io;
use std::os::fd::BorrowedFd;

use super::features::Offloads;

/// A network of the host that takes and gives Ethernet frames behind headers of virtio 1: a [`Tap`](super::Tap), or a
/// double in tests.
pub trait Link: Send {
    /// Number of pairs of queues, at least 1.
    fn pairs(&self) -> u16;

    /// The descriptor of a pair: reading it gives a frame, writing to it sends one, and neither waits. `None` where
    /// there is no such pair.
    fn queue(&self, pair: u16) -> Option<BorrowedFd<'_>>;

    /// Whether it segments UDP.
    fn has_uso(&self) -> bool;

    /// Has frames for the guest come by the first `pairs` pairs alone.
    ///
    /// # Errors
    /// The host's error.
    fn use_pairs(&self, pairs: u16) -> io::Result<()>;

    /// Sets what the headers of frames to the guest may have.
    ///
    /// # Errors
    /// The host's error.
    fn set_offloads(&self, offloads: Offloads) -> io::Result<()>;
}
