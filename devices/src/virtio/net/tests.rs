use proptest::prelude::*;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_HDR_F_NEEDS_CSUM,
};
use vm_memory::{Bytes, GuestAddress};
use zerocopy::FromBytes;
use zerocopy::little_endian::U16;

use super::super::INTERRUPT_USED_BUFFER;
use super::super::mock_ring::RING_SIZE;
use super::header::{HEADER_LEN, NetHeader};
use super::mock::{self, ALL, Driver, MAC, memory};
use super::*;

const PLAIN: NetHeader = NetHeader {
    flags: 0,
    gso_type: 0,
    hdr_len: U16::ZERO,
    gso_size: U16::ZERO,
    csum_start: U16::ZERO,
    csum_offset: U16::ZERO,
    num_buffers: U16::ZERO,
};

fn frame(len: usize) -> Vec<u8> {
    (0..len).map(|at| (at % 251) as u8).collect()
}

fn count(counter: &std::sync::atomic::AtomicU64) -> u64 {
    counter.load(std::sync::atomic::Ordering::Relaxed)
}

#[test]
fn a_frame_goes_to_the_network_however_its_bytes_lie_in_descriptors() {
    let frame = frame(700);
    let bytes = [PLAIN.as_bytes(), &frame].concat();
    // A header in a descriptor of its own, together with the frame, and split in the midst (5.1.6.2: any layout).
    for cuts in [
        vec![],
        vec![12],
        vec![5],
        vec![1, 1, 9, 3],
        vec![12, 14, 20, 8],
        vec![711],
    ] {
        let memory = memory();
        let mut driver = Driver::new(&memory, ALL);
        driver.offer(1, &bytes, &cuts);
        driver.device.serve(1);
        assert_eq!(driver.arrived().unwrap(), bytes, "{cuts:?}");
        assert_eq!(driver.used(1), Some((0, 0)));
        assert_eq!(driver.device.interrupt.status(), INTERRUPT_USED_BUFFER);
        assert_eq!(count(&driver.device.metrics.sent_bytes), 700);
    }
}

#[test]
fn a_frame_without_a_whole_header_or_too_short_or_too_long_is_dropped_and_given_back() {
    let memory = memory();
    let mut driver = Driver::new(&memory, ALL);
    for len in [0, 1, 11, 12, 25, HEADER_LEN + header::LONGEST_SENT + 1] {
        driver.offer(1, &vec![0; len], &[]);
        driver.device.serve(1);
        assert_eq!(driver.used(1), Some((0, 0)), "{len}");
        assert_eq!(driver.arrived(), None, "{len}");
    }
    assert_eq!(count(&driver.device.metrics.malformed_frames), 6);
    driver.send(&PLAIN, &frame(60));
    assert!(driver.arrived().is_some(), "the next one goes");
}

#[test]
fn a_header_that_uses_what_was_not_agreed_on_is_dropped() {
    let memory = memory();
    let segments = NetHeader {
        flags: VIRTIO_NET_HDR_F_NEEDS_CSUM as u8,
        gso_type: 1,
        gso_size: U16::new(1448),
        hdr_len: U16::new(54),
        csum_start: U16::new(34),
        csum_offset: U16::new(16),
        ..PLAIN
    };
    let mut driver = Driver::new(&memory, ALL);
    driver.send(&segments, &frame(4000));
    let arrived = driver.arrived().unwrap();
    assert_eq!(NetHeader::read_from_prefix(&arrived).unwrap().0, segments);
    let mut driver = Driver::new(&memory, super::super::RING_FEATURES);
    driver.send(&segments, &frame(4000));
    assert_eq!(driver.arrived(), None);
    assert_eq!(driver.used(1), Some((0, 0)));
}

#[test]
fn a_buffer_that_the_device_may_write_is_no_frame() {
    let memory = memory();
    let mut driver = Driver::new(&memory, ALL);
    driver.post(1, 1, 100);
    assert_eq!(driver.used(1), Some((0, 0)));
    assert_eq!(driver.arrived(), None);
}

