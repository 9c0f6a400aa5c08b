use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use event_manager::{EventManager, MutEventSubscriber};
use storage::{ByteRange, DiskError, Extent, ExtentKind, Geometry, RequestId, SectorSize};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES,
};
use virtio_queue::Queue;
use virtio_queue::desc::{RawDescriptor, split::Descriptor};
use virtio_queue::mock::MockSplitQueue;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};
use zerocopy::IntoBytes;

use super::super::RING_FEATURES;
use super::request::{Header, RangeSegment};
use super::*;

mod limiter;
mod persist;

pub(super) const DISK_SIZE: u64 = 1 << 20;
pub(super) const QUEUE_SIZE: u16 = 16;
const NEXT: u16 = 1;
const INDIRECT: u16 = 4;
pub(super) const WRITE: u16 = 2;
/// Where the tests put header, data and status.
const HEADER: u64 = 0x1_0000;
const DATA: u64 = 0x2_0000;
const STATUS: u64 = 0x3_0000;

/// A file as a disk, which counts what it is asked for.
#[derive(Debug)]
pub(super) struct FileDisk {
    pub(super) geometry: Geometry,
    pub(super) file: Arc<File>,
    pub(super) discards: Mutex<Vec<ByteRange>>,
    zeroes: Mutex<Vec<(ByteRange, bool)>>,
    flushes: AtomicUsize,
}

impl FileDisk {
    pub(super) fn new(read_only: bool, sector: SectorSize) -> Arc<Self> {
        let file = tempfile::tempfile().unwrap();
        file.set_len(DISK_SIZE).unwrap();
        Arc::new(Self {
            geometry: Geometry {
                size: DISK_SIZE,
                logical_sector: sector,
                physical_sector: SectorSize::B4096,
                discard_granularity: 4096,
                read_only,
            },
            file: Arc::new(file),
            discards: Mutex::default(),
            zeroes: Mutex::default(),
            flushes: AtomicUsize::new(0),
        })
    }

    fn extent(&self, range: ByteRange, out: &mut Vec<Extent>) -> Result<(), DiskError> {
        self.geometry.check(range)?;
        if !range.is_empty() {
            out.push(Extent {
                offset: range.offset(),
                len: range.len(),
                kind: ExtentKind::Data {
                    file: self.file.clone(),
                    file_offset: range.offset(),
                },
            });
        }
        Ok(())
    }
}

impl Disk for FileDisk {
    fn geometry(&self) -> Geometry {
        self.geometry
    }
    fn resolve_read(
        &self,
        range: ByteRange,
        out: &mut Vec<Extent>,
    ) -> Result<RequestId, DiskError> {
        self.extent(range, out)?;
        Ok(RequestId::new(0))
    }
    fn resolve_write(
        &self,
        range: ByteRange,
        out: &mut Vec<Extent>,
    ) -> Result<RequestId, DiskError> {
        self.extent(range, out)?;
        Ok(RequestId::new(0))
    }
    fn finish(&self, _: RequestId, _: bool) {}
    fn flush_by_sync(&self) -> Option<Arc<File>> {
        None
    }
    fn flush(&self) -> Result<(), DiskError> {
        self.flushes.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
    fn discard(&self, range: ByteRange) -> Result<(), DiskError> {
        self.discards.lock().unwrap().push(range);
        Ok(())
    }
    fn write_zeroes(&self, range: ByteRange, may_unmap: bool) -> Result<(), DiskError> {
        self.zeroes.lock().unwrap().push((range, may_unmap));
        Ok(())
    }
    fn map(&self, _: ByteRange, _: &mut Vec<storage::Mapping>) -> Result<(), DiskError> {
        Ok(())
    }
    fn close(&self) -> Result<(), DiskError> {
        Ok(())
    }
}

pub(super) fn memory() -> GuestMemory {
    // Two regions that touch, so that buffers can lie across them.
    GuestMemory::from_ranges(&[
        (GuestAddress(0), 0x2_0200),
        (GuestAddress(0x2_0200), 0x2_0000),
    ])
    .unwrap()
}

pub(super) fn device(disk: Arc<FileDisk>, engine: EngineKind) -> VirtioBlock {
    let config = BlockConfig {
        disk,
        serial: "coppice".into(),
        queues: 1,
        queue_size: QUEUE_SIZE,
        engine,
    };
    let irqfd = EventFd::new(libc::EFD_NONBLOCK).unwrap();
    VirtioBlock::new(config, Arc::new(Interrupt::new(irqfd))).unwrap()
}

pub(super) fn activate(device: &mut VirtioBlock, memory: &GuestMemory, queue: Queue, flush: bool) {
    let flush = if flush { bit(VIRTIO_BLK_F_FLUSH) } else { 0 };
    device
        .activate(Activation {
            memory: memory.clone(),
            queues: vec![Some(queue)],
            features: RING_FEATURES | flush,
        })
        .unwrap();
}

/// A driver with one request at a time under way.
struct Driver<'a> {
    device: VirtioBlock,
    memory: &'a GuestMemory,
    ring: MockSplitQueue<'a, GuestMemory>,
    sent: u16,
}

