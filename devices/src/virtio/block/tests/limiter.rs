//! A device under a rate limiter, with an event loop and a clock that the test moves.

use event_manager::SubscriberOps;
use proptest::collection::vec;
use proptest::prelude::*;
use virtio_queue::QueueT;

use super::super::super::mock_ring::{RING_SIZE, Ring as MockRing};
use super::*;
use crate::lifecycle::Device;
use crate::persist::through_json;
use crate::rate_limiter::mock::{VirtualTimer, bucket};
use crate::rate_limiter::{BucketUpdate, RateLimits};

const QUEUES: usize = 2;
/// Requests of each queue, of three descriptors each.
const REQUESTS: u16 = RING_SIZE / 3;
const HEADERS: u64 = 0x2_0000;
const STATUSES: u64 = 0x2_4000;
const BUFFERS: u64 = 0x2_8000;
const BUFFER_LEN: u32 = 0x800;
const UNTOUCHED: u8 = 0xff;

/// Kind and bytes of data.
type Asked = (u32, u32);

struct Guest<'a> {
    memory: &'a GuestMemory,
    rings: Vec<MockRing<'a>>,
    limits: RateLimits,
    timer: VirtualTimer,
    device: Arc<Mutex<VirtioBlock>>,
    events: EventManager<Arc<Mutex<VirtioBlock>>>,
    /// What each queue was asked, in order.
    asked: [Vec<Asked>; QUEUES],
}

fn new_device(limits: RateLimits, timer: &VirtualTimer) -> VirtioBlock {
    let config = BlockConfig {
        disk: FileDisk::new(false, SectorSize::B512),
        serial: "coppice".into(),
        queues: QUEUES as u16,
        queue_size: RING_SIZE,
        engine: EngineKind::Worker,
    };
    let irqfd = EventFd::new(libc::EFD_NONBLOCK).unwrap();
    let mut device = VirtioBlock::new(config, Arc::new(Interrupt::new(irqfd))).unwrap();
    device.limiter = RateLimiter::with_timer(limits, timer.clone());
    device
}

fn address(base: u64, queue: usize, slot: u16) -> GuestAddress {
    GuestAddress(base + u64::from(BUFFER_LEN) * (queue as u64 * 16 + u64::from(slot)))
}

fn small(base: u64, queue: usize, slot: u16) -> GuestAddress {
    GuestAddress(base + 0x1000 * queue as u64 + 0x20 * u64::from(slot))
}

impl<'a> Guest<'a> {
    fn new(memory: &'a GuestMemory, limits: RateLimits) -> Self {
        let timer = VirtualTimer::default();
        let rings = MockRing::several(memory, QUEUES);
        let mut guest = Self {
            memory,
            rings,
            limits,
            device: Arc::new(Mutex::new(new_device(limits, &timer))),
            events: EventManager::new().unwrap(),
            timer,
            asked: <[Vec<Asked>; QUEUES]>::default(),
        };
        guest.activate(&[RingPosition::default(); QUEUES]);
        guest
    }

    fn activate(&mut self, positions: &[RingPosition]) {
        let queue = |(ring, position): (&MockRing<'_>, &RingPosition)| {
            let mut queue = ring.queue();
            queue.set_event_idx(true);
            position.set(&mut queue);
            Some(queue)
        };
        let activation = Activation {
            memory: self.memory.clone(),
            queues: self.rings.iter().zip(positions).map(queue).collect(),
            features: RING_FEATURES | bit(VIRTIO_BLK_F_FLUSH),
        };
        self.device().activate(activation).unwrap();
        self.events.add_subscriber(self.device.clone());
    }