#[test]
fn a_network_that_refuses_a_frame_keeps_nothing_from_being_sent_later() {
    let memory = memory();
    let mut driver = Driver::new(&memory, ALL);
    let longest = frame(header::LONGEST_SENT);
    // The socket takes only so much; a tap refuses what is no frame, and so the device goes on.
    for _ in 0..20 {
        driver.send(&PLAIN, &longest);
        assert_eq!(driver.used(1), Some((0, 0)));
    }
    assert!(count(&driver.device.metrics.sent_drops) > 0);
    while driver.arrived().is_some() {}
    driver.send(&PLAIN, &frame(60));
    assert_eq!(driver.arrived().unwrap().len(), HEADER_LEN + 60);
}

#[test]
fn a_frame_is_received_in_one_buffer_and_the_driver_is_notified() {
    let memory = memory();
    let mut driver = Driver::new(&memory, ALL);
    driver.post(0, 8, 1530);
    driver.device.interrupt.acknowledge(u32::MAX);
    driver.network_sends(&frame(1500));
    driver.device.serve(0);
    let (bytes, buffers) = driver.received(0).unwrap();
    assert_eq!((&bytes[HEADER_LEN..], buffers), (&*frame(1500), 1));
    assert_eq!(driver.device.interrupt.status(), INTERRUPT_USED_BUFFER);
    assert_eq!(count(&driver.device.metrics.received_bytes), 1500);
    assert_eq!(driver.device.ring_positions()[0].unwrap().in_flight(), 0);
}

#[test]
fn a_long_frame_takes_several_buffers_whose_use_is_seen_at_once() {
    let memory = memory();
    let mut driver = Driver::new(&memory, ALL);
    driver.post(0, 20, 4000);
    driver.network_sends(&frame(60_000));
    driver.device.serve(0);
    let (bytes, buffers) = driver.received(0).unwrap();
    assert_eq!(buffers, 16);
    assert_eq!(bytes[HEADER_LEN..], frame(60_000));
    assert_eq!(driver.received(0), None);
    // The others were not used up.
    for _ in 0..4 {
        driver.network_sends(&frame(100));
        driver.device.serve(0);
        assert_eq!(driver.received(0).unwrap().0.len(), HEADER_LEN + 100);
    }
}

#[test]
fn a_frame_that_the_buffers_are_too_few_for_waits_until_there_are_more() {
    let memory = memory();
    let mut driver = Driver::new(&memory, ALL);
    driver.post(0, 2, 4000);
    driver.network_sends(&frame(30_000));
    driver.network_sends(&frame(60));
    driver.device.serve(0);
    assert_eq!(driver.received(0), None);
    driver.post(0, 10, 4000);
    assert_eq!(driver.received(0).unwrap().0[HEADER_LEN..], frame(30_000));
    assert_eq!(driver.received(0).unwrap().0[HEADER_LEN..], frame(60));
    // With a ring that can never hold it, it is lost and others are not.
    driver.post(0, RING_SIZE - 3, 100);
    driver.network_sends(&frame(60_000));
    driver.network_sends(&frame(60));
    driver.device.serve(0);
    driver.post(0, 0, 100);
    let drops = count(&driver.device.metrics.received_drops);
    if drops == 0 {
        // One page of the first buffers is left; the ring is full with these.
        driver.post(0, 2, 100);
    }
    assert_eq!(driver.received(0).unwrap().0[HEADER_LEN..], frame(60));
}

#[test]
fn without_mergeable_buffers_a_frame_takes_one_or_is_lost() {
    let memory = memory();
    let features = ALL & !(1 << VIRTIO_NET_F_MRG_RXBUF);
    let mut driver = Driver::new(&memory, features);
    driver.post(0, 4, 2000);
    driver.network_sends(&frame(3000));
    driver.network_sends(&frame(1900));
    driver.device.serve(0);
    let (bytes, buffers) = driver.received(0).unwrap();
    assert_eq!((bytes.len(), buffers), (HEADER_LEN + 1900, 1));
    assert_eq!(count(&driver.device.metrics.received_drops), 1);
}