impl<'a> Driver<'a> {
    fn new(memory: &'a GuestMemory, mut device: VirtioBlock, flush: bool) -> Self {
        let ring = MockSplitQueue::new(memory, QUEUE_SIZE);
        activate(&mut device, memory, ring.create_queue().unwrap(), flush);
        Self {
            device,
            memory,
            ring,
            sent: 0,
        }
    }

    /// Makes a chain available.
    fn offer(&mut self, buffers: &[(u64, u32, u16)]) {
        for (index, (address, len, flags)) in (0u16..).zip(buffers) {
            let last = usize::from(index) + 1 == buffers.len();
            let flags = flags | if last { 0 } else { NEXT };
            let descriptor = RawDescriptor::from(Descriptor::new(*address, *len, flags, index + 1));
            self.ring.desc_table().store(index, descriptor).unwrap();
        }
        let slot = usize::from(self.sent % QUEUE_SIZE);
        self.ring.avail().ring().ref_at(slot).unwrap().store(0);
        self.sent += 1;
        self.ring.avail().idx().store(self.sent);
    }

    /// The status and the used length of a chain that the device has served.
    fn run(&mut self, buffers: &[(u64, u32, u16)]) -> (u8, u32) {
        self.memory.write_obj(0xffu8, GuestAddress(STATUS)).unwrap();
        self.offer(buffers);
        self.device.serve(0);
        self.device.disk.drain();
        self.device.finish();
        assert_eq!(self.ring.used().idx().load(), self.sent, "not given back");
        let slot = usize::from((self.sent - 1) % QUEUE_SIZE);
        let used = self.ring.used().ring().ref_at(slot).unwrap().load();
        (
            self.memory.read_obj(GuestAddress(STATUS)).unwrap(),
            used.len(),
        )
    }

    fn header(&self, kind: u32, sector: u64) -> (u64, u32, u16) {
        let header = Header {
            kind: kind.into(),
            reserved: 0.into(),
            sector: sector.into(),
        };
        self.memory
            .write_slice(header.as_bytes(), GuestAddress(HEADER))
            .unwrap();
        (HEADER, 16, 0)
    }

    fn request(&mut self, kind: u32, sector: u64, data: (u64, u32, u16)) -> (u8, u32) {
        let header = self.header(kind, sector);
        self.run(&[header, data, (STATUS, 1, WRITE)])
    }

    /// A discard or write-zeroes request of such ranges: sector, count, flags.
    fn ranges(&mut self, kind: u32, ranges: &[(u64, u32, u32)]) -> u8 {
        let segments: Vec<_> = ranges
            .iter()
            .map(|(sector, count, flags)| RangeSegment {
                sector: (*sector).into(),
                num_sectors: (*count).into(),
                flags: (*flags).into(),
            })
            .collect();
        self.memory
            .write_slice(segments.as_bytes(), GuestAddress(DATA))
            .unwrap();
        self.request(kind, 0, (DATA, 16 * ranges.len() as u32, 0)).0
    }

