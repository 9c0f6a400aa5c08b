use std::sync::Mutex;
use std::sync::atomic::Ordering;

use event_manager::{EventManager, MutEventSubscriber};
use vm_memory::{Bytes, GuestAddress};

use super::super::RING_FEATURES;
use super::super::mock_ring::{RING_SIZE, RINGS, Ring};
use super::config_space::{F_DEFLATE_ON_OOM, F_REPORTING, F_STATS_VQ};
use super::mock::{Given, device, everything, memory};
use super::serve::TURN;
use super::*;

mod persist;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
/// Where the tests put page numbers, commands and statistics.
const DATA: u64 = 0x2_0000;
/// Pages from here on are the tests' to give away.
const FREE: u64 = 0x8_0000;

const INFLATE: usize = 0;
const DEFLATE: usize = 1;

/// A driver that has the queues `ready`.
struct Driver<'a> {
    device: VirtioBalloon,
    given: Given,
    memory: &'a GuestMemory,
    rings: Vec<Ring<'a>>,
}

impl<'a> Driver<'a> {
    fn new(memory: &'a GuestMemory, config: &BalloonConfig, ready: &[usize]) -> Self {
        let (mut device, given) = device(config);
        let rings = Ring::several(memory, QUEUES);
        let queues = rings
            .iter()
            .enumerate()
            .map(|(index, ring)| ready.contains(&index).then(|| ring.queue()));
        let activation = Activation {
            memory: memory.clone(),
            queues: queues.collect(),
            features: device.features(),
        };
        device.activate(activation).unwrap();
        let driver = Self {
            device,
            given,
            memory,
            rings,
        };
        driver.look();
        driver
    }

    /// The device thread has heard the kicks.
    fn look(&self) {
        for kick in &self.device.kicks {
            kick.read().unwrap();
        }
    }

    fn with_everything(memory: &'a GuestMemory) -> Self {
        Self::new(memory, &everything(), &[0, 1, 2, 3, 4])
    }

    /// Makes a chain available.
    fn offer(&self, queue: usize, buffers: &[(u64, u32, u16)]) {
        let ring = &self.rings[queue];
        for (index, (address, len, flags)) in (0u16..).zip(buffers) {
            let last = usize::from(index) + 1 == buffers.len();
            let flags = flags | if last { 0 } else { NEXT };
            ring.describe(index, (*address, *len, flags, index + 1));
        }
        let sent = ring.available();
        ring.set_head(sent, 0);
        ring.set_available(sent + 1);
    }

    /// Makes a chain available and notifies the device, as the transport does; the device thread is quick.
    fn send(&mut self, queue: usize, buffers: &[(u64, u32, u16)]) {
        self.offer(queue, buffers);
        self.device.notified(queue);
        if self.device.kicks[queue].read().is_ok() {
            self.device.serve(queue);
        }
    }