#[test]
fn a_guest_without_buffers_is_not_polled_and_gets_what_came_later() {
    let memory = memory();
    let mut driver = Driver::new(&memory, ALL);
    driver.network_sends(&frame(60));
    driver.device.serve(0);
    // Activation kicks once; what is read of the counter is that.
    let _ = driver.device.kicks[0].read();
    driver.device.serve(0);
    assert!(
        driver.device.kicks[0].read().is_err(),
        "it waits for the driver"
    );
    driver.post(0, 1, 1530);
    assert!(driver.received(0).is_some());
}

#[test]
fn a_driver_without_event_indices_is_notified_of_frames() {
    let memory = memory();
    let mut driver = Driver::new(&memory, ALL & !(1 << 29));
    driver.post(0, 4, 1530);
    for _ in 0..3 {
        driver.device.interrupt.acknowledge(u32::MAX);
        driver.network_sends(&frame(60));
        driver.device.serve(0);
        assert_eq!(driver.device.interrupt.status(), INTERRUPT_USED_BUFFER);
    }
}

#[test]
fn an_interrupt_is_asked_for_anywhere_within_the_buffers_of_a_frame() {
    // The driver asks to be told when it has been given so many buffers; a frame takes five.
    for wish in 0..7u16 {
        let memory = memory();
        let mut driver = Driver::new(&memory, ALL);
        let available = GuestAddress(driver.rings[0].used_ring().start - 0x400);
        let event = available.0 + 4 + 2 * u64::from(RING_SIZE);
        memory.write_obj(wish, GuestAddress(event)).unwrap();
        driver.post(0, 20, 4000);
        driver.device.interrupt.acknowledge(u32::MAX);
        driver.network_sends(&frame(17_000));
        driver.device.serve(0);
        assert_eq!(driver.received(0).unwrap().1, 5);
        let expected = u32::from(wish < 5) * INTERRUPT_USED_BUFFER;
        assert_eq!(driver.device.interrupt.status(), expected, "{wish}");
    }
}

#[test]
fn what_is_for_the_station_is_answered_here_and_no_frame_of_the_network() {
    let memory = memory();
    let mut driver = Driver::new(&memory, ALL);
    driver.post(0, 8, 1530);
    let mut asked = frame(60);
    asked[0] = 0xee;
    driver.send(&PLAIN, &asked);
    for _ in 0..2 {
        assert_eq!(driver.received(0).unwrap().0[HEADER_LEN..], asked);
    }
    assert_eq!(driver.arrived(), None);
    // One that is longer than a station takes is dropped.
    let mut long = frame(40_000);
    long[0] = 0xee;
    driver.send(&PLAIN, &long);
    assert_eq!((driver.arrived(), driver.received(0)), (None, None));
    assert_eq!(count(&driver.device.metrics.sent_drops), 1);
}

#[test]
fn the_tap_has_the_offloads_that_the_driver_agreed_to_also_after_a_restore() {
    let memory = memory();
    let features = ALL & !(1 << VIRTIO_NET_F_GUEST_TSO4);
    let mut driver = Driver::new(&memory, features);
    let last = |driver: &Driver<'_>| *driver.asked.lock().unwrap().0.last().unwrap();
    let all = Offloads {
        csum: true,
        tso4: false,
        tso6: true,
        ecn: true,
        ufo: true,
        uso4: true,
        uso6: true,
    };
    assert_eq!(last(&driver), all);
    // VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET: checksums alone; then one that was not agreed on.
    assert_eq!(driver.command(&[5, 0, 2, 0, 0, 0, 0, 0, 0, 0]), 0);
    let csum = Offloads {
        csum: true,
        ..Offloads::default()
    };
    assert_eq!(last(&driver), csum);
    assert_eq!(driver.command(&[5, 0, 0x80, 0, 0, 0, 0, 0, 0, 0]), 1);
    assert_eq!(last(&driver), csum);
    driver.device.pause();
    let state = driver.device.save_state();
    let mut restored = Driver::new(&memory, features);
    restored.device.reset();
    restored.device.restore_state(&state).unwrap();
    restored.activate();
    assert_eq!(last(&restored), csum);
    restored.device.reset();
    assert_eq!(last(&restored), Offloads::default());
}

