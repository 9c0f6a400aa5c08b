//! Requests on one disk.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use libc::iovec;

use super::buffer::{self, Cursor, IoBuffer, OwnedBuffer, Source};
use super::engine::{Engine, EngineKind};
use super::transfer::{Failure, Kind, Transfer};
use super::worker::Outcome;
use crate::{ByteRange, Disk, DiskError, Extent, ExtentKind, RequestId};

/// What is asked of a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// Reads the range into the buffer.
    Read(ByteRange),
    /// Writes the buffer to the range.
    Write(ByteRange),
    /// Like `Write`, and durable when it completes.
    WriteThrough(ByteRange),
    /// Makes durable what was written before.
    Flush,
    /// Forgets the content of the ranges.
    Discard(Vec<ByteRange>),
    /// Makes the ranges read as zeros.
    WriteZeroes {
        /// Where.
        ranges: Vec<ByteRange>,
        /// Whether their space may be given back.
        may_unmap: bool,
        /// Whether the zeros are durable when the request completes.
        durable: bool,
    },
}

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
pub enum IoError {
    /// The disk refused it.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// The buffer is not as long as the range.
    #[error("a buffer of {buffer} bytes for a range of {range}")]
    BufferLen {
        /// Bytes of the buffer.
        buffer: u64,
        /// Bytes of the range.
        range: u64,
    },
    /// The host failed to move the bytes.
    #[error("{operation} of the disk's file at offset {file_offset:#x} failed")]
    Transfer {
        /// Read, write or sync.
        operation: &'static str,
        /// Where in the file the part of it begins that failed, in bytes; 0 for what has no place.
        file_offset: u64,
        /// The error of the host.
        #[source]
        source: io::Error,
    },
    /// The host did not start the thread that the request needs.
    #[error("no thread for a {operation}")]
    Thread {
        /// What was to be done.
        operation: &'static str,
        /// The error of the host.
        #[source]
        source: io::Error,
    },
}

/// A request that has come to its end.
#[derive(Debug)]
pub struct Completion<B> {
    /// The buffer, with what was read.
    pub buffer: B,
    /// What became of it.
    pub result: Result<(), IoError>,
}

/// What is left to do once a request's transfers are done.
enum Then {
    Complete,
    Finish { id: RequestId, flush: bool },
}

/// A sector that the disk has looked at: where it begins in the buffer, in bytes, and the bytes that are written.
struct Inspected {
    start: u64,
    bytes: OwnedBuffer,
}

struct InFlight<B> {
    buffer: B,
    /// Copies of the sectors that the disk has inspected, which transfers write in place of those of the buffer: they
    /// live as long as it.
    _inspected: Vec<Inspected>,
    operation: &'static str,
    transfers: usize,
    error: Option<IoError>,
    then: Then,
}

/// The requests on one disk.
///
/// Requests complete in any order; one that has to see the effect of another is submitted after that one has completed.
pub struct DiskQueue<B: IoBuffer> {
    disk: Arc<dyn Disk>,
    engine: Engine,
    slots: Vec<Option<InFlight<B>>>,
    free: Vec<usize>,
    completed: VecDeque<Completion<B>>,
    extents: Vec<Extent>,
    /// Of a read that is being started: the extents that its buffer has filled without a transfer.
    filled: Vec<bool>,
}

impl<B: IoBuffer> DiskQueue<B> {
    /// A queue on `disk`.
    ///
    /// # Errors
    /// Where the host has no file descriptor left, or refuses the engine that was asked for.
    pub fn new(disk: Arc<dyn Disk>, kind: EngineKind) -> io::Result<Self> {
        Ok(Self {
            disk,
            engine: Engine::new(kind)?,
            slots: Vec::new(),
            free: Vec::new(),
            completed: VecDeque::new(),
            extents: Vec::new(),
            filled: Vec::new(),
        })
    }

    /// The disk.
    pub fn disk(&self) -> &Arc<dyn Disk> {
        &self.disk
    }

