use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use memshare::PageKind;
use storage::vhdx::{ChildOptions, CreateOptions, Vhdx};
use storage::{
    ByteRange, Disk, DiskError, Extent, Format, Geometry, Mapping, RequestId, SectorSize, blocking,
};

use super::map::{MapBudget, MapError, MappedDisk};
use super::writeback::{DirtyPages, Writeback, WritebackError, runs};
use super::*;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// A disk of a size with bytes at some offsets, closed again.
    fn vhdx(&self, name: &str, size: u64, bytes: &[(u64, Vec<u8>)]) -> PathBuf {
        let path = self.path(name);
        let options = CreateOptions {
            block_size: MIB as u32,
            ..CreateOptions::new(size)
        };
        Vhdx::create(&path, &options).unwrap();
        write(&path, bytes);
        path
    }

    fn child(&self, name: &str, parent: &PathBuf, bytes: &[(u64, Vec<u8>)]) -> PathBuf {
        let path = self.path(name);
        Vhdx::create_child(&path, parent, &ChildOptions::default()).unwrap();
        write(&path, bytes);
        path
    }

    fn raw(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.path(name);
        std::fs::write(&path, bytes).unwrap();
        path
    }
}

fn write(path: &PathBuf, bytes: &[(u64, Vec<u8>)]) {
    let disk = open(path, false);
    for (offset, bytes) in bytes {
        blocking::write_at(&*disk, bytes, *offset).unwrap();
    }
    disk.close().unwrap();
}

fn open(path: &PathBuf, read_only: bool) -> Arc<dyn Disk> {
    let options = OpenOptions {
        read_only,
        ..OpenOptions::default()
    };
    storage::open(path, &options).unwrap()
}

fn mapped(path: &PathBuf) -> MappedDisk {
    MappedDisk::new(&open(path, true), &mut MapBudget::new(1000)).unwrap()
}

fn read(disk: &MappedDisk, offset: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0xee; len];
    disk.window().read(offset, &mut bytes);
    bytes
}

/// Asserts that the memory holds what the disk does, and zeros after its end.
fn assert_shows_its_disk(mapped: &MappedDisk) {
    let size = mapped.disk().geometry().size;
    let mut expected = vec![0; mapped.window().len() as usize];
    blocking::read_at(&*mapped.disk(), &mut expected[..size as usize], 0).unwrap();
    assert!(mapped.window().holds(0, &expected));
}

/// The mappings of this process that the window lies in.
fn mappings(disk: &MappedDisk) -> usize {
    let start = disk.window().as_ptr() as u64;
    let end = start + disk.window().len();
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let hex = |text: &str| u64::from_str_radix(text, 16).unwrap();
    maps.lines()
        .filter_map(|line| line.split(' ').next()?.split_once('-'))
        .filter(|(from, to)| hex(from) < end && hex(to) > start)
        .count()
}

/// Bytes that differ from sector to sector and from seed to seed.
fn pattern(seed: u8, len: u64) -> Vec<u8> {
    (0..len)
        .map(|at| seed.wrapping_add((at / 512) as u8).max(1))
        .collect()
}

#[test]
fn a_child_over_its_parent_is_mapped_from_both_files() {
    let folder = Folder::new();
    let parent = folder.vhdx("base", 16 * MIB, &[(0, pattern(1, 4 * MIB))]);
    let child = folder.child("child", &parent, &[(MIB, pattern(9, MIB))]);
    let disk = mapped(&child);
    assert_shows_its_disk(&disk);
    let figures = disk.figures();
    assert_eq!((figures.mapped, figures.copied), (4 * 256, 0));
    // The mappings are the parent's first block, the child's block, the parent's other two, and the unmapped rest.
    assert_eq!((figures.mappings, mappings(&disk)), (4, 4));
    let kinds = disk.window().page_kinds(0, 4 * MIB).unwrap();
    assert!(kinds.iter().all(|kind| *kind == PageKind::File));
}