#[test]
fn a_restored_device_asks_the_guest_to_announce_itself_once() {
    let memory = memory();
    let mut driver = Driver::new(&memory, ALL);
    let status = |driver: &Driver<'_>| {
        let mut status = [0; 2];
        driver.device.read_config(6, &mut status);
        u16::from_le_bytes(status)
    };
    assert_eq!(status(&driver), 1);
    driver.device.pause();
    let state = driver.device.save_state();
    driver.device.reset();
    driver.device.restore_state(&state).unwrap();
    driver.activate();
    assert_eq!(
        driver.device.interrupt.config_generation(),
        0,
        "not before it goes on"
    );
    driver.device.resume();
    assert_eq!(
        (status(&driver), driver.device.interrupt.config_generation()),
        (3, 1)
    );
    assert_eq!(driver.command(&[3, 0]), 0);
    assert_eq!(status(&driver), 1);
}

#[test]
fn a_state_of_another_interface_is_refused_and_named() {
    let memory = memory();
    let mut driver = Driver::new(&memory, ALL);
    driver.device.pause();
    let state = driver.device.save_state();
    assert_eq!(state.mac, MAC);
    driver.device.reset();
    for (wrong, named) in [
        (
            NetState {
                mac: [2; 6],
                ..state.clone()
            },
            "MAC address",
        ),
        (
            NetState {
                mtu: None,
                ..state.clone()
            },
            "MTU",
        ),
        (
            NetState {
                pairs: 2,
                ..state.clone()
            },
            "number of pairs",
        ),
        (
            NetState {
                serving: 0,
                ..state.clone()
            },
            "pairs in use",
        ),
        (
            NetState {
                serving: 2,
                ..state.clone()
            },
            "pairs in use",
        ),
        (
            NetState {
                offloads: 1 << 40,
                ..state.clone()
            },
            "features of receiving",
        ),
    ] {
        let error = driver.device.restore_state(&wrong).unwrap_err().to_string();
        assert!(error.contains(named), "{error}");
    }
    driver.device.restore_state(&state).unwrap();
}

#[test]
fn pairs_are_used_as_far_as_the_driver_says() {
    let memory = memory();
    let mut driver = Driver::with_pairs(&memory, ALL, 2);
    assert_eq!(driver.command(&[4, 0, 2, 0]), 0);
    assert_eq!(driver.command(&[4, 0, 0, 0]), 1);
    assert_eq!(driver.command(&[4, 0, 3, 0]), 1);
    assert_eq!(driver.asked.lock().unwrap().1, [1, 2]);
    driver.post(2, 2, 1530);
    rustix::net::send(
        &driver.network[1],
        &[0; 80],
        rustix::net::SendFlags::empty(),
    )
    .unwrap();
    driver.device.serve(2);
    assert_eq!(driver.received(2).unwrap().0.len(), 80);
    // Without the feature the control queue is the third.
    let mut driver = Driver::with_pairs(&memory, ALL & !(1 << VIRTIO_NET_F_MQ), 2);
    driver.rings.truncate(3);
    assert_eq!(driver.command(&[0, 0, 1]), 0);
    assert_eq!(driver.command(&[4, 0, 2, 0]), 1);
}

#[test]
fn commands_that_are_not_known_or_cut_are_refused() {
    let memory = memory();
    let mut driver = Driver::new(&memory, ALL);
    for command in [&[0, 0, 1][..], &[0, 1, 0], &[3, 0]] {
        assert_eq!(driver.command(command), 0, "{command:?}");
    }
    for command in [
        &[0][..],
        &[0, 0],
        &[0, 2, 1],
        &[1, 0, 0],
        &[5, 0, 0],
        &[9, 9, 9],
        &[4, 0, 1, 0],
    ] {
        assert_eq!(driver.command(command), 1, "{command:?}");
    }
    assert!(!driver.device.interrupt.needs_reset());
}

