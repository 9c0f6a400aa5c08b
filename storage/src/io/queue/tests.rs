use std::collections::HashSet;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::Mutex;

use super::*;
use crate::io::OwnedBuffer;
use crate::{Geometry, Mapping, SectorSize};

const BLOCK: u64 = 4096;

/// Blocks of 4 KiB, scattered over a file in reverse order once they are written.
#[derive(Debug)]
struct Scattered {
    geometry: Geometry,
    file: Arc<File>,
    mapped: Mutex<HashSet<u64>>,
    finished: Mutex<Vec<bool>>,
    flushes: AtomicUsize,
    dirty: bool,
}

impl Scattered {
    fn new(dirty: bool) -> Arc<Self> {
        let geometry = Geometry {
            size: 64 * BLOCK,
            logical_sector: SectorSize::B512,
            physical_sector: SectorSize::B4096,
            discard_granularity: 4096,
            read_only: false,
        };
        let file = tempfile::tempfile().unwrap();
        file.set_len(geometry.size).unwrap();
        Arc::new(Self {
            geometry,
            file: Arc::new(file),
            mapped: Mutex::default(),
            finished: Mutex::default(),
            flushes: AtomicUsize::new(0),
            dirty,
        })
    }

    fn extents(
        &self,
        range: ByteRange,
        allocate: bool,
        out: &mut Vec<Extent>,
    ) -> Result<(), DiskError> {
        if range.end() > self.geometry.size {
            return Err(DiskError::Range {
                offset: range.offset(),
                len: range.len(),
            });
        }
        let mut offset = range.offset();
        let mut mapped = self.mapped.lock();
        while offset < range.end() {
            let block = offset / BLOCK;
            let len = ((block + 1) * BLOCK).min(range.end()) - offset;
            if allocate {
                mapped.insert(block);
            }
            let kind = if mapped.contains(&block) {
                let file_offset = (63 - block) * BLOCK + offset % BLOCK;
                ExtentKind::Data {
                    file: self.file.clone(),
                    file_offset,
                }
            } else {
                ExtentKind::Unmapped
            };
            out.push(Extent { offset, len, kind });
            offset += len;
        }
        Ok(())
    }
}

