//! A file in memory that records the operations on it, and fails on request.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::Mutex;

use super::SECTOR;
use crate::medium::Medium;

/// What a file holds: the sectors that are not zeros, and its length.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Contents {
    sectors: BTreeMap<u64, Arc<Vec<u8>>>,
    pub len: u64,
}

impl Contents {
    pub(super) fn load(path: &Path) -> Self {
        let file = Arc::new(File::open(path).unwrap());
        let mut contents = Self {
            sectors: BTreeMap::new(),
            len: Medium::len(&file).unwrap(),
        };
        let mut at = 0;
        while let Some(data) = file.next_data(at).unwrap() {
            let sector = data / SECTOR;
            let mut bytes = vec![0; SECTOR as usize];
            file.read_exact_at(&mut bytes, sector * SECTOR).unwrap();
            contents.sectors.insert(sector, Arc::new(bytes));
            at = (sector + 1) * SECTOR;
        }
        contents
    }

    pub(super) fn write(&mut self, bytes: &[u8], offset: u64) {
        self.len = self.len.max(offset + bytes.len() as u64);
        let mut at = offset;
        let mut left = bytes;
        while !left.is_empty() {
            let start = (at % SECTOR) as usize;
            let (part, rest) = left.split_at(left.len().min(SECTOR as usize - start));
            let sector = self
                .sectors
                .entry(at / SECTOR)
                .or_insert_with(|| Arc::new(vec![0; SECTOR as usize]));
            Arc::make_mut(sector)[start..start + part.len()].copy_from_slice(part);
            at += part.len() as u64;
            left = rest;
        }
    }

    pub(super) fn read(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        if offset + buffer.len() as u64 > self.len {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        buffer.fill(0);
        let end = offset + buffer.len() as u64;
        for (sector, bytes) in self.sectors.range(offset / SECTOR..end.div_ceil(SECTOR)) {
            let (from, to) = (
                (sector * SECTOR).max(offset),
                ((sector + 1) * SECTOR).min(end),
            );
            let source = &bytes[(from - sector * SECTOR) as usize..(to - sector * SECTOR) as usize];
            buffer[(from - offset) as usize..(to - offset) as usize].copy_from_slice(source);
        }
        Ok(())
    }

    fn zero(&mut self, offset: u64, len: u64) {
        assert!(
            offset.is_multiple_of(SECTOR) && len.is_multiple_of(SECTOR),
            "the tests zero whole sectors"
        );
        self.sectors
            .retain(|sector, _| !(offset / SECTOR..(offset + len) / SECTOR).contains(sector));
    }

    fn set_len(&mut self, len: u64) {
        self.sectors.retain(|sector, _| sector * SECTOR < len);
        if let Some(last) = self.sectors.get_mut(&(len / SECTOR)) {
            Arc::make_mut(last)[(len % SECTOR) as usize..].fill(0);
        }
        self.len = len;
    }

    /// Does what was recorded.
    pub(super) fn apply(&mut self, op: &Op) {
        match op {
            Op::Write { offset, bytes } => self.write(bytes, *offset),
            Op::Zero { offset, len } => self.zero(*offset, *len),
            Op::SetLen(len) => self.set_len(*len),
            Op::Sync => {}
        }
    }
}

/// What was done to a file.
#[derive(Clone, Debug)]
pub(super) enum Op {
    Write { offset: u64, bytes: Vec<u8> },
    Zero { offset: u64, len: u64 },
    SetLen(u64),
    Sync,
}

/// Whether an operation, by its number and what it is, fails.
type Fault = Box<dyn Fn(usize, &Op) -> Option<io::Error> + Send>;

/// Counts what is done to any file of a test.
pub(super) type Clock = Arc<AtomicUsize>;

#[derive(Default)]
struct Inner {
    contents: Contents,
    /// What was done, and when.
    ops: Vec<(usize, Op)>,
    fault: Option<Fault>,
    /// Operations that were tried.
    tried: usize,
    /// Whether reads fail.
    unreadable: bool,
}

/// The double.
pub(super) struct Memory {
    inner: Mutex<Inner>,
    clock: Clock,
    nothing: Arc<File>,
}

impl std::fmt::Debug for Memory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Memory").finish_non_exhaustive()
    }
}