    /// Goes on with another disk; waits for what is in flight on the present one, which then is dropped.
    pub fn replace_disk(&mut self, disk: Arc<dyn Disk>) {
        self.drain();
        self.disk = disk;
    }

    /// Starts a request. It reaches the kernel with [`DiskQueue::kick`].
    pub fn submit(&mut self, request: Request, buffer: B) {
        match request {
            Request::Read(range) => self.read(range, buffer),
            Request::Write(range) => self.write(range, buffer, false),
            Request::WriteThrough(range) => self.write(range, buffer, true),
            Request::Flush => {
                let slot = self.insert(InFlight {
                    buffer,
                    _inspected: Vec::new(),
                    operation: "sync",
                    transfers: 0,
                    error: None,
                    then: Then::Complete,
                });
                self.flush(slot);
                self.advance(slot);
            }
            Request::Discard(ranges) => {
                self.call("discard", buffer, move |disk| {
                    ranges.iter().try_for_each(|range| disk.discard(*range))
                });
            }
            Request::WriteZeroes {
                ranges,
                may_unmap,
                durable,
            } => self.call("write of zeros", buffer, move |disk| {
                ranges
                    .iter()
                    .try_for_each(|range| disk.write_zeroes(*range, may_unmap))?;
                if durable { disk.flush() } else { Ok(()) }
            }),
        }
    }

    /// Lets the kernel start on all that was submitted.
    pub fn kick(&mut self) {
        self.engine.submit();
    }

    /// Makes the event unreadable until something else completes. Comes before the [`DiskQueue::completion`]s.
    pub fn acknowledge(&self) {
        self.engine.acknowledge();
    }

    /// A request that has come to its end, if there is one; no system call. To be asked until there is none when the
    /// event is readable, and worth asking after a [`DiskQueue::kick`], since what the page cache holds completes at
    /// once.
    pub fn completion(&mut self) -> Option<Completion<B>> {
        if self.completed.is_empty() {
            self.reap();
        }
        self.completed.pop_front()
    }

    /// Waits until a request that is in flight may have come to its end.
    pub fn wait(&mut self) {
        self.engine.submit();
        if self.engine.in_flight() > 0 {
            self.engine.wait();
            self.engine.acknowledge();
        }
    }

    /// Waits for all requests; their completions can be had afterwards.
    pub fn drain(&mut self) {
        self.engine.submit();
        while self.engine.in_flight() > 0 {
            self.engine.wait();
            self.engine.acknowledge();
            self.reap();
        }
    }

    fn insert(&mut self, request: InFlight<B>) -> usize {
        if let Some(slot) = self.free.pop() {
            self.slots[slot] = Some(request);
            slot
        } else {
            self.slots.push(Some(request));
            self.slots.len() - 1
        }
    }

    fn fail(&mut self, buffer: B, error: impl Into<IoError>) {
        self.completed.push_back(Completion {
            buffer,
            result: Err(error.into()),
        });
    }

    fn read(&mut self, range: ByteRange, buffer: B) {
        if let Err(error) = check_len(&buffer, range) {
            return self.fail(buffer, error);
        }
        let mut extents = std::mem::take(&mut self.extents);
        match self.disk.resolve_read(range, &mut extents) {
            Ok(id) => {
                let then = Then::Finish { id, flush: false };
                self.start(Kind::Read, range, &extents, (buffer, Vec::new()), then);
            }
            Err(error) => self.fail(buffer, error),
        }
        extents.clear();
        self.extents = extents;
    }

    fn write(&mut self, range: ByteRange, buffer: B, flush: bool) {
        if let Err(error) = check_len(&buffer, range) {
            return self.fail(buffer, error);
        }
        let mut extents = std::mem::take(&mut self.extents);
        match self.disk.resolve_write(range, &mut extents) {
            Ok(id) => match self.inspect(range, &buffer) {
                Ok(inspected) => self.start(
                    Kind::Write,
                    range,
                    &extents,
                    (buffer, inspected),
                    Then::Finish { id, flush },
                ),
                Err(error) => {
                    self.disk.finish(id, false);
                    self.fail(buffer, error);
                }
            },
            Err(error) => self.fail(buffer, error),
        }
        extents.clear();
        self.extents = extents;
    }