impl Disk for Scattered {
    fn geometry(&self) -> Geometry {
        self.geometry
    }
    fn resolve_read(
        &self,
        range: ByteRange,
        out: &mut Vec<Extent>,
    ) -> Result<RequestId, DiskError> {
        self.extents(range, false, out)?;
        Ok(RequestId::new(7))
    }
    fn resolve_write(
        &self,
        range: ByteRange,
        out: &mut Vec<Extent>,
    ) -> Result<RequestId, DiskError> {
        self.extents(range, true, out)?;
        Ok(RequestId::new(7))
    }
    fn finish(&self, id: RequestId, ok: bool) {
        assert_eq!(id.number(), 7);
        self.finished.lock().push(ok);
    }
    fn flush_by_sync(&self) -> Option<Arc<File>> {
        (!self.dirty).then(|| self.file.clone())
    }
    fn flush(&self) -> Result<(), DiskError> {
        self.flushes.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
    fn discard(&self, range: ByteRange) -> Result<(), DiskError> {
        self.mapped.lock().remove(&(range.offset() / BLOCK));
        Ok(())
    }
    fn write_zeroes(&self, _: ByteRange, _: bool) -> Result<(), DiskError> {
        Err(DiskError::ReadOnly)
    }
    fn map(&self, _: ByteRange, _: &mut Vec<Mapping>) -> Result<(), DiskError> {
        Ok(())
    }
    fn close(&self) -> Result<(), DiskError> {
        Ok(())
    }
}

fn range(offset: u64, len: u64) -> ByteRange {
    ByteRange::new(offset, len).unwrap()
}

fn run(
    queue: &mut DiskQueue<OwnedBuffer>,
    request: Request,
    bytes: Vec<u8>,
) -> (Vec<u8>, Result<(), IoError>) {
    queue.submit(request, OwnedBuffer::new(bytes));
    queue.drain();
    let Completion { buffer, result } = queue.completion().unwrap();
    assert!(queue.completion().is_none());
    (buffer.into_bytes(), result)
}

fn with_each_engine(test: impl Fn(EngineKind)) {
    test(EngineKind::IoUring);
    test(EngineKind::Worker);
}

#[test]
fn what_is_written_over_extents_is_read_again_and_the_rest_is_zero() {
    with_each_engine(|kind| {
        let disk = Scattered::new(false);
        let mut queue = DiskQueue::new(disk.clone(), kind).unwrap();
        let bytes: Vec<u8> = (0..3 * BLOCK).map(|i| (i / 512 + 1) as u8).collect();
        run(
            &mut queue,
            Request::Write(range(512, bytes.len() as u64)),
            bytes.clone(),
        )
        .1
        .unwrap();
        assert_eq!(*disk.finished.lock(), [true]);
        let (read, result) = run(
            &mut queue,
            Request::Read(range(0, 5 * BLOCK)),
            vec![0xee; 5 * BLOCK as usize],
        );
        result.unwrap();
        let mut expected = vec![0; 512];
        expected.extend(bytes);
        expected.resize(5 * BLOCK as usize, 0);
        assert_eq!(read, expected);
    });
}

#[test]
fn more_requests_than_the_ring_has_entries_all_complete() {
    with_each_engine(|kind| {
        let mut queue = DiskQueue::new(Scattered::new(false), kind).unwrap();
        for round in 0..1000u64 {
            let request = Request::Write(range((round % 64) * BLOCK, BLOCK));
            queue.submit(request, OwnedBuffer::new(vec![round as u8; BLOCK as usize]));
        }
        queue.drain();
        let completions: Vec<_> = std::iter::from_fn(|| queue.completion()).collect();
        assert_eq!(completions.len(), 1000);
        assert!(completions.iter().all(|c| c.result.is_ok()));
    });
}

#[test]
fn a_flush_with_metadata_to_write_is_the_disks_own() {
    with_each_engine(|kind| {
        for dirty in [false, true] {
            let disk = Scattered::new(dirty);
            let mut queue = DiskQueue::new(disk.clone(), kind).unwrap();
            run(&mut queue, Request::Flush, Vec::new()).1.unwrap();
            let write = Request::WriteThrough(range(0, 512));
            run(&mut queue, write, vec![1; 512]).1.unwrap();
            assert_eq!(
                disk.flushes.load(Ordering::SeqCst),
                if dirty { 2 } else { 0 }
            );
        }
    });
}

#[test]
fn errors_come_back_with_the_buffer_and_the_queue_goes_on() {
    with_each_engine(|kind| {
        let disk = Scattered::new(false);
        let mut queue = DiskQueue::new(disk.clone(), kind).unwrap();
        let outside = run(
            &mut queue,
            Request::Read(range(64 * BLOCK, 512)),
            vec![0; 512],
        )
        .1;
        assert!(matches!(
            outside,
            Err(IoError::Disk(DiskError::Range { .. }))
        ));
        let short = run(&mut queue, Request::Read(range(0, 512)), vec![0; 511]).1;
        assert!(matches!(
            short,
            Err(IoError::BufferLen {
                buffer: 511,
                range: 512
            })
        ));
        let zeroes = Request::WriteZeroes {
            ranges: vec![range(0, 512)],
            may_unmap: false,
            durable: true,
        };
        assert!(matches!(
            run(&mut queue, zeroes, Vec::new()).1,
            Err(IoError::Disk(DiskError::ReadOnly))
        ));
        run(
            &mut queue,
            Request::Write(range(0, BLOCK)),
            vec![1; BLOCK as usize],
        )
        .1
        .unwrap();
        disk.file.set_len(63 * BLOCK + 100).unwrap();
        let ended = run(
            &mut queue,
            Request::Read(range(0, BLOCK)),
            vec![0; BLOCK as usize],
        )
        .1;
        assert!(
            matches!(
                ended,
                Err(IoError::Transfer {
                    operation: "read",
                    ..
                })
            ),
            "{ended:?}"
        );
        run(
            &mut queue,
            Request::Discard(vec![range(0, BLOCK)]),
            Vec::new(),
        )
        .1
        .unwrap();
        assert_eq!(
            run(&mut queue, Request::Read(range(0, 512)), vec![9; 512]).0,
            [0; 512]
        );
    });
}

#[test]
fn a_dropped_queue_has_finished_its_writes() {
    with_each_engine(|kind| {
        let disk = Scattered::new(false);
        let mut queue = DiskQueue::new(disk.clone(), kind).unwrap();
        queue.submit(
            Request::Write(range(0, 512)),
            OwnedBuffer::new(vec![5; 512]),
        );
        queue.kick();
        drop(queue);
        let mut bytes = [0; 512];
        disk.file.read_exact_at(&mut bytes, 63 * BLOCK).unwrap();
        assert_eq!(bytes, [5; 512]);
    });
}
