//! A descriptor chain, checked as a whole before a device looks at what it holds.

use virtio_queue::DescriptorChain;
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend};

use crate::GuestMemory;

/// A part of guest memory that a descriptor names. It lies in guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// First byte, guest physical.
    pub address: GuestAddress,
    /// Length in bytes.
    pub len: u32,
}

/// A chain breaks a rule of VIRTIO 1.2, 2.7.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChainError {
    /// It ends in a descriptor that cannot be followed: a bad index, a loop, or a bad indirect table.
    #[error("a descriptor that cannot be followed")]
    Broken,
    /// It has more descriptors than the queue (2.7.5.3.1).
    #[error("more descriptors than the queue")]
    TooLong,
    /// A device-readable descriptor behind a device-writable one (2.7.4.2).
    #[error("a readable descriptor behind a writable one")]
    Order,
    /// A descriptor names memory that the guest does not have.
    #[error("a buffer outside guest memory")]
    Memory,
}

/// The buffers of a chain.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Chain {
    /// Index of the head descriptor, to be given back in the used ring.
    pub head: u16,
    /// What the device may read, in order.
    pub readable: Vec<Segment>,
    /// What the device may write, in order.
    pub writable: Vec<Segment>,
}

impl Chain {
    /// Walks the chain to its end; `queue_size` bounds its length.
    ///
    /// # Errors
    /// [`ChainError`]. The head is valid all the same.
    pub fn walk(
        descriptors: &DescriptorChain<&GuestMemory>,
        queue_size: u16,
    ) -> Result<Self, ChainError> {
        let memory = descriptors.memory();
        let mut chain = Self {
            head: descriptors.head_index(),
            ..Self::default()
        };
        let mut complete = false;
        for (count, descriptor) in descriptors.clone().enumerate() {
            if count >= usize::from(queue_size) {
                return Err(ChainError::TooLong);
            }
            complete = !descriptor.has_next();
            if descriptor.len() == 0 {
                continue;
            }
            let segment = Segment {
                address: descriptor.addr(),
                len: descriptor.len(),
            };
            if !memory.check_range(segment.address, segment.len as usize) {
                return Err(ChainError::Memory);
            }
            if descriptor.is_write_only() {
                chain.writable.push(segment);
            } else if chain.writable.is_empty() {
                chain.readable.push(segment);
            } else {
                return Err(ChainError::Order);
            }
        }
        if complete {
            Ok(chain)
        } else {
            Err(ChainError::Broken)
        }
    }
}

/// The last byte of a chain that the device may write, whatever its other buffers are: where a device reports that it
/// refuses those. `None` where that byte, or the chain's end, is not to be had.
pub fn last_writable_byte(
    descriptors: &DescriptorChain<&GuestMemory>,
    queue_size: u16,
) -> Option<GuestAddress> {
    let (mut last, mut complete) = (None, false);
    for (count, descriptor) in descriptors.clone().enumerate() {
        if count >= usize::from(queue_size) {
            return None;
        }
        complete = !descriptor.has_next();
        if descriptor.is_write_only() && descriptor.len() > 0 {
            last = descriptor
                .addr()
                .checked_add(u64::from(descriptor.len()) - 1);
        }
    }
    last.filter(|byte| complete && descriptors.memory().check_range(*byte, 1))
}

/// Bytes in all `segments`; a chain's segments are too few to overflow it.
pub fn total_len(segments: &[Segment]) -> u64 {
    segments.iter().map(|segment| u64::from(segment.len)).sum()
}

/// Takes the first `len` bytes off `segments`; `None`, with nothing taken, where they are fewer.
pub fn split_front(segments: &mut Vec<Segment>, len: u32) -> Option<Vec<Segment>> {
    if total_len(segments) < u64::from(len) {
        return None;
    }
    let (mut front, mut left) = (Vec::new(), len);
    while left > 0 {
        let first = segments.first_mut()?;
        let taken = first.len.min(left);
        front.push(Segment {
            address: first.address,
            len: taken,
        });
        left -= taken;
        if taken == first.len {
            segments.remove(0);
        } else {
            // Inside a checked segment.
            first.address = first.address.unchecked_add(taken.into());
            first.len -= taken;
        }
    }
    Some(front)
}

/// Takes the last byte off `segments`.
pub fn split_last_byte(segments: &mut Vec<Segment>) -> Option<GuestAddress> {
    let last = segments.last_mut()?;
    last.len -= 1;
    let address = last.address.unchecked_add(last.len.into());
    if last.len == 0 {
        segments.pop();
    }
    Some(address)
}

/// Copies the bytes of `segments` out of guest memory; `out` is at most as long as they are.
pub fn read(
    memory: &GuestMemory,
    segments: &[Segment],
    mut out: &mut [u8],
) -> Result<(), ChainError> {
    for segment in segments {
        let len = out.len().min(segment.len as usize);
        let (part, rest) = out.split_at_mut(len);
        memory
            .read_slice(part, segment.address)
            .map_err(|_| ChainError::Memory)?;
        out = rest;
    }
    if out.is_empty() {
        Ok(())
    } else {
        Err(ChainError::Memory)
    }
}

/// Copies `bytes` into `segments`; returns how many there was room for.
pub fn write(
    memory: &GuestMemory,
    segments: &[Segment],
    mut bytes: &[u8],
) -> Result<u32, ChainError> {
    let mut written = 0;
    for segment in segments {
        let (part, rest) = bytes.split_at(bytes.len().min(segment.len as usize));
        memory
            .write_slice(part, segment.address)
            .map_err(|_| ChainError::Memory)?;
        written += part.len() as u32;
        bytes = rest;
    }
    Ok(written)
}