    /// Has the disk look at the sectors that it wants to see, in copies, as a guest can change its memory in between.
    fn inspect(&self, range: ByteRange, buffer: &B) -> Result<Vec<Inspected>, DiskError> {
        let inspect = |sector: ByteRange| {
            let start = sector.offset().saturating_sub(range.offset());
            let bytes = buffer::copy(buffer, start, sector.len());
            self.disk.inspect(sector, &bytes)?;
            Ok(Inspected {
                start,
                bytes: OwnedBuffer::new(bytes),
            })
        };
        self.disk
            .inspected(range)
            .into_iter()
            .map(inspect)
            .collect()
    }

    /// Starts a transfer for each extent that has bytes in a file.
    fn start(
        &mut self,
        kind: Kind,
        range: ByteRange,
        extents: &[Extent],
        (mut buffer, inspected): (B, Vec<Inspected>),
        then: Then,
    ) {
        self.filled.clear();
        let operation = match kind {
            Kind::Read => {
                self.fill_without_transfer(range, extents, &mut buffer);
                "read"
            }
            Kind::Write => "write",
            Kind::Sync => "sync",
        };
        let mut transfers = Vec::with_capacity(extents.len());
        let replaced = (!inspected.is_empty()).then(|| replaced(buffer.iovecs(), &inspected));
        let mut cursor = Cursor::new(replaced.as_deref().unwrap_or(buffer.iovecs()));
        for (index, extent) in extents.iter().enumerate() {
            let iovecs = cursor.take(extent.len as usize);
            if self.filled.get(index) == Some(&true) {
                continue;
            }
            match &extent.kind {
                ExtentKind::Data { file, file_offset } => {
                    transfers.push(Transfer::new(kind, file.clone(), *file_offset, iovecs));
                }
                ExtentKind::Zero | ExtentKind::Unmapped => {
                    buffer::zero(
                        &buffer,
                        extent.offset.saturating_sub(range.offset()),
                        extent.len,
                    );
                }
            }
        }
        let slot = self.insert(InFlight {
            buffer,
            _inspected: inspected,
            operation,
            transfers: 0,
            error: None,
            then,
        });
        for transfer in transfers {
            self.transfer(slot, transfer);
        }
        self.advance(slot);
    }

    /// Lets the buffer fill what it can without a transfer.
    fn fill_without_transfer(&mut self, range: ByteRange, extents: &[Extent], buffer: &mut B) {
        let fill = |extent: &Extent| {
            let start = extent.offset.saturating_sub(range.offset());
            let from = match &extent.kind {
                ExtentKind::Data { file, file_offset } => Source::File {
                    disk: &*self.disk,
                    file,
                    file_offset: *file_offset,
                },
                ExtentKind::Zero | ExtentKind::Unmapped => Source::Zeros,
            };
            buffer.try_fill(start..start + extent.len, from)
        };
        self.filled.extend(extents.iter().map(fill));
    }

    /// The buffers of the requests that have not come to their end.
    pub fn in_flight(&self) -> impl Iterator<Item = &B> {
        self.slots.iter().flatten().map(|request| &request.buffer)
    }

    fn transfer(&mut self, slot: usize, transfer: Transfer) {
        let started = self.engine.transfer(slot, transfer);
        self.note_start(slot, started);
    }

    /// Starts what makes the disk durable.
    fn flush(&mut self, slot: usize) {
        if let Some(file) = self.disk.flush_by_sync() {
            return self.transfer(slot, Transfer::new(Kind::Sync, file, 0, Vec::new()));
        }
        let disk = self.disk.clone();
        let started = self.engine.call(slot, move || disk.flush());
        self.note_start(slot, started);
    }