#[test]
fn zeros_of_a_disk_take_no_memory() {
    let folder = Folder::new();
    let path = folder.vhdx("disk", 64 * MIB, &[(8 * MIB, pattern(1, 4096))]);
    let disk = open(&path, false);
    let block = ByteRange::new(8 * MIB, MIB).unwrap();
    disk.write_zeroes(block, true).unwrap();
    blocking::write_at(&*disk, &pattern(3, 4096), 32 * MIB).unwrap();
    disk.close().unwrap();
    drop(disk);
    let disk = mapped(&path);
    assert_eq!((disk.figures().mappings, disk.figures().mapped), (3, 256));
    assert_eq!(read(&disk, 8 * MIB, 4096), [0; 4096]);
    assert_eq!(read(&disk, 32 * MIB, 4096), pattern(3, 4096));
    assert_shows_its_disk(&disk);
}

#[test]
fn sectors_of_two_layers_in_a_page_are_copied_and_all_others_mapped() {
    let folder = Folder::new();
    let parent = folder.vhdx("base", 4 * MIB, &[(0, pattern(1, 2 * MIB))]);
    // The child has a sector, a page and a half that begin in the middle of a page, and whole pages.
    let own = [
        (512, pattern(70, 512)),
        (MIB + 2048, pattern(90, 6144)),
        (MIB + 65536, pattern(50, 8192)),
    ];
    let child = folder.child("child", &parent, &own);
    let disk = mapped(&child);
    assert_shows_its_disk(&disk);
    assert_eq!(disk.figures().copied, 2);
    let kinds = disk.window().page_kinds(MIB, 16384).unwrap();
    assert_eq!(kinds[0], PageKind::Private);
    assert!(kinds[1..].iter().all(|kind| *kind == PageKind::File));
}

#[test]
fn data_beyond_4_gib_is_where_the_disk_has_it() {
    let folder = Folder::new();
    let far = 5 * GIB + 3 * MIB + 4096;
    let path = folder.vhdx("disk", 6 * GIB, &[(far, pattern(5, 8192))]);
    let disk = mapped(&path);
    assert_eq!(disk.window().len(), 6 * GIB);
    assert_eq!(read(&disk, far, 8192), pattern(5, 8192));
    assert_eq!(read(&disk, far - 4096, 4096), [0; 4096]);
    assert_eq!(read(&disk, far % (4 * GIB), 4096), [0; 4096]);
}

#[test]
fn a_raw_file_that_ends_inside_a_page_reads_as_zeros_after_its_end() {
    let folder = Folder::new();
    for len in [512, 4096, 2 * MIB + 4096 + 1536] {
        let path = folder.raw("raw", &pattern(7, len));
        let disk = mapped(&path);
        assert_eq!(disk.window().len(), len.next_multiple_of(2 * MIB));
        assert_shows_its_disk(&disk);
        assert_eq!(disk.figures().copied, u64::from(len % 4096 != 0));
        assert_eq!(disk.figures().mapped, len / 4096);
    }
}

#[test]
fn a_file_in_too_many_pieces_is_refused_with_the_count_and_the_way_out() {
    let folder = Folder::new();
    // Every other block.
    let blocks: Vec<_> = (0..8)
        .map(|block| (2 * block * MIB, pattern(1, 512)))
        .collect();
    let path = folder.vhdx("disk", 16 * MIB, &blocks);
    let refused = |left| MappedDisk::new(&open(&path, true), &mut MapBudget::new(left)).err();
    for (left, expected) in [(16, None), (15, Some(15)), (0, Some(0))] {
        match (refused(left), expected) {
            (None, None) => {}
            (Some(MapError::Fragmented { needed: 16, left }), Some(expected)) => {
                assert_eq!(left, expected);
            }
            (other, _) => panic!("{left}: {other:?}"),
        }
    }
    let error = PmemError::Map {
        path: path.clone(),
        source: refused(15).unwrap(),
    };
    let text = host::report::chain(&error).to_string();
    for part in ["disk: is in", "16 mappings", "coppice disk convert"] {
        assert!(text.contains(part), "{part} in {text}");
    }
    // The disks of a guest share the budget.
    let mut budget = MapBudget::new(31);
    assert!(MappedDisk::new(&open(&path, true), &mut budget).is_ok());
    assert!(MappedDisk::new(&open(&path, true), &mut budget).is_err());
}

