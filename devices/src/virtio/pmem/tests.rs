use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};

use event_manager::{EventManager, SubscriberOps};
use virtio_queue::desc::{RawDescriptor, split::Descriptor};
use virtio_queue::mock::MockSplitQueue;
use vm_memory::{Bytes, GuestAddress};

use super::*;

mod limiter;
mod persist;

pub(super) const RING_SIZE: u16 = 16;
pub(super) const NEXT: u16 = 1;
pub(super) const WRITE: u16 = 2;
/// Where the tests put types and responses, a pair of descriptors each.
const REQUESTS: u64 = 0x1_0000;
const RESPONSES: u64 = 0x1_1000;
const START: u64 = 4 << 30;
const SIZE: u64 = 64 << 20;
/// What no response is.
const UNTOUCHED: u32 = 0x5a5a_5a5a;

/// Counts its flushes, and fails a number of them.
#[derive(Default)]
pub(super) struct Counting {
    flushes: AtomicUsize,
    failures: AtomicUsize,
}

impl Backing for Counting {
    fn flush(&self) -> Outcome {
        self.flushes.fetch_add(1, Ordering::SeqCst);
        let failures = &self.failures;
        let fails = failures.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1));
        match fails {
            Ok(_) => Err("as this test wants".into()),
            Err(_) => Ok(4096),
        }
    }
}

/// Ends a flush when the test says so.
struct Stepped {
    begun: Sender<()>,
    go_on: Mutex<Receiver<()>>,
}

impl Backing for Stepped {
    fn flush(&self) -> Outcome {
        self.begun.send(())?;
        self.go_on.lock().unwrap().recv()?;
        Ok(0)
    }
}

pub(super) fn memory() -> GuestMemory {
    GuestMemory::from_ranges(&[(GuestAddress(0), 0x4_0000)]).unwrap()
}

pub(super) fn device(backing: Option<Arc<dyn Backing>>) -> VirtioPmem {
    let irqfd = EventFd::new(libc::EFD_NONBLOCK).unwrap();
    let config = PmemConfig {
        start: START,
        size: SIZE,
        backing,
        mapping: MappingFigures::default(),
    };
    VirtioPmem::new(config, Arc::new(Interrupt::new(irqfd))).unwrap()
}

pub(super) fn activate(device: &mut VirtioPmem, memory: &GuestMemory, queue: Queue) {
    device
        .activate(Activation {
            memory: memory.clone(),
            queues: vec![Some(queue)],
            features: RING_FEATURES,
        })
        .unwrap();
}

struct Driver<'a> {
    device: Arc<Mutex<VirtioPmem>>,
    memory: &'a GuestMemory,
    ring: MockSplitQueue<'a, GuestMemory>,
    events: EventManager<Arc<Mutex<VirtioPmem>>>,
    sent: u16,
}

impl<'a> Driver<'a> {
    fn new(memory: &'a GuestMemory, mut device: VirtioPmem) -> Self {
        let ring = MockSplitQueue::new(memory, RING_SIZE);
        activate(&mut device, memory, ring.create_queue().unwrap());
        let device = Arc::new(Mutex::new(device));
        let mut events = EventManager::new().unwrap();
        events.add_subscriber(device.clone());
        Self {
            device,
            memory,
            ring,
            events,
            sent: 0,
        }
    }

    fn device(&self) -> std::sync::MutexGuard<'_, VirtioPmem> {
        self.device.lock().unwrap()
    }

    /// Makes a chain available, from descriptor `first` on.
    fn offer(&mut self, first: u16, buffers: &[(u64, u32, u16)]) {
        for (index, (address, len, flags)) in (first..).zip(buffers) {
            let last = usize::from(index - first) + 1 == buffers.len();
            let flags = flags | if last { 0 } else { NEXT };
            let descriptor = RawDescriptor::from(Descriptor::new(*address, *len, flags, index + 1));
            self.ring.desc_table().store(index, descriptor).unwrap();
        }
        let slot = usize::from(self.sent % RING_SIZE);
        self.ring.avail().ring().ref_at(slot).unwrap().store(first);
        self.sent += 1;
        self.ring.avail().idx().store(self.sent);
    }

    /// Makes request `number` available.
    fn request(&mut self, number: u16, kind: u32) {
        let at = 4 * u64::from(number);
        let (request, response) = (REQUESTS + at, RESPONSES + at);
        self.memory.write_obj(kind, GuestAddress(request)).unwrap();
        let untouched = GuestAddress(response);
        self.memory.write_obj(UNTOUCHED, untouched).unwrap();
        self.offer(2 * number, &[(request, 4, 0), (response, 4, WRITE)]);
    }

    /// Gives the device thread a turn, however little there is to do.
    fn turn(&mut self) {
        self.device().kick();
        self.events.run_with_timeout(0).unwrap();
    }

    fn response(&self, number: u16) -> u32 {
        let at = GuestAddress(RESPONSES + 4 * u64::from(number));
        self.memory.read_obj(at).unwrap()
    }

    fn used(&self) -> u16 {
        self.ring.used().idx().load()
    }
}