    fn call(
        &mut self,
        operation: &'static str,
        buffer: B,
        call: impl FnOnce(&dyn Disk) -> Result<(), DiskError> + Send + 'static,
    ) {
        let slot = self.insert(InFlight {
            buffer,
            _inspected: Vec::new(),
            operation,
            transfers: 0,
            error: None,
            then: Then::Complete,
        });
        let disk = self.disk.clone();
        let started = self.engine.call(slot, move || call(&*disk));
        self.note_start(slot, started);
        self.advance(slot);
    }

    fn note_start(&mut self, slot: usize, started: io::Result<()>) {
        let Some(request) = self.slots.get_mut(slot).and_then(Option::as_mut) else {
            return;
        };
        match started {
            Ok(()) => request.transfers += 1,
            Err(source) => {
                request.error.get_or_insert(IoError::Thread {
                    operation: request.operation,
                    source,
                });
            }
        }
    }

    fn reap(&mut self) {
        for (slot, outcome) in self.engine.reap() {
            let Some(request) = self.slots.get_mut(slot).and_then(Option::as_mut) else {
                continue;
            };
            request.transfers -= 1;
            let operation = request.operation;
            let error = match outcome {
                Outcome::Transfer(result) => result.err().map(
                    |Failure {
                         file_offset,
                         source,
                     }| IoError::Transfer {
                        operation,
                        file_offset,
                        source,
                    },
                ),
                Outcome::Call(result) => result.err().map(IoError::Disk),
            };
            if let Some(error) = error {
                request.error.get_or_insert(error);
            }
            self.advance(slot);
        }
        // What was short, what waited for room, and the flush behind a write are new work for the kernel.
        self.engine.submit();
    }

    /// Goes on with a request whose transfers are all done.
    fn advance(&mut self, slot: usize) {
        let Some(request) = self.slots.get_mut(slot).and_then(Option::as_mut) else {
            return;
        };
        if request.transfers > 0 {
            return;
        }
        let failed = request.error.is_some();
        if let Then::Finish { id, flush } = std::mem::replace(&mut request.then, Then::Complete) {
            self.disk.finish(id, !failed);
            if flush && !failed {
                self.flush(slot);
                return self.advance(slot);
            }
        }
        if let Some(InFlight { buffer, error, .. }) = self.slots[slot].take() {
            self.free.push(slot);
            self.completed.push_back(Completion {
                buffer,
                result: error.map_or(Ok(()), Err),
            });
        }
    }
}

/// The ranges of a buffer, with the sectors that were inspected, in order, in the place of its own.
fn replaced(iovecs: &[iovec], inspected: &[Inspected]) -> Vec<iovec> {
    let mut cursor = Cursor::new(iovecs);
    let mut all = Vec::new();
    let mut at = 0;
    for Inspected { start, bytes } in inspected {
        all.extend(cursor.take(start.saturating_sub(at) as usize));
        let len = buffer::total_len(bytes.iovecs());
        cursor.take(len as usize);
        all.extend_from_slice(bytes.iovecs());
        at = start + len;
    }
    all.extend(cursor.take(usize::MAX));
    all
}

fn check_len<B: IoBuffer>(buffer: &B, range: ByteRange) -> Result<(), IoError> {
    let len = buffer::total_len(buffer.iovecs());
    if len == range.len() {
        Ok(())
    } else {
        Err(IoError::BufferLen {
            buffer: len,
            range: range.len(),
        })
    }
}

impl<B: IoBuffer> AsRawFd for DiskQueue<B> {
    /// The eventfd that is readable when there may be completions.
    fn as_raw_fd(&self) -> RawFd {
        self.engine.event_fd()
    }
}

impl<B: IoBuffer> Drop for DiskQueue<B> {
    fn drop(&mut self) {
        // The kernel may still write to buffers that would be freed now.
        self.drain();
    }
}

#[cfg(test)]
mod tests;