#[test]
fn what_the_guest_writes_changes_no_file() {
    let folder = Folder::new();
    let path = folder.vhdx("disk", 4 * MIB, &[(0, pattern(1, MIB))]);
    let before = std::fs::read(&path).unwrap();
    let disk = mapped(&path);
    disk.window().write(0, &[0xaa; 8192]);
    disk.window().write(3 * MIB, &[0xaa; 4096]);
    disk.close().unwrap();
    drop(disk);
    assert_eq!(std::fs::read(&path).unwrap(), before);
}

/// A dirty log that the test fills.
#[derive(Default)]
struct Written(Mutex<Vec<u64>>);

impl DirtyPages for Arc<Written> {
    fn take(&self) -> io::Result<Vec<u64>> {
        let mut pages = self.0.lock().unwrap();
        let taken = pages.clone();
        pages.fill(0);
        Ok(taken)
    }
}

/// Memory over a disk that is open for writing, and the dirty log of its writes, without KVM.
struct Guest {
    disk: Arc<MappedDisk>,
    log: Arc<Written>,
    writeback: Writeback<Arc<Written>>,
}

impl Guest {
    fn over(disk: &Arc<dyn Disk>) -> Self {
        let disk = Arc::new(MappedDisk::new(disk, &mut MapBudget::new(1000)).unwrap());
        let log = Arc::new(Written::default());
        let words = disk.window().len() / PAGE_SIZE / 64;
        log.0.lock().unwrap().resize(words as usize, 0);
        Self {
            writeback: Writeback::new(disk.clone(), log.clone()),
            disk,
            log,
        }
    }

    fn writes(&self, offset: u64, bytes: &[u8]) {
        self.disk.window().write(offset, bytes);
        let pages = offset / PAGE_SIZE..(offset + bytes.len() as u64).div_ceil(PAGE_SIZE);
        for page in pages {
            self.log.0.lock().unwrap()[page as usize / 64] |= 1 << (page % 64);
        }
    }
}

fn bytes_of(disk: &dyn Disk, offset: u64, len: u64) -> Vec<u8> {
    let mut bytes = vec![0; len as usize];
    blocking::read_at(disk, &mut bytes, offset).unwrap();
    bytes
}

#[test]
fn a_flush_brings_what_was_written_to_the_child_and_leaves_the_parent() {
    let folder = Folder::new();
    let parent = folder.vhdx("base", 8 * MIB, &[(0, pattern(1, 2 * MIB))]);
    let before = std::fs::read(&parent).unwrap();
    let child = folder.child("child", &parent, &[(MIB, pattern(9, 65536))]);
    let guest = Guest::over(&open(&child, false));
    // Writes to a block of the parent, to one of both, across both, and to one that neither has.
    let writes = [
        (4096, pattern(20, 4096)),
        (MIB - 4096, pattern(30, 12288)),
        (MIB + 65536, pattern(40, 512)),
        (5 * MIB, pattern(50, 2 * MIB)),
    ];
    for (offset, bytes) in &writes {
        guest.writes(*offset, bytes);
    }
    let pages = 1 + 3 + 1 + 512;
    assert_eq!(guest.writeback.write_back().unwrap(), pages * PAGE_SIZE);
    assert_eq!(guest.writeback.write_back().unwrap(), 0, "all is done");
    guest.writes(0, &pattern(60, 4096));
    assert_eq!(guest.writeback.write_back().unwrap(), PAGE_SIZE);
    guest.disk.close().unwrap();
    assert_shows_its_disk(&guest.disk);
    drop(guest);
    let disk = open(&child, true);
    for (offset, bytes) in writes {
        assert_eq!(bytes_of(&*disk, offset, bytes.len() as u64), bytes);
    }
    assert_eq!(bytes_of(&*disk, 0, 4096), pattern(60, 4096));
    assert_eq!(std::fs::read(&parent).unwrap(), before);
}

