//! A range of guest memory, and where it is in this process.

use memshare::{PAGE_SIZE, Window};

/// A range of guest memory, and where it is in this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestRange {
    /// First guest physical address.
    pub address: u64,
    /// First address of the process.
    pub(super) host: usize,
    /// Bytes.
    pub(super) len: usize,
}

impl GuestRange {
    /// The memory of a window, which the guest has at `address`.
    pub fn new(address: u64, window: &Window) -> Self {
        Self {
            address,
            host: window.as_ptr() as usize,
            // A window is a part of this process's address space, so that its length is a `usize`.
            len: window.len() as usize,
        }
    }

    /// The guest physical address of the page that contains an address of the process.
    pub(super) fn page_of(&self, host: usize) -> u64 {
        self.address + (host - self.host) as u64 / PAGE_SIZE * PAGE_SIZE
    }
}