    fn bytes(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory
            .read_slice(&mut bytes, GuestAddress(address))
            .unwrap();
        bytes
    }
}

fn with_each_engine(test: impl Fn(EngineKind)) {
    test(EngineKind::IoUring);
    test(EngineKind::Worker);
}

const OK: u8 = VIRTIO_BLK_S_OK as u8;
const IOERR: u8 = VIRTIO_BLK_S_IOERR as u8;
const UNSUPP: u8 = 2;

#[test]
fn what_is_written_is_read_again_whatever_the_framing() {
    with_each_engine(|engine| {
        let memory = memory();
        let disk = FileDisk::new(false, SectorSize::B512);
        let mut driver = Driver::new(&memory, device(disk.clone(), engine), true);
        let bytes: Vec<u8> = (0..1024u32).map(|i| (i * 7 / 3) as u8).collect();
        memory.write_slice(&bytes, GuestAddress(DATA)).unwrap();
        // The header in three parts, the last of which has the first bytes of the data behind it.
        driver.header(VIRTIO_BLK_T_OUT, 3);
        memory
            .write_slice(&bytes[..4], GuestAddress(HEADER + 16))
            .unwrap();
        let written = driver.run(&[
            (HEADER, 1, 0),
            (HEADER + 1, 8, 0),
            (HEADER + 9, 11, 0),
            (DATA + 4, 1020, 0),
            (STATUS, 1, WRITE),
        ]);
        assert_eq!(written, (OK, 1));
        let mut stored = vec![0; 1024];
        disk.file.read_exact_at(&mut stored, 3 * 512).unwrap();
        assert_eq!(stored, bytes);
        // The status in the same descriptor as the end of the data.
        driver.header(VIRTIO_BLK_T_IN, 3);
        let read = driver.run(&[
            (HEADER, 16, 0),
            (DATA + 0x1000, 100, WRITE),
            (STATUS - 924, 925, WRITE),
        ]);
        assert_eq!(read, (OK, 1025));
        assert_eq!(driver.bytes(DATA + 0x1000, 100), bytes[..100]);
        assert_eq!(driver.bytes(STATUS - 924, 924), bytes[100..]);
        assert_eq!(
            driver.device.metrics.read_bytes.load(Ordering::Relaxed),
            1024
        );
        assert_eq!(
            driver.device.metrics.written_bytes.load(Ordering::Relaxed),
            1024
        );
    });
}

#[test]
fn an_indirect_chain_is_served() {
    let memory = memory();
    let disk = FileDisk::new(false, SectorSize::B512);
    disk.file.write_all_at(&[9; 512], 0).unwrap();
    let mut driver = Driver::new(&memory, device(disk, EngineKind::Auto), true);
    let header = driver.header(VIRTIO_BLK_T_IN, 0);
    let table = [header, (DATA, 512, WRITE), (STATUS, 1, WRITE)];
    for (index, (address, len, flags)) in (0u16..).zip(table) {
        let flags = flags | if index < 2 { NEXT } else { 0 };
        let descriptor = RawDescriptor::from(Descriptor::new(address, len, flags, index + 1));
        let at = GuestAddress(0x8000 + 16 * u64::from(index));
        memory.write_obj(descriptor, at).unwrap();
    }
    assert_eq!(driver.run(&[(0x8000, 48, INDIRECT)]), (OK, 513));
    assert_eq!(driver.bytes(DATA, 512), [9; 512]);
}

#[test]
fn requests_outside_the_disk_or_off_its_sectors_fail_and_change_nothing() {
    for (sector, len, size) in [
        (DISK_SIZE / 512, 512, SectorSize::B512),
        (DISK_SIZE / 512 - 1, 1024, SectorSize::B512),
        (u64::MAX, 512, SectorSize::B512),
        (u64::MAX / 512, 512, SectorSize::B512),
        (0, 511, SectorSize::B512),
        (1, 4096, SectorSize::B4096),
        (0, 512, SectorSize::B4096),
    ] {
        let memory = memory();
        let disk = FileDisk::new(false, size);
        let mut driver = Driver::new(&memory, device(disk, EngineKind::Auto), true);
        for (kind, flags) in [(VIRTIO_BLK_T_IN, WRITE), (VIRTIO_BLK_T_OUT, 0)] {
            let data = (DATA, len, flags);
            assert_eq!(
                driver.request(kind, sector, data).0,
                IOERR,
                "{sector}+{len}"
            );
        }
    }
}