#[test]
fn a_paused_device_moves_nothing_and_catches_up() {
    let memory = memory();
    let mut driver = Driver::new(&memory, ALL);
    driver.post(0, 4, 1530);
    driver.device.pause();
    driver.network_sends(&frame(60));
    driver.device.serve(0);
    driver.send(&PLAIN, &frame(60));
    assert_eq!((driver.received(0), driver.arrived()), (None, None));
    driver.device.resume();
    for queue in 0..3 {
        assert_eq!(driver.device.kicks[queue].read().unwrap(), 2);
        driver.device.serve(queue);
    }
    assert!(driver.received(0).is_some() && driver.arrived().is_some());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() })]

    /// Rings wrap many times; no frame is lost, doubled, changed or out of order.
    #[test]
    fn frames_of_any_length_arrive_whole_and_in_order(
        lengths in prop::collection::vec(14usize..20_000, 1..60),
        size in 256u32..4096,
    ) {
        let memory = memory();
        let mut driver = Driver::new(&memory, ALL);
        let most = size as usize * usize::from(RING_SIZE) - HEADER_LEN;
        for (index, len) in lengths.into_iter().enumerate() {
            let len = len.min(most);
            let mut sent = frame(len);
            sent[..8].copy_from_slice(&(index as u64 & 0x7f).to_le_bytes());
            driver.network_sends(&sent);
            driver.device.serve(0);
            let mut posted = 0;
            let received = loop {
                if let Some(received) = driver.received(0) {
                    break received;
                }
                posted += 1;
                prop_assert!(posted <= RING_SIZE, "never received: {len} of {size}");
                let free = RING_SIZE - driver.posted(0);
                driver.post(0, free.min(3), size);
            };
            prop_assert_eq!(&received.0[HEADER_LEN..], &*sent);
            driver.send(&PLAIN, &sent);
            prop_assert_eq!(&driver.arrived().unwrap()[HEADER_LEN..], &*sent);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, failure_persistence: None, ..ProptestConfig::default() })]

    /// Also frames that are longer than the bucket.
    #[test]
    fn limits_hold_frames_back_and_lose_none(
        lengths in prop::collection::vec(14usize..4000, 2..20),
        size in 1000u64..5000,
    ) {
        let memory = memory();
        let mut driver = Driver::new(&memory, ALL);
        let bytes = mock::bucket(size, 0, 100);
        let (rx, rx_time) = mock::limiter(bytes, None);
        let (tx, tx_time) = mock::limiter(bytes, mock::bucket(3, 0, 10));
        driver.device.limiters = Limiters { rx, tx };
        driver.post(0, RING_SIZE, 4096);
        for (index, len) in (0..).zip(&lengths) {
            let mut bytes = frame(*len);
            bytes[0] = index;
            driver.network_sends(&bytes);
        }
        driver.device.serve(0);
        let (mut got, mut passed) = (Vec::new(), 0);
        loop {
            while let Some((bytes, _)) = driver.received(0) {
                passed += bytes.len() - HEADER_LEN;
                got.push((bytes[HEADER_LEN], bytes.len() - HEADER_LEN));
            }
            let most = size as usize + rx_time.elapsed_ms() as usize * size as usize / 100 + 4000;
            prop_assert!(passed <= most, "{passed} of {most}");
            if rx_time.advance_to_end().is_none() {
                break;
            }
            prop_assert!(driver.device.limiters.rx.on_timer());
            driver.device.serve(0);
        }
        let expected: Vec<_> = (0u8..).zip(lengths.iter().copied()).collect();
        prop_assert_eq!(&got, &expected);

        let mut sent = 0;
        for len in &lengths {
            driver.send(&PLAIN, &frame(*len));
            let arrived = loop {
                if let Some(bytes) = driver.arrived() {
                    break bytes;
                }
                prop_assert_eq!(driver.used(1), None, "it stays in the ring");
                prop_assert!(tx_time.advance_to_end().is_some());
                prop_assert!(driver.device.limiters.tx.on_timer());
                driver.device.serve(1);
            };
            prop_assert_eq!(arrived.len(), HEADER_LEN + len);
            sent += 1;
            prop_assert_eq!(driver.used(1), Some((0, 0)));
        }
        prop_assert_eq!(sent, lengths.len());
    }
}
