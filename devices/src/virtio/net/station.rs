//! Somebody on the guest's link who is in this process: answers that no network need give.

use std::time::{Duration, Instant};

/// A neighbour of the guest on its link, which takes some of the frames that the guest sends, and sends frames of its
/// own. What it keeps is bounded, whatever the guest sends.
pub trait Station: Send {
    /// Whether a frame is for the station, so that it goes no further, by its first 62 bytes, or all of a shorter
    /// frame.
    fn takes(&self, head: &[u8]) -> bool;

    /// A frame that it takes, without a header of virtio; of 16 KiB at most.
    fn receive(&mut self, frame: &[u8], now: Instant);

    /// The next frame for the guest, into `buffer`, which is 1,514 bytes long: how long it is; `None` where there is
    /// none.
    fn send(&mut self, buffer: &mut [u8], now: Instant) -> Option<usize>;

    /// In how long [`send`](Self::send) is to be called though nothing came; `None` where only a frame of the guest
    /// brings anything about.
    fn wait(&mut self, now: Instant) -> Option<Duration>;

    /// Forgets connections: the guest has reset its device, or goes on from a snapshot.
    fn reset(&mut self);
}

/// Bytes of a frame by which a station knows that it is its own: Ethernet, IPv6, and the ports behind.
pub(super) const HEAD: usize = 14 + 40 + 8;
/// The longest frame of a station, in bytes: what one of Ethernet without jumbo frames has.
pub(super) const LONGEST: usize = 1514;
/// The longest frame that a station takes, in bytes: more than what it lets the guest send at once, as segments of one
/// frame.
pub(super) const LONGEST_TAKEN: usize = 16 << 10;