#[test]
fn a_read_only_disk_refuses_all_that_writes() {
    let memory = memory();
    let device = device(FileDisk::new(true, SectorSize::B512), EngineKind::Auto);
    assert_ne!(device.features() & bit(VIRTIO_BLK_F_RO), 0);
    assert_eq!(device.features() & bit(VIRTIO_BLK_F_DISCARD), 0);
    let mut driver = Driver::new(&memory, device, true);
    assert_eq!(driver.request(VIRTIO_BLK_T_OUT, 0, (DATA, 512, 0)).0, IOERR);
    assert_eq!(driver.ranges(VIRTIO_BLK_T_DISCARD, &[(0, 1, 0)]), IOERR);
    assert_eq!(
        driver.ranges(VIRTIO_BLK_T_WRITE_ZEROES, &[(0, 1, 0)]),
        IOERR
    );
    assert_eq!(driver.request(VIRTIO_BLK_T_IN, 0, (DATA, 512, WRITE)).0, OK);
}

#[test]
fn without_the_flush_feature_each_write_is_durable_when_it_completes() {
    with_each_engine(|engine| {
        for (flush_accepted, flushes) in [(true, 0), (false, 2)] {
            let memory = memory();
            let disk = FileDisk::new(false, SectorSize::B512);
            let mut driver = Driver::new(&memory, device(disk.clone(), engine), flush_accepted);
            assert_eq!(driver.request(VIRTIO_BLK_T_OUT, 0, (DATA, 512, 0)).0, OK);
            assert_eq!(driver.ranges(VIRTIO_BLK_T_WRITE_ZEROES, &[(0, 1, 0)]), OK);
            assert_eq!(disk.flushes.load(Ordering::SeqCst), flushes);
            let header = driver.header(VIRTIO_BLK_T_FLUSH, 0);
            assert_eq!(driver.run(&[header, (STATUS, 1, WRITE)]), (OK, 1));
            assert_eq!(disk.flushes.load(Ordering::SeqCst), flushes + 1);
        }
    });
}

#[test]
fn the_serial_number_has_20_bytes() {
    let memory = memory();
    let disk = FileDisk::new(false, SectorSize::B512);
    let mut driver = Driver::new(&memory, device(disk, EngineKind::Auto), true);
    let data = (DATA, 20, WRITE);
    assert_eq!(driver.request(VIRTIO_BLK_T_GET_ID, 0, data), (OK, 21));
    assert_eq!(
        driver.bytes(DATA, 20),
        *b"coppice\0\0\0\0\0\0\0\0\0\0\0\0\0"
    );
    let short = (DATA, 19, WRITE);
    assert_eq!(driver.request(VIRTIO_BLK_T_GET_ID, 0, short).0, IOERR);
    assert_eq!(driver.request(0x1234, 0, data).0, UNSUPP);
}

