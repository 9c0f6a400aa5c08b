//! A raw disk whose format was guessed, and a guest that writes what would change the guess.

#![allow(clippy::unwrap_used, reason = "a test may end where it fails")]

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use libc::iovec;
use storage::io::{DiskQueue, EngineKind, IoBuffer, IoError, OwnedBuffer, Request};
use storage::{ByteRange, Disk, DiskError, Format, OpenOptions, blocking};

const SIZE: u64 = 1 << 20;

/// Where a format has its mark, and the mark.
const MARKS: [(u64, &[u8]); 11] = [
    (0, b"vhdxfile"),
    (0, b"QFI\xfb"),
    (0, b"KDMV"),
    (0, b"# Disk DescriptorFile"),
    (0, b"conectix"),
    (SIZE - 512, b"conectix"),
    (0x40, b"\x7f\x10\xda\xbe"),
    (0, b"QED\0"),
    (0, b"WithoutFreeSpace"),
    (64 << 10, b"head"),
    (128 << 10, b"head"),
];

/// A raw disk of sevens.
fn raw(folder: &Path) -> std::path::PathBuf {
    let path = folder.join("disk");
    std::fs::write(&path, vec![7; SIZE as usize]).unwrap();
    path
}

fn opened(path: &Path, format: Option<Format>) -> Arc<dyn Disk> {
    let options = OpenOptions {
        format,
        ..OpenOptions::default()
    };
    storage::open(path, &options).unwrap()
}

/// A run of bytes that has this mark at its place: from `before` whole sectors before the mark's own on, `sectors`
/// long.
fn with_mark(at: u64, mark: &[u8], before: u64, sectors: u64) -> (u64, Vec<u8>) {
    let start = (at / 512).saturating_sub(before) * 512;
    let len = (sectors * 512).min(SIZE - start);
    let mut bytes = vec![1; len as usize];
    let inside = (at - start) as usize;
    bytes[inside..inside + mark.len()].copy_from_slice(mark);
    (start, bytes)
}

/// Memory in pieces, such as a guest hands over, which the guest can still change.
struct Pieces {
    memory: Arc<parking_lot::Mutex<Vec<u8>>>,
    iovecs: Vec<iovec>,
}

// SAFETY: the ranges name the heap allocation of `memory`, which is never resized and which this value keeps alive.
unsafe impl IoBuffer for Pieces {
    fn iovecs(&self) -> &[iovec] {
        &self.iovecs
    }
}

// SAFETY: the pointers are to memory that the value keeps alive, whichever thread it is on.
unsafe impl Send for Pieces {}

impl Pieces {
    /// Cuts bytes into pieces of this length, the last of which may be shorter.
    fn new(bytes: Vec<u8>, piece: usize) -> Self {
        let memory = Arc::new(parking_lot::Mutex::new(bytes));
        let iovecs = memory
            .lock()
            .chunks_mut(piece)
            .map(|piece| iovec {
                iov_base: piece.as_mut_ptr().cast(),
                iov_len: piece.len(),
            })
            .collect();
        Self { memory, iovecs }
    }
}

fn written<B: IoBuffer>(
    disk: &Arc<dyn Disk>,
    kind: EngineKind,
    offset: u64,
    buffer: B,
) -> Result<(), IoError> {
    let len = buffer.iovecs().iter().map(|part| part.iov_len as u64).sum();
    let mut queue = DiskQueue::new(disk.clone(), kind).unwrap();
    let request = Request::Write(ByteRange::new(offset, len).unwrap());
    queue.submit(request, buffer);
    queue.drain();
    queue.completion().unwrap().result
}

#[test]
fn a_guessed_raw_disk_refuses_what_would_make_it_another_format() {
    let folder = tempfile::tempdir().unwrap();
    let path = raw(folder.path());
    let disk = opened(&path, None);
    for (at, mark) in MARKS {
        // The sector alone, and in the middle and at the end of more.
        for (before, sectors) in [(0, 1), (3, 9), (2, 3)] {
            let (start, bytes) = with_mark(at, mark, before, sectors);
            let refused = blocking::write_at(&*disk, &bytes, start).unwrap_err();
            let said = refused.to_string();
            assert!(
                matches!(refused, DiskError::Disguise { offset, .. } if offset == at / 512 * 512),
                "{said}"
            );
            assert!(said.contains("name the format raw"), "{said}");
            for kind in [EngineKind::IoUring, EngineKind::Worker] {
                let whole = written(&disk, kind, start, OwnedBuffer::new(bytes.clone()));
                assert!(matches!(
                    whole,
                    Err(IoError::Disk(DiskError::Disguise { .. }))
                ));
                // The mark lies across several pieces, none of which begins with a sector.
                let pieces = Pieces::new(bytes.clone(), 3);
                let cut = written(&disk, kind, start, pieces);
                assert!(matches!(
                    cut,
                    Err(IoError::Disk(DiskError::Disguise { .. }))
                ));
            }
        }
    }
    disk.flush().unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), vec![7; SIZE as usize]);
    drop(disk);
    assert_eq!(
        storage::detect(&path).unwrap(),
        storage::foreign::SourceFormat::Raw
    );
}

#[test]
fn what_changes_no_guess_is_written_where_it_belongs() {
    let folder = tempfile::tempdir().unwrap();
    let path = raw(folder.path());
    let disk = opened(&path, None);
    // A boot sector, and marks where nobody looks for them.
    let mut bytes: Vec<u8> = (0..SIZE).map(|at| (at / 3) as u8).collect();
    bytes[510..512].copy_from_slice(b"\x55\xaa");
    for (at, mark) in [
        (1, &b"vhdxfile"[..]),
        (512, b"QFI\xfb"),
        (SIZE as usize - 1024, b"conectix"),
    ] {
        bytes[at..at + mark.len()].copy_from_slice(mark);
    }
    for (kind, piece) in [(EngineKind::IoUring, 1000), (EngineKind::Worker, 4095)] {
        std::fs::write(&path, vec![7; SIZE as usize]).unwrap();
        written(&disk, kind, 0, Pieces::new(bytes.clone(), piece)).unwrap();
        assert!(std::fs::read(&path).unwrap() == bytes);
    }
    drop(disk);
    opened(&path, None);
}

#[test]
fn what_was_inspected_is_what_is_written() {
    let folder = tempfile::tempdir().unwrap();
    let path = raw(folder.path());
    let mut queue = DiskQueue::new(opened(&path, None), EngineKind::IoUring).unwrap();
    let buffer = Pieces::new(vec![1; 1024], 100);
    let memory = buffer.memory.clone();
    queue.submit(Request::Write(ByteRange::new(0, 1024).unwrap()), buffer);
    // The guest changes its memory before the kernel has been handed the request.
    memory.lock()[..8].copy_from_slice(b"vhdxfile");
    queue.drain();
    queue.completion().unwrap().result.unwrap();
    let found = std::fs::read(&path).unwrap();
    assert_eq!(found[..1024], [1; 1024]);
}

#[test]
fn a_disk_whose_format_was_named_takes_any_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let path = raw(folder.path());
    let disk = opened(&path, Some(Format::Raw));
    for (at, mark) in MARKS {
        let (start, bytes) = with_mark(at, mark, 0, 1);
        blocking::write_at(&*disk, &bytes, start).unwrap();
        written(&disk, EngineKind::Auto, start, OwnedBuffer::new(bytes)).unwrap();
        let mut found = vec![0; mark.len()];
        let file = std::fs::File::open(&path).unwrap();
        file.read_exact_at(&mut found, at).unwrap();
        assert_eq!(found, mark);
    }
}