#[test]
fn a_flush_is_durable_without_a_close() {
    let folder = Folder::new();
    let path = folder.vhdx("disk", 4 * MIB, &[]);
    let disk = open(&path, false);
    let guest = Guest::over(&disk);
    guest.writes(3 * MIB, &pattern(7, 4096));
    guest.writeback.write_back().unwrap();
    // A power cut would leave the file as it is now, with a log to replay.
    let copy = folder.raw("cut", &std::fs::read(&path).unwrap());
    assert_eq!(
        bytes_of(&*open(&copy, true), 3 * MIB, 4096),
        pattern(7, 4096)
    );
    assert_shows_its_disk(&mapped(&copy));
}

#[test]
fn what_the_guest_writes_past_the_end_of_the_disk_fails_the_flush_and_the_rest_is_kept() {
    let folder = Folder::new();
    let size = MIB + 4096 + 512;
    let path = folder.raw("raw", &vec![0; size as usize]);
    let options = OpenOptions {
        format: Some(Format::Raw),
        ..OpenOptions::default()
    };
    let guest = Guest::over(&storage::open(&path, &options).unwrap());
    guest.writes(MIB + 4096, &pattern(3, 512));
    guest.writes(MIB + 8192, &[0; 4096]);
    guest.writeback.write_back().unwrap();
    for past in [size, size.next_multiple_of(4096) + 4096] {
        guest.writes(0, &pattern(past as u8, 4096));
        guest.writes(past, &[1]);
        let error = guest.writeback.write_back().unwrap_err();
        assert!(
            matches!(error, WritebackError::PastEnd(at) if at == past),
            "{error}"
        );
        guest.disk.window().write(past, &[0]);
        guest.writeback.write_back().unwrap();
    }
    let bytes = std::fs::read(&path).unwrap();
    assert_eq!(bytes.len() as u64, size);
    assert_eq!(bytes[(MIB + 4096) as usize..], pattern(3, 512));
}

/// A raw disk of which the next `writes` writes and `flushes` flushes fail.
#[derive(Debug)]
struct Failing {
    disk: Arc<dyn Disk>,
    writes: AtomicU64,
    flushes: AtomicU64,
}

impl Failing {
    fn fail(counter: &AtomicU64) -> Result<(), DiskError> {
        match counter.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1)) {
            Ok(_) => Err(DiskError::Io {
                operation: "this test".into(),
                source: io::Error::other("injected"),
            }),
            Err(_) => Ok(()),
        }
    }
}

impl Disk for Failing {
    fn geometry(&self) -> Geometry {
        Geometry {
            logical_sector: SectorSize::B512,
            ..self.disk.geometry()
        }
    }
    fn resolve_read(
        &self,
        range: ByteRange,
        out: &mut Vec<Extent>,
    ) -> Result<RequestId, DiskError> {
        self.disk.resolve_read(range, out)
    }
    fn resolve_write(
        &self,
        range: ByteRange,
        out: &mut Vec<Extent>,
    ) -> Result<RequestId, DiskError> {
        Self::fail(&self.writes)?;
        self.disk.resolve_write(range, out)
    }
    fn finish(&self, request: RequestId, ok: bool) {
        self.disk.finish(request, ok);
    }
    fn flush_by_sync(&self) -> Option<Arc<File>> {
        None
    }
    fn flush(&self) -> Result<(), DiskError> {
        Self::fail(&self.flushes)?;
        self.disk.flush()
    }
    fn discard(&self, range: ByteRange) -> Result<(), DiskError> {
        self.disk.discard(range)
    }
    fn write_zeroes(&self, range: ByteRange, may_unmap: bool) -> Result<(), DiskError> {
        self.disk.write_zeroes(range, may_unmap)
    }
    fn map(&self, range: ByteRange, out: &mut Vec<Mapping>) -> Result<(), DiskError> {
        self.disk.map(range, out)
    }
    fn close(&self) -> Result<(), DiskError> {
        self.disk.close()
    }
}