#[test]
fn discards_and_zeroes_reach_the_disk_within_their_limits() {
    with_each_engine(|engine| {
        let memory = memory();
        let disk = FileDisk::new(false, SectorSize::B512);
        let mut driver = Driver::new(&memory, device(disk.clone(), engine), true);
        let range = |offset, len| ByteRange::new(offset, len).unwrap();
        let two = [(0, 8, 0), (16, 1, 0)];
        assert_eq!(driver.ranges(VIRTIO_BLK_T_DISCARD, &two), OK);
        assert_eq!(
            *disk.discards.lock().unwrap(),
            [range(0, 4096), range(8192, 512)]
        );
        assert_eq!(driver.ranges(VIRTIO_BLK_T_WRITE_ZEROES, &[(1, 2, 1)]), OK);
        assert_eq!(driver.ranges(VIRTIO_BLK_T_WRITE_ZEROES, &[(1, 2, 0)]), OK);
        assert_eq!(
            *disk.zeroes.lock().unwrap(),
            [(range(512, 1024), true), (range(512, 1024), false)]
        );
        assert_eq!(
            driver.ranges(VIRTIO_BLK_T_DISCARD, &[(0, 1, 1)]),
            UNSUPP,
            "unmap"
        );
        assert_eq!(
            driver.ranges(VIRTIO_BLK_T_WRITE_ZEROES, &[(0, 1, 2)]),
            UNSUPP
        );
        assert_eq!(
            driver.ranges(VIRTIO_BLK_T_DISCARD, &[(2047, 2, 0)]),
            IOERR,
            "past the end"
        );
        assert_eq!(driver.ranges(VIRTIO_BLK_T_DISCARD, &[(0, 1, 0); 17]), IOERR);
        assert_eq!(driver.ranges(VIRTIO_BLK_T_DISCARD, &[]), IOERR);
        assert_eq!(disk.discards.lock().unwrap().len(), 2);
        assert_eq!(disk.zeroes.lock().unwrap().len(), 2);
    });
}

#[test]
fn a_short_header_ends_in_an_error_and_a_missing_status_fails_the_device() {
    let memory = memory();
    let disk = FileDisk::new(false, SectorSize::B512);
    let mut driver = Driver::new(&memory, device(disk, EngineKind::Auto), true);
    assert_eq!(driver.run(&[(HEADER, 15, 0), (STATUS, 1, WRITE)]).0, IOERR);
    driver.header(VIRTIO_BLK_T_FLUSH, 0);
    driver.offer(&[(HEADER, 16, 0)]);
    driver.device.serve(0);
    assert!(driver.device.interrupt.needs_reset());
    assert!(driver.device.active.is_none());
}

#[test]
fn a_buffer_that_is_not_ram_fails_its_request_and_not_the_device() {
    let memory = memory();
    let disk = FileDisk::new(false, SectorSize::B512);
    disk.file.write_all_at(&[5; 512], 0).unwrap();
    let mut driver = Driver::new(&memory, device(disk, EngineKind::Auto), true);
    // Where pmem devices lie; and across the end of RAM.
    for outside in [4 << 30, 0x4_0200 - 256] {
        for (kind, flags) in [(VIRTIO_BLK_T_IN, WRITE), (VIRTIO_BLK_T_OUT, 0)] {
            assert_eq!(driver.request(kind, 0, (outside, 512, flags)), (IOERR, 0));
        }
    }
    assert_eq!(driver.request(VIRTIO_BLK_T_IN, 0, (DATA, 512, WRITE)).0, OK);
    assert_eq!(driver.bytes(DATA, 512), [5; 512]);
    let header = driver.header(VIRTIO_BLK_T_IN, 0);
    driver.offer(&[header, (DATA, 512, WRITE), (4 << 30, 1, WRITE)]);
    driver.device.serve(0);
    assert!(driver.device.interrupt.needs_reset(), "no status byte");
}

#[test]
fn a_head_offered_again_and_again_takes_no_more_than_a_queue_of_requests() {
    let memory = memory();
    let disk = FileDisk::new(false, SectorSize::B512);
    // No request of this disk ends before the driver has offered more than the queue holds.
    let mut driver = Driver::new(&memory, device(disk, EngineKind::Worker), true);
    let header = driver.header(VIRTIO_BLK_T_IN, 0);
    for _ in 0..4 {
        for _ in 0..QUEUE_SIZE {
            driver.offer(&[header, (DATA, 512, WRITE), (STATUS, 1, WRITE)]);
        }
        // As `serve`, without looking for what is done.
        driver.device.take(0).unwrap();
        let ring = driver.device.active.as_mut().unwrap().rings[0]
            .as_mut()
            .unwrap();
        assert!(matches!(ring.next(&memory), Ok(Next::Full)));
        driver.device.disk.drain();
        driver.device.finish();
        assert_eq!(driver.ring.used().idx().load(), driver.sent);
        assert_eq!(driver.device.kicks[0].read().unwrap(), 2, "it looks again");
    }
}