#[test]
fn the_configuration_has_the_place_of_the_memory_and_is_read_only() {
    let mut device = device(None);
    let mut bytes = [0xff; 20];
    device.write_config(0, &[1; 16]);
    device.read_config(0, &mut bytes);
    assert_eq!(bytes[..8], START.to_le_bytes());
    assert_eq!(bytes[8..16], SIZE.to_le_bytes());
    assert_eq!(bytes[16..], [0; 4]);
    device.read_config(12, &mut bytes[..8]);
    assert_eq!(bytes[..8], [0; 8]);
    device.read_config(u64::MAX, &mut bytes);
    assert_eq!(bytes, [0; 20]);
    assert_eq!((device.device_id(), device.features()), (27, RING_FEATURES));
}

#[test]
fn memory_that_keeps_nothing_is_flushed_at_once() {
    let memory = memory();
    let mut driver = Driver::new(&memory, device(None));
    driver.request(0, 0);
    driver.turn();
    assert_eq!((driver.used(), driver.response(0)), (1, 0));
    let device = driver.device();
    assert_eq!(
        device.interrupt.status(),
        super::super::INTERRUPT_USED_BUFFER
    );
    assert_eq!(device.metrics.flushes.load(Ordering::Relaxed), 1);
}

#[test]
fn a_request_completes_when_its_flush_is_over_with_the_status_of_the_flush() {
    let memory = memory();
    let backing = Arc::new(Counting::default());
    let mut driver = Driver::new(&memory, device(Some(backing.clone())));
    backing.failures.store(1, Ordering::SeqCst);
    for (number, expected) in [(0, ResponseCode::Failed), (1, ResponseCode::Done)] {
        driver.request(number, 0);
        driver.turn();
        driver.device().drain();
        assert_eq!(driver.response(number), expected.value());
    }
    assert_eq!(driver.used(), 2);
    assert_eq!(backing.flushes.load(Ordering::SeqCst), 2);
    let metrics = driver.device().metrics.clone();
    let count = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
    assert_eq!((count(&metrics.flushes), count(&metrics.errors)), (1, 1));
    assert_eq!(count(&metrics.written_bytes), 4096);
}

#[test]
fn requests_that_come_in_during_a_flush_share_one_that_begins_after_them() {
    let memory = memory();
    let (begun, has_begun) = channel();
    let (go_on, may_go_on) = channel();
    let backing = Stepped {
        begun,
        go_on: Mutex::new(may_go_on),
    };
    let mut driver = Driver::new(&memory, device(Some(Arc::new(backing))));
    driver.request(0, 0);
    driver.turn();
    has_begun.recv().unwrap();
    for number in 1..4 {
        driver.request(number, 0);
    }
    driver.turn();
    assert!(has_begun.try_recv().is_err(), "two flushes at a time");
    go_on.send(()).unwrap();
    while driver.used() < 1 {
        driver.events.run_with_timeout(1000).unwrap();
    }
    assert_eq!((driver.response(0), driver.response(1)), (0, UNTOUCHED));
    has_begun.recv().unwrap();
    assert_eq!(driver.used(), 1);
    go_on.send(()).unwrap();
    while driver.used() < 4 {
        driver.events.run_with_timeout(1000).unwrap();
    }
    assert!((1..4).all(|number| driver.response(number) == 0));
    assert!(has_begun.try_recv().is_err(), "a flush that nobody wanted");
}