    /// Puts `bytes` into a buffer of the driver and sends it.
    fn send_bytes(&mut self, queue: usize, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(DATA)).unwrap();
        self.send(queue, &[(DATA, bytes.len() as u32, 0)]);
    }

    fn send_pfns(&mut self, queue: usize, pfns: &[u32]) {
        let bytes: Vec<u8> = pfns.iter().flat_map(|pfn| pfn.to_le_bytes()).collect();
        self.send_bytes(queue, &bytes);
    }

    fn send_statistics(&mut self, queue: usize, entries: &[(u16, u64)]) {
        let entry =
            |(tag, value): &(u16, u64)| [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat();
        let bytes: Vec<u8> = entries.iter().flat_map(entry).collect();
        self.send_bytes(queue, &bytes);
    }

    fn used(&self, queue: usize) -> u16 {
        self.rings[queue].used()
    }

    /// What was given back since the last call.
    fn given(&self) -> Vec<(u64, u64)> {
        std::mem::take(&mut self.given.lock().unwrap())
    }

    fn config(&self, offset: u64) -> u32 {
        let mut data = [0xee; 4];
        self.device.read_config(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn value(&self, name: &str) -> Option<u64> {
        let tag = STATISTICS.iter().position(|known| *known == name).unwrap();
        self.device.state().unwrap().values.0[tag]
    }
}

fn pfn(page: u64) -> u32 {
    (FREE / 4096 + page) as u32
}

#[test]
fn inflated_pages_go_back_in_as_few_ranges_as_there_are_whatever_their_order() {
    let memory = memory();
    let mut driver = Driver::with_everything(&memory);
    let pages = [7, 3, 5, 4, 9, 3, 8, 4].map(pfn);
    driver.send_pfns(INFLATE, &pages);
    let at = |page: u64| FREE + 4096 * page;
    assert_eq!(driver.given(), [(at(3), 3 * 4096), (at(7), 3 * 4096)]);
    assert_eq!(driver.used(INFLATE), 1);
    assert_eq!(
        driver.device.interrupt.status(),
        super::super::INTERRUPT_USED_BUFFER
    );
    let metrics = driver.device.metrics.clone();
    assert_eq!(metrics.inflations.load(Ordering::Relaxed), 1);
    assert_eq!(metrics.inflated.bytes.load(Ordering::Relaxed), 6 * 4096);
    driver.send_pfns(DEFLATE, &pages);
    assert_eq!((driver.used(DEFLATE), driver.given()), (1, vec![]));
}

#[test]
fn only_whole_pages_of_ram_go_back() {
    let memory = memory();
    let mut driver = Driver::with_everything(&memory);
    // The first page behind the second region, one in the hole, the last page of the standard, one far out; the last page of RAM.
    driver.send_pfns(INFLATE, &[0x180, 0x1ff, u32::MAX, 0x8_0000, 0x17f, 0x200]);
    assert_eq!(driver.given(), [(0x17_f000, 0x1000), (0x20_0000, 0x1000)]);
    let metrics = driver.device.metrics.clone();
    let inflated = &metrics.inflated;
    assert_eq!(
        (
            inflated.bytes.load(Ordering::Relaxed),
            inflated.failures.load(Ordering::Relaxed)
        ),
        (0x1000, 5),
        "four pages that are none, and one that the host refused"
    );
    let reporting = 4;
    driver.send(
        reporting,
        &[
            (FREE + 1, 4096, WRITE),
            (FREE + 0x1_0001, 8191, WRITE),
            (FREE + 0x2_0000, 8193, WRITE),
            (FREE + 0x3_0fff, 1, WRITE),
            (0xf_f800, 0x1800, WRITE),
        ],
    );
    let whole = [
        (FREE + 0x1_1000, 0x1000),
        (FREE + 0x2_0000, 0x2000),
        (0x10_0000, 0x1000),
    ];
    assert_eq!(driver.given(), whole);
    // Outside RAM, and into the hole: nothing of such a chain is taken.
    for (address, len) in [(0x18_0000, 0x1000), (FREE, 0x20_0000), (u64::MAX - 10, 20)] {
        driver.send(reporting, &[(FREE, 4096, WRITE), (address, len, WRITE)]);
        assert_eq!(driver.given(), []);
    }
    assert_eq!(driver.used(reporting), 4);
    assert!(!driver.device.interrupt.needs_reset());
}

#[test]
fn a_buffer_of_the_wrong_length_or_direction_gives_nothing_that_is_not_in_it() {
    let memory = memory();
    let mut driver = Driver::with_everything(&memory);
    memory.write_obj(pfn(1), GuestAddress(DATA)).unwrap();
    memory.write_obj(pfn(2), GuestAddress(DATA + 4)).unwrap();
    driver.send(INFLATE, &[(DATA, 7, 0)]);
    assert_eq!(driver.given(), [(FREE + 4096, 4096)]);
    for buffers in [&[(DATA, 3, 0)][..], &[(DATA, 8, WRITE)], &[(DATA, 0, 0)]] {
        driver.send(INFLATE, buffers);
        assert_eq!(driver.given(), [], "{buffers:?}");
    }
    // Numbers that are cut in pieces are put together again.
    let pieces = [(DATA, 1, 0), (DATA + 1, 2, 0), (DATA + 3, 5, 0)];
    driver.send(INFLATE, &pieces);
    assert_eq!(driver.given(), [(FREE + 4096, 8192)]);
    driver.send(4, &[(FREE, 4096, 0)]);
    assert_eq!(driver.given(), [], "a report that the device may only read");
    assert_eq!((driver.used(INFLATE), driver.used(4)), (5, 1));
}

#[test]
fn a_turn_is_over_before_a_huge_buffer_is_and_goes_on_later() {
    let memory = memory();
    let mut driver = Driver::with_everything(&memory);
    // Page numbers are read from all of RAM below the rings: zeros, so page 0, again and again.
    let huge = [(0, RINGS as u32, 0)];
    for _ in 0..RING_SIZE {
        driver.offer(INFLATE, &huge);
    }
    driver.device.serve(INFLATE);
    let taken = TURN / pages::MAX_PFNS as u64;
    assert_eq!(u64::from(driver.used(INFLATE)), taken);
    let mut turns = 1;
    while driver.device.kicks[INFLATE].read().is_ok() {
        driver.device.serve(INFLATE);
        turns += 1;
    }
    assert_eq!(driver.used(INFLATE), RING_SIZE);
    assert_eq!(turns, u64::from(RING_SIZE) / taken + 1);
    assert_eq!(driver.given(), vec![(0, 4096); RING_SIZE.into()]);
}

#[test]
fn the_driver_reads_the_target_and_writes_the_size() {
    let memory = memory();
    let mut driver = Driver::with_everything(&memory);
    assert_eq!(driver.config(0), 256);
    driver.device.set_target(512);
    assert_eq!(driver.config(0), 512);
    assert_eq!(
        driver.device.interrupt.status(),
        super::super::INTERRUPT_CONFIG_CHANGE
    );
    driver.device.write_config(4, &77u32.to_le_bytes());
    assert_eq!(driver.device.state().unwrap().actual_pages, 77);
    // One byte of it, and what lies around it and is not the driver's.
    driver.device.write_config(5, &[1]);
    driver.device.write_config(0, &[0xff; 5]);
    driver.device.write_config(7, &[2; 5]);
    for offset in [12, 1 << 40, u64::MAX] {
        driver.device.write_config(offset, &[0xff; 8]);
        assert_eq!(driver.config(offset), 0);
    }
    assert_eq!(driver.config(0), 512);
    assert_eq!(driver.config(4), 0x0200_01ff);
    assert_eq!(driver.config(8), 0);
    driver.device.reset();
    assert_eq!((driver.config(0), driver.config(4)), (512, 0));
}

#[test]
fn features_are_those_that_were_asked_for() {
    let plain = device(&BalloonConfig::default()).0;
    assert_eq!(plain.features(), RING_FEATURES);
    assert!((0..QUEUES).all(|queue| !plain.is_synchronous(queue)));
    let all = [F_STATS_VQ, F_DEFLATE_ON_OOM, F_FREE_PAGE_HINT, F_REPORTING];
    let all = all.iter().fold(0, |bits, feature| bits | bit(*feature));
    assert_eq!(device(&everything()).0.features(), RING_FEATURES | all);
}

#[test]
fn statistics_are_kept_and_their_buffer_goes_back_when_others_are_wanted() {
    let memory = memory();
    let mut driver = Driver::with_everything(&memory);
    let queue = 2;
    driver.send_statistics(queue, &[(4, 1000), (0, 1), (0xffff, 7), (15, 9), (16, 8)]);
    assert_eq!(driver.value("free_memory"), Some(1000));
    assert_eq!(driver.value("direct_reclaim"), Some(9));
    assert_eq!(driver.value("total_memory"), None);
    assert_eq!(driver.used(queue), 0);
    driver.device.ask_for_statistics();
    assert_eq!(driver.used(queue), 1);
    driver.device.ask_for_statistics();
    assert_eq!(driver.used(queue), 1, "the driver has not answered yet");
    driver.send_statistics(queue, &[(5, u64::MAX)]);
    assert_eq!(driver.value("free_memory"), Some(1000), "kept");
    assert_eq!(driver.value("total_memory"), Some(u64::MAX));
    driver.send_bytes(queue, &[0; 17]);
    assert_eq!(driver.used(queue), 2, "only one buffer is kept");
    assert_eq!(driver.value("swap_in"), Some(0));
    let metrics = driver.device.metrics.clone();
    assert_eq!(metrics.statistics.load(Ordering::Relaxed), 3);
    assert_eq!(metrics.statistics_failures.load(Ordering::Relaxed), 1);
}

#[test]
fn statistics_that_were_there_before_the_driver_was_ready_are_found() {
    let memory = memory();
    let (mut device, _) = device(&everything());
    let ring = Ring::several(&memory, QUEUES).swap_remove(2);
    memory.write_obj(4u16, GuestAddress(DATA)).unwrap();
    memory.write_obj(1000u64, GuestAddress(DATA + 2)).unwrap();
    ring.describe(0, (DATA, 10, 0, 0));
    ring.set_available(1);
    device.notified(2);
    device.kicks[2].read().unwrap();
    device.serve(2);
    let queues = vec![None, None, Some(ring.queue())];
    let activation = Activation {
        memory: memory.clone(),
        queues,
        features: device.features(),
    };
    device.activate(activation).unwrap();
    device.kicks[2].read().unwrap();
    device.serve(2);
    assert_eq!(device.state().unwrap().values.0[4], Some(1000));
}

#[test]
fn statistics_come_at_the_interval_that_was_set_and_are_not_turned_on_or_off() {
    let memory = memory();
    let mut driver = Driver::with_everything(&memory);
    driver.send_statistics(2, &[(4, 1)]);
    driver.device.set_statistics_interval(1).unwrap();
    assert_eq!(driver.used(2), 0);
    driver.device.set_statistics_interval(60).unwrap();
    assert_eq!(driver.used(2), 1, "at once");
    let refused = driver.device.set_statistics_interval(0);
    assert!(matches!(refused, Err(BalloonError::StatisticsSwitch)));
    let (mut without, _) = device(&BalloonConfig::default());
    without.set_statistics_interval(0).unwrap();
    let refused = without.set_statistics_interval(1);
    assert!(matches!(refused, Err(BalloonError::StatisticsSwitch)));
    assert!(matches!(without.state(), Err(BalloonError::StatisticsOff)));
}

const HINTS: usize = 3;

#[test]
fn a_hinting_run_gives_blocks_back_before_the_driver_goes_on() {
    let memory = memory();
    let mut driver = Driver::with_everything(&memory);
    assert!(driver.device.is_synchronous(HINTS));
    driver.device.start_hinting(true).unwrap();
    assert_eq!(driver.config(8), 2);
    assert_eq!(
        driver.device.interrupt.status(),
        super::super::INTERRUPT_CONFIG_CHANGE
    );
    driver.send_bytes(HINTS, &2u32.to_le_bytes());
    driver.offer(HINTS, &[(FREE, 0x4000, WRITE)]);
    driver.device.notified(HINTS);
    assert_eq!(
        driver.given(),
        [(FREE, 0x4000)],
        "without the device thread"
    );
    let status = driver.device.hinting_status().unwrap();
    assert_eq!((status.host, status.guest), (2, Some(2)));
    driver.send_bytes(HINTS, &0u32.to_le_bytes());
    let status = driver.device.hinting_status().unwrap();
    assert_eq!((status.host, status.guest), (1, Some(0)));
    assert_eq!(driver.config(8), 1);
    assert_eq!(driver.used(HINTS), 3);
}

#[test]
fn a_block_outside_a_run_stays_with_the_guest() {
    let memory = memory();
    let mut driver = Driver::with_everything(&memory);
    let block = [(FREE, 0x4000, WRITE)];
    driver.send(HINTS, &block);
    driver.device.start_hinting(false).unwrap();
    driver.send(HINTS, &block);
    driver.send_bytes(HINTS, &7u32.to_le_bytes());
    driver.send(HINTS, &block);
    driver.send_bytes(HINTS, &[2, 0, 0]);
    driver.send(HINTS, &block);
    assert_eq!(driver.given(), []);
    driver.send_bytes(HINTS, &2u32.to_le_bytes());
    driver.device.stop_hinting().unwrap();
    driver.send(HINTS, &block);
    driver.device.start_hinting(false).unwrap();
    driver.send(HINTS, &block);
    assert_eq!(driver.given(), []);
    // The command and the block in one chain.
    memory.write_obj(3u32, GuestAddress(DATA)).unwrap();
    driver.send(HINTS, &[(DATA, 4, 0), block[0]]);
    assert_eq!(driver.given(), [(FREE, 0x4000)]);
    driver.send_bytes(HINTS, &0u32.to_le_bytes());
    driver.send(HINTS, &block);
    assert_eq!(driver.given(), []);
    assert_eq!(driver.config(8), 3, "not acknowledged");
}

#[test]
fn hinting_needs_a_driver_that_knows_of_it() {
    let (mut device, _) = device(&everything());
    assert!(matches!(
        device.start_hinting(true),
        Err(BalloonError::NoDriver)
    ));
    assert!(matches!(device.stop_hinting(), Err(BalloonError::NoDriver)));
    let memory = memory();
    let config = BalloonConfig {
        hinting: false,
        ..everything()
    };
    let mut driver = Driver::new(&memory, &config, &[0, 1, 2, 3]);
    assert!(matches!(
        driver.device.start_hinting(true),
        Err(BalloonError::HintingOff)
    ));
    assert!(matches!(
        driver.device.hinting_status(),
        Err(BalloonError::HintingOff)
    ));
    // Linux has no gap between its queues.
    driver.send(3, &[(FREE, 4096, WRITE)]);
    assert_eq!(driver.given(), [(FREE, 4096)]);
}

#[test]
fn reported_pages_that_touch_are_one_range() {
    let memory = memory();
    let config = BalloonConfig {
        reporting: true,
        ..BalloonConfig::default()
    };
    for queue in [2, 4] {
        let mut driver = Driver::new(&memory, &config, &[0, 1, queue]);
        let buffers: Vec<_> = [3, 1, 2, 8]
            .map(|page| (FREE + 4096 * page, 4096, WRITE))
            .to_vec();
        driver.send(queue, &buffers);
        let ranges = [(FREE + 4096, 3 * 4096), (FREE + 8 * 4096, 4096)];
        assert_eq!(driver.given(), ranges);
        let bytes = &driver.device.metrics.reported.bytes;
        assert_eq!(bytes.load(Ordering::Relaxed), 4 * 4096);
        memory
            .write_slice(&vec![0; 0x6000], GuestAddress(RINGS))
            .unwrap();
    }
}

#[test]
fn a_paused_device_waits_and_a_resumed_one_catches_up() {
    let memory = memory();
    let mut driver = Driver::with_everything(&memory);
    driver.send_statistics(2, &[(4, 1)]);
    driver.device.pause();
    driver.send_pfns(INFLATE, &[pfn(0)]);
    driver.device.ask_for_statistics();
    assert_eq!((driver.used(INFLATE), driver.used(2)), (0, 0));
    assert_eq!(driver.given(), []);
    driver.device.resume();
    for queue in 0..QUEUES {
        assert!(driver.device.kicks[queue].read().is_ok());
        driver.device.serve(queue);
    }
    assert_eq!(driver.given(), [(FREE, 4096)]);
}

#[test]
fn a_broken_ring_fails_the_device_until_reset() {
    let memory = memory();
    for queue in 0..QUEUES {
        memory
            .write_slice(&vec![0; 0x6000], GuestAddress(RINGS))
            .unwrap();
        let mut driver = Driver::with_everything(&memory);
        driver.rings[queue].set_available(RING_SIZE + 1);
        driver.device.serve(queue);
        assert!(driver.device.interrupt.needs_reset());
        assert!(driver.device.active.is_none());
        driver.device.ask_for_statistics();
        driver.device.notified(queue);
        driver.device.reset();
        driver.device.interrupt.reset();
        assert!(!driver.device.interrupt.needs_reset());
    }
    let (mut device, _) = device(&everything());
    let activation = Activation {
        memory: memory.clone(),
        queues: (0..QUEUES).map(|_| None).collect(),
        features: RING_FEATURES,
    };
    device.activate(activation).unwrap_err();
}

#[test]
fn kicks_and_the_timer_reach_the_device_through_its_events() {
    let memory = memory();
    let mut driver = Driver::with_everything(&memory);
    driver.send_statistics(2, &[(4, 1)]);
    driver.offer(INFLATE, &[(DATA, 4, 0)]);
    driver.device.notified(INFLATE);
    let Driver { device, rings, .. } = driver;
    let device = Arc::new(Mutex::new(device));
    let subscriber: Arc<Mutex<dyn MutEventSubscriber + Send>> = device.clone();
    let mut events = EventManager::new().unwrap();
    event_manager::SubscriberOps::add_subscriber(&mut events, subscriber);
    while rings[INFLATE].used() == 0 || rings[2].used() == 0 {
        assert!(events.run_with_timeout(60_000).unwrap() > 0, "no event");
    }
    device.lock().unwrap().reset();
    assert_eq!(events.run_with_timeout(0).unwrap(), 0, "the timer is off");
}