#[test]
fn a_paused_device_has_nothing_in_flight_and_a_resumed_one_catches_up() {
    with_each_engine(|engine| {
        let memory = memory();
        let disk = FileDisk::new(false, SectorSize::B512);
        let mut driver = Driver::new(&memory, device(disk, engine), true);
        let header = driver.header(VIRTIO_BLK_T_IN, 0);
        let chain = [header, (DATA, 512, WRITE), (STATUS, 1, WRITE)];
        driver.offer(&chain);
        driver.device.serve(0);
        driver.device.pause();
        assert_eq!(driver.ring.used().idx().load(), 1);
        driver.offer(&chain);
        driver.device.serve(0);
        driver.device.disk.drain();
        driver.device.finish();
        assert_eq!(driver.ring.used().idx().load(), 1);
        driver.device.resume();
        assert!(
            driver.device.kicks[0].read().is_ok(),
            "the device thread wakes"
        );
        driver.device.serve(0);
        driver.device.disk.drain();
        driver.device.finish();
        assert_eq!(driver.ring.used().idx().load(), 2);
    });
}

#[test]
fn a_reset_device_is_quiet_until_it_is_activated_again() {
    with_each_engine(|engine| {
        let memory = memory();
        let disk = FileDisk::new(false, SectorSize::B512);
        let mut driver = Driver::new(&memory, device(disk, engine), true);
        let header = driver.header(VIRTIO_BLK_T_IN, 0);
        driver.offer(&[header, (DATA, 512, WRITE), (STATUS, 1, WRITE)]);
        driver.device.take(0).unwrap();
        driver.device.reset();
        assert!(driver.device.disk.completion().is_none());
        driver.device.serve(0);
        assert_eq!(driver.ring.used().idx().load(), 0);
        let Driver { device, .. } = driver;
        memory.write_slice(&[0; 0x1000], GuestAddress(0)).unwrap();
        let mut driver = Driver::new(&memory, device, true);
        assert_eq!(driver.request(VIRTIO_BLK_T_IN, 0, (DATA, 512, WRITE)).0, OK);
    });
}

#[test]
fn kicks_and_completions_reach_the_device_through_its_events() {
    with_each_engine(|engine| {
        let memory = memory();
        let disk = FileDisk::new(false, SectorSize::B512);
        disk.file.write_all_at(&[3; 512], 512).unwrap();
        let mut driver = Driver::new(&memory, device(disk, engine), true);
        let header = driver.header(VIRTIO_BLK_T_IN, 1);
        driver.offer(&[header, (DATA, 512, WRITE), (STATUS, 1, WRITE)]);
        driver.device.kicks[0].write(1).unwrap();
        let Driver { device, ring, .. } = driver;
        let interrupt = device.interrupt.clone();
        let device = Arc::new(Mutex::new(device));
        let subscriber: Arc<Mutex<dyn MutEventSubscriber + Send>> = device;
        let mut events = EventManager::new().unwrap();
        event_manager::SubscriberOps::add_subscriber(&mut events, subscriber);
        // The kernel's work for an io_uring may interrupt a wait, which has no event then.
        let asked = Instant::now();
        while ring.used().idx().load() == 0 {
            assert!(asked.elapsed() < Duration::from_mins(1), "no event");
            events.run_with_timeout(60_000).unwrap();
        }
        assert_eq!(interrupt.status(), super::super::INTERRUPT_USED_BUFFER);
        let mut read = [0; 512];
        memory.read_slice(&mut read, GuestAddress(DATA)).unwrap();
        assert_eq!(read, [3; 512]);
    });
}

