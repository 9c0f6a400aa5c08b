//! Writes to the disk what a guest has written to the memory that shows it.

use std::io;
use std::sync::Arc;

use devices::virtio::pmem::{Backing, FlushError};
use memshare::PAGE_SIZE;
use parking_lot::{Mutex, MutexGuard};
use storage::{Disk, DiskError, blocking};

use super::map::MappedDisk;
use kvm::vm::DirtyLog;

/// Bytes that are written at once.
const STEP: u64 = 256 << 10;

/// A log of the pages that a guest has written: KVM's, or a double in tests.
pub trait DirtyPages: Send + Sync {
    /// Returns the pages written since the last call, as a bitmap from the first page on.
    ///
    /// # Errors
    /// The host's error; then the log keeps what it has.
    fn take(&self) -> io::Result<Vec<u64>>;
}

impl DirtyPages for DirtyLog {
    fn take(&self) -> io::Result<Vec<u64>> {
        Self::take(self)
    }
}

/// Why not all that a guest has written is on its disk.
#[derive(Debug, thiserror::Error)]
pub enum WritebackError {
    /// KVM does not report which pages the guest has written.
    #[error("KVM does not say which pages were written")]
    Log(#[source] io::Error),
    /// The disk refuses a write or a flush.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// The guest has written past the end of the disk, where the memory has a page and the disk no byte.
    #[error("the guest wrote at {0:#x}, past the end of the disk")]
    PastEnd(u64),
}

/// A disk and the log of what its guest writes to the memory that shows it.
pub(super) struct Writeback<L> {
    disk: Arc<MappedDisk>,
    log: L,
    /// Pages that were written and may not be on the disk, as a bitmap; empty where there are none. The lock is held
    /// over the I/O of a flush, so that one flush runs at a time.
    pending: Mutex<Vec<u64>>,
}

impl<L: DirtyPages> Writeback<L> {
    pub(super) fn new(disk: Arc<MappedDisk>, log: L) -> Self {
        Self {
            disk,
            log,
            pending: Mutex::default(),
        }
    }

    /// Makes durable all that was written before the call, and returns how many bytes that were. What fails is tried
    /// again by the next call.
    pub(super) fn write_back(&self) -> Result<u64, WritebackError> {
        self.write_back_locked(&mut self.pending())
    }

    /// Makes durable all that was written before the call, and replaces the disk by the one that `change` makes of it,
    /// which takes later writes.
    ///
    /// # Errors
    /// Where not all is on the disk, and those of `change`; then the disk stays.
    pub(super) fn change_disk<E: From<WritebackError>>(
        &self,
        change: impl FnOnce(&Arc<dyn Disk>) -> Result<Arc<dyn Disk>, E>,
    ) -> Result<(), E> {
        // The lock keeps a flush from running between the two steps.
        let mut pending = self.pending();
        self.write_back_locked(&mut pending)?;
        self.disk.change_disk(change)
    }

    fn pending(&self) -> MutexGuard<'_, Vec<u64>> {
        self.pending.lock()
    }

    fn write_back_locked(&self, pending: &mut Vec<u64>) -> Result<u64, WritebackError> {
        let written = self.log.take().map_err(WritebackError::Log)?;
        let words = pending.len().max(written.len());
        pending.resize(words, 0);
        for (all, new) in pending.iter_mut().zip(written) {
            *all |= new;
        }
        let (mut bytes, mut past_end) = (0, None);
        for (at, len) in runs(pending) {
            bytes += self.write_run(at, len, &mut past_end)?;
        }
        if bytes > 0 {
            self.disk.disk().flush()?;
        }
        if let Some(at) = past_end {
            return Err(WritebackError::PastEnd(at));
        }
        *pending = Vec::new();
        Ok(bytes)
    }

    /// Writes a range of pages to the disk, as far as the disk reaches.
    fn write_run(
        &self,
        start: u64,
        len: u64,
        past_end: &mut Option<u64>,
    ) -> Result<u64, WritebackError> {
        let (disk, window) = (&*self.disk.disk(), self.disk.window());
        let size = disk.geometry().size;
        let mut buffer = vec![0; STEP.min(len) as usize];
        let mut written = 0;
        for at in (start..start + len).step_by(STEP as usize) {
            let step = &mut buffer[..STEP.min(start + len - at) as usize];
            // Only pages that the guest has written are read: they are private, and cannot fault.
            window.read(at, step);
            let (kept, rest) =
                step.split_at(size.saturating_sub(at).min(step.len() as u64) as usize);
            // Bytes past the end of the disk read as zeros, so zeros that were written there are not lost.
            if let Some(lost) = rest.iter().position(|byte| *byte != 0) {
                past_end.get_or_insert(at + (kept.len() + lost) as u64);
            }
            if !kept.is_empty() {
                blocking::write_at(disk, kept, at)?;
                written += kept.len() as u64;
            }
        }
        Ok(written)
    }
}

impl<L: DirtyPages> Backing for Writeback<L> {
    fn flush(&self) -> Result<u64, FlushError> {
        Ok(self.write_back()?)
    }
}

/// Start and length in bytes of each run of pages in a bitmap.
pub(super) fn runs(bitmap: &[u64]) -> impl Iterator<Item = (u64, u64)> {
    let mut pages = bitmap
        .iter()
        .zip(0u64..)
        .filter(|(word, _)| **word != 0)
        .flat_map(|(word, index)| {
            let bits = (0..64).filter(move |bit| word >> bit & 1 == 1);
            bits.map(move |bit| index * 64 + bit)
        })
        .peekable();
    std::iter::from_fn(move || {
        let first = pages.next()?;
        let mut end = first + 1;
        while pages.next_if_eq(&end).is_some() {
            end += 1;
        }
        Some((first * PAGE_SIZE, (end - first) * PAGE_SIZE))
    })
}
