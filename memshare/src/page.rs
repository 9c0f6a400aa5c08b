//! What is known of the bytes of a page by themselves.

use crate::window::PAGE_SIZE;

/// Whether all bytes are zeros; a page is compared at once.
pub fn is_zero(bytes: &[u8]) -> bool {
    const ZEROS: [u8; PAGE_SIZE as usize] = [0; PAGE_SIZE as usize];
    bytes
        .chunks(ZEROS.len())
        .all(|page| Some(page) == ZEROS.get(..page.len()))
}
