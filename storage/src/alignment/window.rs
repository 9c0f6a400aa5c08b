//! The bytes of a disk, read a few at a time.

/// Bytes of a page that guests share.
pub(super) const PAGE: u64 = 4096;

/// Fills a buffer from an offset of a disk.
pub(super) type Read<'a, E> = dyn FnMut(&mut [u8], u64) -> Result<(), E> + 'a;

/// The bytes of a disk, a few at a time.
pub(super) struct Window<'a, E> {
    pub(super) size: u64,
    /// Fills a buffer from an offset; both are multiples of 4096, or the buffer ends with the disk.
    pub(super) read: &'a mut Read<'a, E>,
}

impl<E> Window<'_, E> {
    /// The bytes at an offset, which cross at most one multiple of 4096; `None` where the disk ends before them.
    pub(super) fn at<const N: usize>(&mut self, offset: u64) -> Result<Option<[u8; N]>, E> {
        const { assert!(N as u64 <= PAGE) };
        let Some(end) = offset.checked_add(N as u64).filter(|end| *end <= self.size) else {
            return Ok(None);
        };
        let start = offset / PAGE * PAGE;
        let mut pages = [0; 2 * PAGE as usize];
        let len = end.next_multiple_of(PAGE).min(self.size) - start;
        (self.read)(&mut pages[..len as usize], start)?;
        let mut bytes = [0; N];
        let first = (offset - start) as usize;
        bytes.copy_from_slice(&pages[first..first + N]);
        Ok(Some(bytes))
    }
}

/// A field of a structure, little-endian; the offsets are constants inside it.
pub(super) fn le16(bytes: &[u8], at: usize) -> u64 {
    u64::from(u16::from_le_bytes([bytes[at], bytes[at + 1]]))
}

pub(super) fn le32(bytes: &[u8], at: usize) -> u64 {
    le16(bytes, at) | le16(bytes, at + 2) << 16
}

pub(super) fn le64(bytes: &[u8], at: usize) -> u64 {
    le32(bytes, at) | le32(bytes, at + 4) << 32
}