    fn device(&self) -> std::sync::MutexGuard<'_, VirtioBlock> {
        self.device.lock().unwrap()
    }

    /// Offers a request; the device is not notified.
    fn offer(&mut self, queue: usize, (kind, len): Asked) {
        let slot = self.asked[queue].len() as u16;
        assert!(slot < REQUESTS, "each has its own descriptors");
        let header = Header {
            kind: kind.into(),
            reserved: 0.into(),
            sector: 0.into(),
        };
        let at = small(HEADERS, queue, slot);
        self.memory.write_slice(header.as_bytes(), at).unwrap();
        let status = small(STATUSES, queue, slot);
        self.memory.write_obj(UNTOUCHED, status).unwrap();
        let flags = NEXT | if kind == VIRTIO_BLK_T_OUT { 0 } else { WRITE };
        let data = address(BUFFERS, queue, slot).0;
        let ring = &self.rings[queue];
        ring.describe(3 * slot, (at.0, 16, NEXT, 3 * slot + 1));
        ring.describe(3 * slot + 1, (data, len, flags, 3 * slot + 2));
        ring.describe(3 * slot + 2, (status.0, 1, WRITE, 0));
        ring.set_head(slot, 3 * slot);
        ring.set_available(slot + 1);
        self.asked[queue].push((kind, len));
    }

    /// Lets the event loop do all that there is to do; how many events that were.
    fn settle(&mut self) -> usize {
        let mut all = 0;
        loop {
            let count = self.events.run_with_timeout(0).unwrap();
            self.device().disk.drain();
            self.device().finish();
            all += count;
            if count == 0 {
                return all;
            }
        }
    }

    fn served(&self) -> u64 {
        self.rings.iter().map(|ring| u64::from(ring.used())).sum()
    }

    /// Bytes of reads and writes that were served.
    fn moved(&self) -> u64 {
        let done = |(ring, asked): (&MockRing<'_>, &Vec<Asked>)| {
            let done = asked.iter().take(ring.used().into());
            done.map(|(kind, len)| counted(*kind, *len)).sum::<u64>()
        };
        self.rings.iter().zip(&self.asked).map(done).sum()
    }

    /// The device is saved, and another goes on in its place.
    fn reload(&mut self) {
        let (state, positions) = {
            let mut device = self.device();
            device.pause();
            (through_json(&device.save_state()), device.ring_positions())
        };
        let mut restored = new_device(self.limits, &self.timer);
        restored.restore_state(&state).unwrap();
        self.device = Arc::new(Mutex::new(restored));
        self.events = EventManager::new().unwrap();
        let positions: Vec<_> = positions.into_iter().map(Option::unwrap).collect();
        self.activate(&positions);
        self.device().resume();
    }
}

fn counted(kind: u32, len: u32) -> u64 {
    match kind {
        VIRTIO_BLK_T_IN | VIRTIO_BLK_T_OUT => len.into(),
        _ => 0,
    }
}

fn asked() -> impl Strategy<Value = Asked> {
    let kind = prop_oneof![
        4 => Just(VIRTIO_BLK_T_IN),
        4 => Just(VIRTIO_BLK_T_OUT),
        1 => Just(VIRTIO_BLK_T_FLUSH),
        1 => Just(VIRTIO_BLK_T_GET_ID),
        1 => Just(77),
    ];
    (kind, 1..=BUFFER_LEN / 512).prop_map(|(kind, sectors)| (kind, 512 * sectors))
}

/// What happens between two ends of the timer.
#[derive(Clone, Copy, Debug)]
enum Meanwhile {
    Nothing,
    Kicks,
    PauseAndResume,
    Snapshot,
    Time(u64),
}