#[test]
fn a_pause_answers_what_was_taken_and_a_resumed_device_catches_up() {
    let memory = memory();
    let backing = Arc::new(Counting::default());
    let mut driver = Driver::new(&memory, device(Some(backing)));
    driver.request(0, 0);
    driver.turn();
    driver.device().pause();
    assert_eq!(driver.response(0), 0);
    driver.request(1, 0);
    driver.turn();
    assert_eq!(driver.response(1), UNTOUCHED);
    driver.device().resume();
    while driver.used() < 2 {
        driver.events.run_with_timeout(1000).unwrap();
    }
    assert_eq!(driver.response(1), 0);
}

#[test]
fn a_reset_forgets_requests_and_a_flush_in_progress_completes_none() {
    let memory = memory();
    let (begun, has_begun) = channel();
    let (go_on, may_go_on) = channel();
    let backing = Stepped {
        begun,
        go_on: Mutex::new(may_go_on),
    };
    let mut driver = Driver::new(&memory, device(Some(Arc::new(backing))));
    driver.request(0, 0);
    driver.turn();
    has_begun.recv().unwrap();
    driver.device().reset();
    let ring = MockSplitQueue::new(&memory, RING_SIZE);
    activate(&mut driver.device(), &memory, ring.create_queue().unwrap());
    driver.sent = 0;
    driver.ring = ring;
    driver.request(1, 0);
    driver.turn();
    assert!(
        has_begun.try_recv().is_err(),
        "it began before the request came"
    );
    for _ in 0..2 {
        go_on.send(()).unwrap();
    }
    while driver.used() < 1 {
        driver.events.run_with_timeout(1000).unwrap();
    }
    has_begun.recv().unwrap();
    assert_eq!((driver.response(0), driver.response(1)), (UNTOUCHED, 0));
}

#[test]
fn a_type_or_response_in_pieces_is_one_and_other_types_fail() {
    let memory = memory();
    let mut driver = Driver::new(&memory, device(None));
    memory.write_obj(0u32, GuestAddress(REQUESTS)).unwrap();
    let pieces = [
        (REQUESTS, 1, 0),
        (REQUESTS + 1, 3, 0),
        (RESPONSES, 2, WRITE),
        (RESPONSES + 2, 64, WRITE),
    ];
    memory.write_obj(u64::MAX, GuestAddress(RESPONSES)).unwrap();
    driver.offer(0, &pieces);
    driver.turn();
    let after: u64 = memory.read_obj(GuestAddress(RESPONSES)).unwrap();
    assert_eq!(after, u64::MAX << 32, "a response has four bytes");
    driver.request(2, 1);
    driver.offer(6, &[(REQUESTS, 3, 0), (RESPONSES + 12, 4, WRITE)]);
    driver.turn();
    assert_eq!(driver.response(2), ResponseCode::Failed.value());
    assert_eq!(driver.response(3), ResponseCode::Failed.value());
    assert_eq!(driver.used(), 3);
}

#[test]
fn a_request_without_room_for_a_response_fails_the_device_until_reset() {
    for room in [0, 3] {
        let memory = memory();
        let mut driver = Driver::new(&memory, device(None));
        driver.offer(0, &[(REQUESTS, 4, 0), (RESPONSES, room, WRITE)]);
        driver.turn();
        assert!(driver.device().interrupt.needs_reset());
        driver.request(1, 0);
        driver.turn();
        assert_eq!(driver.used(), 0);
    }
}

#[test]
fn no_more_requests_are_held_than_the_queue_has_descriptors() {
    let memory = memory();
    let (begun, has_begun) = channel();
    let (go_on, may_go_on) = channel();
    let backing = Stepped {
        begun,
        go_on: Mutex::new(may_go_on),
    };
    let mut driver = Driver::new(&memory, device(Some(Arc::new(backing))));
    for _ in 0..4 {
        for _ in 0..RING_SIZE {
            driver.request(0, 0);
        }
        driver.turn();
    }
    has_begun.recv().unwrap();
    let mut device = driver.device();
    let held = device.waiting.len() + device.covered.len();
    assert!(held <= usize::from(RING_SIZE), "{held}");
    drop(go_on);
    device.drain();
}