#[test]
fn what_a_failed_flush_did_not_keep_is_tried_again_by_the_next() {
    let folder = Folder::new();
    let path = folder.raw("raw", &vec![0; MIB as usize]);
    for (writes, flushes) in [(1, 0), (0, 1)] {
        let failing = Arc::new(Failing {
            disk: open(&path, false),
            writes: writes.into(),
            flushes: flushes.into(),
        });
        let guest = Guest::over(&(failing as Arc<dyn Disk>));
        guest.writes(8192, &pattern(5, 4096));
        let error = guest.writeback.write_back().unwrap_err();
        let error = host::report::chain(&error).to_string();
        assert!(error.contains("injected"), "{error}");
        guest.writes(65536, &pattern(6, 4096));
        assert_eq!(guest.writeback.write_back().unwrap(), 2 * PAGE_SIZE);
        let bytes = std::fs::read(&path).unwrap();
        assert_eq!(bytes[8192..12288], pattern(5, 4096));
        assert_eq!(bytes[65536..69632], pattern(6, 4096));
    }
}

#[test]
fn a_write_that_is_not_allowed_goes_nowhere() {
    let mut dropped = DroppedWrites::new("a".to_owned());
    for _ in 0..2 {
        dropped.write(0, &[1; 8]);
        assert!(dropped.has_warned);
    }
    let mut data = [0; 4];
    dropped.read(0, &mut data);
    assert_eq!(data, [0xff; 4]);
}

#[test]
fn runs_are_pages_that_follow_each_other_also_across_words() {
    let found: Vec<_> = runs(&[0, 1 << 63, 0b101, 0, u64::MAX, u64::MAX]).collect();
    let pages = |first: u64, count: u64| (first * PAGE_SIZE, count * PAGE_SIZE);
    assert_eq!(found, [pages(127, 2), pages(130, 1), pages(256, 128)]);
    assert_eq!(runs(&[0; 8]).count(), 0);
}

#[test]
fn the_budget_is_half_of_what_the_host_lets_a_process_have() {
    let text = std::fs::read_to_string("/proc/sys/vm/max_map_count").unwrap();
    let count: usize = text.trim().parse().unwrap();
    let folder = Folder::new();
    let path = folder.raw("raw", &[0; 4096]);
    let mut budget = MapBudget::of_host();
    let first = MappedDisk::new(&open(&path, true), &mut budget).unwrap();
    let expected = MappingFigures {
        mappings: 2,
        mapped: 1,
        copied: 0,
    };
    assert_eq!(first.figures(), expected);
    assert_eq!(
        format!("{budget:?}"),
        format!("MapBudget({})", count / 2 - 2)
    );
}

#[test]
fn a_file_that_is_not_admitted_is_copied_and_one_that_is_cut_is_named() {
    let folder = Folder::new();
    let parent = folder.vhdx("base", 16 * MIB, &[(0, pattern(1, 2 * MIB))]);
    let child = folder.child("child", &parent, &[(MIB, pattern(9, MIB))]);
    let disk = open(&child, true);
    let top = disk.files().first().cloned().unwrap();
    let admits = |file: &Arc<File>| Arc::ptr_eq(file, &top);
    let mapped = MappedDisk::of(&disk, &mut MapBudget::new(1000), &admits).unwrap();
    assert_shows_its_disk(&mapped);
    let figures = mapped.figures();
    assert_eq!((figures.mapped, figures.copied), (256, 256));
    assert_eq!((mapped.files().len(), mapped.lost_page()), (1, None));
    let cut = mapped.files().remove(0).path().to_owned();
    let writer = File::options().write(true).open(&cut).unwrap();
    writer.set_len(0).unwrap();
    let lost = mapped.lost_page().unwrap();
    assert_eq!((lost.address, lost.file), (MIB, cut));
}