fn meanwhile() -> impl Strategy<Value = Meanwhile> {
    prop_oneof![
        4 => Just(Meanwhile::Nothing),
        1 => Just(Meanwhile::Kicks),
        1 => Just(Meanwhile::PauseAndResume),
        1 => Just(Meanwhile::Snapshot),
        1 => (1..100_000_000u64).prop_map(Meanwhile::Time),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_request_is_lost_or_served_early_and_nothing_wakes_the_device_in_vain(
        (size, burst, refill_time) in (1..10_000u64, prop_oneof![Just(0), 1..5_000u64], 1..2_000u64),
        (ops, ops_refill) in (1..20u64, 1..2_000u64),
        requests in vec((0..QUEUES, asked()), 1..=usize::from(REQUESTS)),
        steps in vec(meanwhile(), 16),
    ) {
        let memory = memory();
        let limits = RateLimits { bandwidth: bucket(size, burst, refill_time), ops: bucket(ops, 0, ops_refill) };
        let mut guest = Guest::new(&memory, limits);
        for (queue, asked) in &requests {
            guest.offer(*queue, *asked);
        }
        (0..QUEUES).for_each(|queue| guest.device().kick(queue));
        let largest = u64::from(BUFFER_LEN).max(size);
        let (mut wake_ups, mut steps) = (0, steps.into_iter().cycle());
        let mut snapshots = 0;
        loop {
            guest.settle();
            let now = guest.timer.elapsed().as_nanos();
            let within = |used: u64, at_once: u64, size: u64, refill: u64| {
                let refill = u128::from(refill) * 1_000_000;
                u128::from(used) * refill <= u128::from(at_once) * refill + now * u128::from(size)
            };
            prop_assert!(within(guest.moved(), burst + largest, size, refill_time), "bytes at {now} ns");
            prop_assert!(within(guest.served(), ops, ops, ops_refill), "requests at {now} ns");
            if guest.served() == requests.len() as u64 {
                break;
            }
            prop_assert!(guest.device().limiter.is_blocked() && guest.timer.is_armed(), "a request waits for nothing");
            prop_assert_eq!(guest.settle(), 0, "it is woken while it waits");
            match steps.next().unwrap() {
                Meanwhile::Nothing => {}
                Meanwhile::Kicks => {
                    let positions = guest.device().ring_positions();
                    (0..QUEUES).for_each(|queue| guest.device().kick(queue));
                    prop_assert_eq!(guest.settle(), QUEUES);
                    prop_assert_eq!(guest.device().ring_positions(), positions, "it looked at its rings");
                }
                Meanwhile::PauseAndResume => {
                    guest.device().pause();
                    prop_assert_eq!(in_flight(&guest), 0);
                    guest.settle();
                    guest.device().resume();
                    guest.settle();
                }
                Meanwhile::Snapshot => {
                    guest.reload();
                    prop_assert_eq!(in_flight(&guest), 0);
                    snapshots += 1;
                    continue;
                }
                Meanwhile::Time(nanos) => guest.timer.advance(Duration::from_nanos(nanos)),
            }
            guest.timer.advance_to_end();
            wake_ups += 1;
        }
        prop_assert!(wake_ups <= 2 * requests.len() + snapshots, "{wake_ups} wake-ups");
        prop_assert!(!guest.device().limiter.is_blocked() || !guest.timer.is_armed());
        for (queue, asked) in (0..).zip(&guest.asked) {
            for (slot, (kind, _)) in (0..).zip(asked) {
                let status: u8 = memory.read_obj(small(STATUSES, queue, slot)).unwrap();
                let expected = if *kind == 77 { UNSUPP } else { OK };
                prop_assert_eq!(status, expected);
            }
        }
    }
}

fn in_flight(guest: &Guest<'_>) -> u16 {
    let positions = guest.device().ring_positions();
    positions
        .into_iter()
        .flatten()
        .map(RingPosition::in_flight)
        .sum()
}

fn of_ops(size: u64, refill_time: u64) -> RateLimits {
    RateLimits {
        bandwidth: None,
        ops: bucket(size, 0, refill_time),
    }
}

#[test]
fn each_queue_has_its_turn_however_many_requests_another_offers() {
    let memory = memory();
    let mut guest = Guest::new(&memory, of_ops(1, 10));
    for _ in 0..5 {
        (0..QUEUES).for_each(|queue| guest.offer(queue, (VIRTIO_BLK_T_FLUSH, 0)));
    }
    (0..QUEUES).for_each(|queue| guest.device().kick(queue));
    guest.settle();
    for _ in 0..3 {
        guest.timer.advance_to_end();
        guest.settle();
    }
    assert_eq!(guest.rings[0].used(), 2);
    assert_eq!(guest.rings[1].used(), 2);
    let metrics = guest.device().metrics.clone();
    assert_eq!(metrics.limiter_events.load(Ordering::Relaxed), 3);
    assert_eq!(metrics.throttled.load(Ordering::Relaxed), 4);
}

#[test]
fn an_update_lets_what_waits_go_on_and_a_first_limit_makes_a_timer() {
    let memory = memory();
    let mut guest = Guest::new(&memory, of_ops(1, 3_600_000));
    for _ in 0..5 {
        guest.offer(0, (VIRTIO_BLK_T_IN, 512));
    }
    guest.device().kick(0);
    guest.settle();
    assert_eq!(guest.served(), 1);
    let update = |limits: RateLimits| LimitsUpdate {
        bandwidth: BucketUpdate::Keep,
        ops: limits.ops.into(),
    };
    guest
        .device()
        .update_limits(update(of_ops(2, 3_600_000)))
        .unwrap();
    guest.settle();
    assert_eq!(guest.served(), 3);
    guest
        .device()
        .update_limits(update(RateLimits::default()))
        .unwrap();
    guest.settle();
    assert_eq!(guest.served(), 5);
    assert!(!guest.timer.is_armed());
}

#[test]
fn the_event_loop_learns_of_a_timer_that_an_update_made() {
    let memory = memory();
    let mut guest = Guest::new(&memory, RateLimits::default());
    // As it is made, without a timer.
    guest.device().limiter = RateLimiter::default();
    let first = LimitsUpdate {
        ops: bucket(1, 0, 5).into(),
        ..LimitsUpdate::default()
    };
    guest.device().update_limits(first).unwrap();
    (0..3).for_each(|_| guest.offer(1, (VIRTIO_BLK_T_IN, 512)));
    guest.device().kick(1);
    while guest.served() < 3 {
        assert!(
            guest.events.run_with_timeout(60_000).unwrap() > 0,
            "the timer woke nobody"
        );
        guest.device().disk.drain();
        guest.device().finish();
    }
}

#[test]
fn a_reset_gives_a_driver_no_tokens_and_leaves_its_requests() {
    let memory = memory();
    let mut guest = Guest::new(&memory, of_ops(1, 1000));
    guest.offer(0, (VIRTIO_BLK_T_IN, 512));
    guest.offer(0, (VIRTIO_BLK_T_IN, 512));
    guest.device().kick(0);
    guest.settle();
    assert_eq!(guest.served(), 1);
    guest.device().reset();
    guest.timer.advance_to_end();
    guest.settle();
    assert_eq!(guest.served(), 1, "of a device that is not active");
    assert_eq!(guest.device().limiter.save_state().ops.unwrap().tokens, 1);
}