#[test]
fn the_driver_is_notified_of_a_replaced_disk_if_it_is_of_the_same_kind() {
    let mut device = device(FileDisk::new(false, SectorSize::B512), EngineKind::Auto);
    let mut larger = FileDisk::new(false, SectorSize::B512);
    Arc::get_mut(&mut larger).unwrap().geometry.size = 2 * DISK_SIZE;
    device.replace_disk(larger).unwrap();
    let mut capacity = [0; 8];
    device.read_config(0, &mut capacity);
    assert_eq!(u64::from_le_bytes(capacity), 2 * DISK_SIZE / 512);
    assert_eq!(
        device.interrupt.status(),
        super::super::INTERRUPT_CONFIG_CHANGE
    );
    for other in [
        FileDisk::new(true, SectorSize::B512),
        FileDisk::new(false, SectorSize::B4096),
    ] {
        assert!(matches!(
            device.replace_disk(other),
            Err(BlockError::Replacement(_))
        ));
    }
}

/// VIRTIO 1.2, 5.2.4.
#[test]
fn the_configuration_space_is_laid_out_as_specified() {
    let config = BlockConfig {
        disk: FileDisk::new(false, SectorSize::B512),
        serial: String::new(),
        queues: 3,
        queue_size: 64,
        engine: EngineKind::Auto,
    };
    let irqfd = EventFd::new(libc::EFD_NONBLOCK).unwrap();
    let device = VirtioBlock::new(config, Arc::new(Interrupt::new(irqfd))).unwrap();
    assert_ne!(device.features() & bit(VIRTIO_BLK_F_MQ), 0);
    assert_eq!(device.queue_max_sizes(), [64, 64, 64]);
    let u32_at = |offset| {
        let mut data = [0xee; 4];
        device.read_config(offset, &mut data);
        u32::from_le_bytes(data)
    };
    assert_eq!(u32_at(0), (DISK_SIZE / 512) as u32);
    assert_eq!(u32_at(12), 62, "seg_max");
    assert_eq!(u32_at(20), 512, "blk_size");
    assert_eq!(
        u32_at(24),
        3 | (8 << 16),
        "4 KiB physical blocks, and writes of 8 sectors"
    );
    assert_eq!(u32_at(32) >> 16, 3, "num_queues");
    assert_eq!(u32_at(44), 8, "discard_sector_alignment");
    assert_eq!(u32_at(56), 1, "write_zeroes_may_unmap");
    assert_eq!(u32_at(58), 0, "past the last field");
    assert_eq!(u32_at(u64::MAX), 0);
}

#[test]
fn a_request_on_memory_whose_file_was_cut_fails_and_is_reported() {
    with_each_engine(|engine| {
        let memory = memory();
        let region = memory.iter().next().unwrap();
        let owner = Arc::new(memory.clone());
        // SAFETY: whole pages at the start of a region, private and mapped as long as `owner` lives, which nobody holds
        // references into.
        let window = unsafe { memshare::Window::over(region.as_ptr(), 0x2_0000, owner) };
        let file = tempfile::tempfile().unwrap();
        file.set_len(4096).unwrap();
        window.map_file(0x1_2000, 4096, &file, 0).unwrap();
        file.set_len(0).unwrap();
        let mut device = device(FileDisk::new(false, SectorSize::B512), engine);
        let reported = Arc::new(AtomicUsize::new(0));
        let count = reported.clone();
        device.on_fault(Arc::new(move || {
            count.fetch_add(1, Ordering::Relaxed);
        }));
        let mut driver = Driver::new(&memory, device, true);
        let read = driver.request(VIRTIO_BLK_T_IN, 0, (0x1_2000, 512, WRITE));
        assert_eq!((read.0, reported.load(Ordering::Relaxed)), (IOERR, 1));
        let written = driver.request(VIRTIO_BLK_T_OUT, 0, (0x1_2000, 512, 0));
        assert_eq!((written.0, reported.load(Ordering::Relaxed)), (IOERR, 2));
        let elsewhere = driver.request(VIRTIO_BLK_T_IN, 0, (DATA, 512, WRITE));
        assert_eq!((elsewhere.0, reported.load(Ordering::Relaxed)), (OK, 2));
    });
}
