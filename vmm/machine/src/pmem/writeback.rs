//! What a guest has written to memory, brought to its disk.

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

/// Says what a guest has written; KVM does, or a double in tests.
pub trait DirtyPages: Send + Sync {
    /// The pages written since the last call, a bit each from the first on.
    ///
    /// # Errors
    /// What the host says; then nothing is forgotten.
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
    /// It is not known what the guest has written.
    #[error("KVM does not say which pages were written")]
    Log(#[source] io::Error),
    /// The disk refuses.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// The guest has written where the memory has a page and the disk no byte.
    #[error("the guest wrote at {0:#x}, past the end of the disk")]
    PastEnd(u64),
}

/// A disk that gets what its guest writes.
pub(super) struct Writeback<L> {
    disk: Arc<MappedDisk>,
    log: L,
    /// Pages that were written and may not be on the disk; a bit each, nothing where there are none. Held over the I/O
    /// of a flush: one at a time.
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

    /// Makes durable all that was written before the call; gives the bytes that took. What fails is tried again by the
    /// next call.
    pub(super) fn write_back(&self) -> Result<u64, WritebackError> {
        self.write_back_under(&mut self.pending())
    }

    /// Makes durable all that was written before the call, and has what is written from then on go to the disk that
    /// `change` makes of this one.
    ///
    /// # Errors
    /// Where not all is on the disk, and those of `change`; then the disk stays.
    pub(super) fn change_disk<E: From<WritebackError>>(
        &self,
        change: impl FnOnce(&Arc<dyn Disk>) -> Result<Arc<dyn Disk>, E>,
    ) -> Result<(), E> {
        // No flush comes between.
        let mut pending = self.pending();
        self.write_back_under(&mut pending)?;
        self.disk.change_disk(change)
    }

    fn pending(&self) -> MutexGuard<'_, Vec<u64>> {
        self.pending.lock()
    }

    fn write_back_under(&self, pending: &mut Vec<u64>) -> Result<u64, WritebackError> {
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

    /// Writes what the disk has of a range of pages.
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
            // Zeros are there anyway.
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