impl Memory {
    pub(super) fn new(contents: Contents) -> Arc<Self> {
        Self::timed(contents, &Clock::default())
    }

    /// A file whose operations are counted together with those of others.
    pub(super) fn timed(contents: Contents, clock: &Clock) -> Arc<Self> {
        Arc::new(Self {
            clock: Arc::clone(clock),
            inner: Mutex::new(Inner {
                contents,
                ..Inner::default()
            }),
            nothing: Arc::new(File::open("/dev/null").unwrap()),
        })
    }

    pub(super) fn contents(&self) -> Contents {
        self.inner.lock().contents.clone()
    }

    pub(super) fn ops(&self) -> Vec<Op> {
        let inner = self.inner.lock();
        inner.ops.iter().map(|(_, op)| op.clone()).collect()
    }

    /// What was done to this file, each with its number among all that was done.
    pub(super) fn timed_ops(&self) -> Vec<(usize, Op)> {
        self.inner.lock().ops.clone()
    }

    pub(super) fn count(&self) -> usize {
        self.clock.load(Ordering::SeqCst)
    }

    /// From now on `fault` decides what fails; it sees numbers from 0.
    pub(super) fn fail(&self, fault: impl Fn(usize, &Op) -> Option<io::Error> + Send + 'static) {
        let mut inner = self.inner.lock();
        inner.tried = 0;
        inner.fault = Some(Box::new(fault));
    }

    /// From now on reads fail, or do not.
    pub(super) fn fail_reads(&self, fail: bool) {
        self.inner.lock().unreadable = fail;
    }

    fn perform(&self, op: Op) -> io::Result<()> {
        let mut inner = self.inner.lock();
        let number = inner.tried;
        inner.tried += 1;
        if let Some(error) = inner.fault.as_ref().and_then(|fault| fault(number, &op)) {
            // As a write that ran out of space half-way.
            if let Op::Write { offset, bytes } = &op {
                inner.contents.write(&bytes[..bytes.len() / 2], *offset);
            }
            return Err(error);
        }
        inner.contents.apply(&op);
        let now = self.clock.fetch_add(1, Ordering::SeqCst);
        inner.ops.push((now, op));
        Ok(())
    }
}

impl Medium for Arc<Memory> {
    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        (**self).read_exact_at(buffer, offset)
    }
    fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        (**self).write_all_at(bytes, offset)
    }
    fn len(&self) -> io::Result<u64> {
        (**self).len()
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        (**self).set_len(len)
    }
    fn sync_data(&self) -> io::Result<()> {
        (**self).sync_data()
    }
    fn punch_hole(&self, offset: u64, len: u64) -> io::Result<bool> {
        (**self).punch_hole(offset, len)
    }
    fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        (**self).zero(offset, len)
    }
    fn next_data(&self, offset: u64) -> io::Result<Option<u64>> {
        (**self).next_data(offset)
    }
    fn file(&self) -> &Arc<File> {
        (**self).file()
    }
}

impl Medium for Memory {
    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let inner = self.inner.lock();
        if inner.unreadable {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        inner.contents.read(buffer, offset)
    }

    fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.perform(Op::Write {
            offset,
            bytes: bytes.to_vec(),
        })
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.inner.lock().contents.len)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.perform(Op::SetLen(len))
    }

    fn sync_data(&self) -> io::Result<()> {
        self.perform(Op::Sync)
    }

    fn punch_hole(&self, offset: u64, len: u64) -> io::Result<bool> {
        self.perform(Op::Zero { offset, len })?;
        Ok(true)
    }

    fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        self.perform(Op::Zero { offset, len })
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<u64>> {
        let inner = self.inner.lock();
        let next = inner.contents.sectors.range(offset / SECTOR..).next();
        Ok(next.map(|(sector, _)| (sector * SECTOR).max(offset)))
    }

    fn file(&self) -> &Arc<File> {
        &self.nothing
    }
}