#[test]
fn own_pages_are_those_that_differ_from_the_disk_wherever_they_come_from() {
    let folder = Folder::new();
    // The last sectors of the disk are no whole page, and are copied.
    let path = folder.raw("raw", &vec![3; (MIB + 512) as usize]);
    let disk = mapped(&path);
    assert_eq!(disk.figures().copied, 1);
    assert_eq!(disk.own_pages().unwrap(), []);
    let window = disk.window();
    // The first write changes nothing, the next two change pages, and the last two are past the end of the disk.
    window.write(4096, &[3; 100]);
    window.write(3 * 4096, &[4; 4096]);
    window.write(4 * 4096 + 4095, &[0]);
    window.write(MIB + 512, &[0]);
    window.write(MIB + 8192, &[1]);
    let expected = [3 * 4096..5 * 4096, MIB + 8192..MIB + 12288];
    assert_eq!(disk.own_pages().unwrap(), expected);

    let again = mapped(&path);
    let file =
        File::open(folder.raw("saved", &[pattern(1, 4096), vec![3; 4096]].concat())).unwrap();
    let file = memshare::FileRegistry::default()
        .share(&Arc::new(file))
        .unwrap();
    again.map_over(8 * 4096, 8192, &file, 0).unwrap();
    assert_eq!(read(&again, 8 * 4096, 4096), pattern(1, 4096));
    again.map_over(2 * MIB, 4096, &file, 0).unwrap_err();
    // Nobody has touched the pages that were mapped over the disk's, of which the second equals the disk's.
    let own = |page: u64| std::iter::once(page * 4096..(page + 1) * 4096).collect::<Vec<_>>();
    assert_eq!(again.own_pages().unwrap(), own(8));
    again.window().write(8 * 4096, &[3; 4096]);
    assert_eq!(again.own_pages().unwrap(), []);
    again.window().write(9 * 4096, &[7]);
    assert_eq!(again.own_pages().unwrap(), own(9));
    assert!(again.lost_page().is_none());
    std::fs::write(folder.path("saved"), "").unwrap();
    assert!(
        again
            .lost_page()
            .is_some_and(|lost| lost.address == 8 * 4096)
    );
}

#[test]
fn a_disk_is_replaced_by_a_child_and_the_memory_shows_the_same() {
    let folder = Folder::new();
    let path = folder.vhdx("base", 8 * MIB, &[(0, pattern(1, 2 * MIB))]);
    let child = folder.path("child");
    let disk = open(&path, false);
    let guest = Guest::over(&disk);
    guest.writes(4096, &pattern(5, 4096));
    let change = |fails: bool| {
        guest.writeback.change_disk(|disk| {
            if fails {
                return Err(WritebackError::PastEnd(0));
            }
            let vhdx = Vhdx::of(disk.clone()).unwrap();
            let child: Arc<dyn Disk> = vhdx.snapshot(&path, &child).unwrap();
            Ok(child)
        })
    };
    change(true).unwrap_err();
    guest.writes(8192, &pattern(6, 4096));
    guest.writeback.write_back().unwrap();
    guest.writes(12288, &pattern(7, 4096));
    change(false).unwrap();
    // The parent has everything that was written before, flushed or not, and nothing that was written since.
    let sealed = std::fs::read(&path).unwrap();
    guest.writes(MIB, &pattern(8, 8192));
    guest.writes(6 * MIB, &pattern(9, 4096));
    guest.writeback.write_back().unwrap();
    assert!(std::fs::read(&path).unwrap() == sealed);
    let mut expected = pattern(1, 2 * MIB);
    for (at, byte, len) in [(4096, 5, 4096), (8192, 6, 4096), (12288, 7, 4096)] {
        expected[at..at + len].copy_from_slice(&pattern(byte, len as u64));
    }
    assert!(bytes_of(&*disk, 0, 2 * MIB) == expected);
    expected[MIB as usize..][..8192].copy_from_slice(&pattern(8, 8192));
    assert!(bytes_of(&*guest.disk.disk(), 0, 2 * MIB) == expected);
    assert!(read(&guest.disk, 0, 2 << 20) == expected);
    assert_eq!(read(&guest.disk, 6 * MIB, 4096), pattern(9, 4096));
    guest.disk.close().unwrap();
    drop((guest, disk));
    assert!(bytes_of(&*open(&child, true), 0, 2 * MIB) == expected);
}
