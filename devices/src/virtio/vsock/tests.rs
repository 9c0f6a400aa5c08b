//! A sound driver and programs of the host, and what each sees of the other.

use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::sync::atomic::Ordering;

use super::mock::{CID, Driver, SERVICE, memory, packet};
use super::packet::{Header, Key, Op, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};
use super::*;
use crate::persist::through_json;

const PORT: u32 = 1024;

fn with_len(header: Header, len: usize) -> Header {
    Header {
        len: u32::try_from(len).unwrap().into(),
        ..header
    }
}

/// A driver with rx buffers, a program that listens for [`PORT`], and a connection from the guest's port 5.
fn connected(memory: &GuestMemory) -> (Driver<'_>, std::os::unix::net::UnixStream, Key) {
    let mut driver = Driver::new(memory);
    let listener = UnixListener::bind(driver.path(Some(PORT))).unwrap();
    (0..8).for_each(|_| driver.give(0, 4096));
    let key = Key {
        guest: 5,
        host: PORT,
    };
    driver.send(&packet(key, Op::Request), &[]);
    let (answer, _) = driver.only();
    assert_eq!(answer.op(), Some(Op::Response));
    assert_eq!((answer.src_port.get(), answer.dst_port.get()), (PORT, 5));
    assert_eq!(answer.buf_alloc.get(), 32 << 10);
    let (stream, _) = listener.accept().unwrap();
    (driver, stream, key)
}

#[test]
fn a_guest_talks_to_a_program_of_the_host_and_either_may_end_first() {
    let memory = memory();
    let (mut driver, mut program, key) = connected(&memory);
    driver.send(&with_len(packet(key, Op::ReadWrite), 5), b"hello");
    let mut heard = [0; 5];
    program.read_exact(&mut heard).unwrap();
    assert_eq!(&heard, b"hello");
    program.write_all(b"good day").unwrap();
    driver.turn();
    let (answer, payload) = driver.only();
    assert_eq!(answer.op(), Some(Op::ReadWrite));
    assert_eq!(payload, b"good day");
    assert_eq!(answer.fwd_cnt.get(), 5);
    // Half of it first.
    let shut = |flags: u32| Header {
        flags: flags.into(),
        ..packet(key, Op::Shutdown)
    };
    driver.send(&shut(SHUTDOWN_SEND), &[]);
    assert_eq!(program.read(&mut heard).unwrap(), 0);
    program.write_all(b"bye").unwrap();
    driver.turn();
    assert_eq!(driver.only().1, b"bye");
    driver.send(&shut(SHUTDOWN_RECEIVE), &[]);
    assert_eq!(driver.only().0.op(), Some(Op::Reset));
    assert_eq!(driver.device.metrics.connections.load(Ordering::Relaxed), 0);
}

#[test]
fn what_a_program_sent_before_it_ended_comes_before_the_end() {
    let memory = memory();
    let (mut driver, mut program, key) = connected(&memory);
    program.write_all(&[7; 5000]).unwrap();
    drop(program);
    driver.turn();
    let packets = driver.received();
    let sizes: Vec<_> = packets.iter().map(|(_, bytes)| bytes.len()).collect();
    assert_eq!(sizes, [4052, 948, 0]);
    let last = &packets[2].0;
    assert_eq!(last.op(), Some(Op::Shutdown));
    assert_eq!(last.flags.get(), SHUTDOWN_RECEIVE | SHUTDOWN_SEND);
    driver.send(&packet(key, Op::Reset), &[]);
    assert_eq!(driver.device.table.len(), 0);
    assert!(driver.received().is_empty(), "a reset has no answer");
}

#[test]
fn a_program_calls_a_port_of_the_guest() {
    let memory = memory();
    let mut driver = Driver::new(&memory);
    (0..8).for_each(|_| driver.give(0, 4096));
    let mut program = driver.call("CONNECT 99\nat once");
    driver.turn();
    let (request, _) = driver.only();
    assert_eq!(request.op(), Some(Op::Request));
    assert_eq!(request.dst_cid.get(), u64::from(CID));
    assert_eq!(request.dst_port.get(), 99);
    let key = Key {
        guest: 99,
        host: request.src_port.get(),
    };
    driver.send(&packet(key, Op::Response), &[]);
    let mut line = [0; 32];
    let len = program.read(&mut line).unwrap();
    assert_eq!(
        std::str::from_utf8(&line[..len]).unwrap(),
        format!("OK {}\n", 1 << 30)
    );
    assert_eq!(driver.only().1, b"at once");
}

#[test]
fn a_call_that_is_none_is_hung_up_on() {
    let memory = memory();
    let mut driver = Driver::new(&memory);
    for line in [
        "HELLO 1\n",
        "CONNECT x\n",
        "CONNECT 4294967295\n",
        "CONNECT 000000000000000001",
    ] {
        let mut program = driver.call(line);
        driver.turn();
        assert_eq!(program.read(&mut [0]).unwrap_or(0), 0, "{line:?}");
    }
    // A client that sends nothing stays, as long as there are few.
    let silent: Vec<_> = (0..8).map(|_| driver.call("CONN")).collect();
    driver.turn();
    let mut turned_away = driver.call("");
    driver.turn();
    assert_eq!(turned_away.read(&mut [0]).unwrap(), 0);
    drop(silent);
    driver.turn();
    let _waits = driver.call("CONNECT 1\n");
    driver.give(0, 4096);
    driver.turn();
    assert_eq!(driver.only().0.op(), Some(Op::Request));
}

#[test]
fn a_caller_that_does_not_wait_is_reset_where_the_guest_knows_of_it() {
    let memory = memory();
    let mut driver = Driver::new(&memory);
    drop(driver.call("CONNECT 1\n"));
    driver.turn();
    assert_eq!(driver.device.table.len(), 0);
    let program = driver.call("CONNECT 1\n");
    (0..2).for_each(|_| driver.give(0, 4096));
    driver.turn();
    drop(program);
    driver.turn();
    let ops: Vec<_> = driver.received().iter().map(|(h, _)| h.op()).collect();
    assert_eq!(ops, [Some(Op::Request), Some(Op::Reset)]);
}

#[test]
fn an_invalid_packet_is_answered_by_a_reset_and_a_reset_is_not() {
    let memory = memory();
    let mut driver = Driver::new(&memory);
    (0..16).for_each(|_| driver.give(0, 4096));
    let key = Key { guest: 1, host: 2 };
    // Nobody listens; there is no connection; another machine; no stream; no operation; longer than any packet.
    let mut wrong = vec![packet(key, Op::Request), packet(key, Op::ReadWrite)];
    wrong.push(Header {
        dst_cid: 3.into(),
        ..packet(key, Op::Request)
    });
    wrong.push(Header {
        kind: 2.into(),
        ..packet(key, Op::Request)
    });
    wrong.push(Header {
        op: 77.into(),
        ..packet(key, Op::Request)
    });
    for header in &wrong {
        driver.send(header, &[]);
        let (answer, _) = driver.only();
        assert_eq!(answer.op(), Some(Op::Reset), "{header:?}");
        assert_eq!(answer.src_cid, header.dst_cid);
        assert_eq!(answer.dst_port, header.src_port);
        assert_eq!(answer.kind, header.kind);
    }
    driver.send(&packet(key, Op::Reset), &[]);
    // Of another guest, and shorter than it says.
    let other = Header {
        src_cid: 8.into(),
        ..packet(key, Op::Request)
    };
    driver.send(&other, &[]);
    driver.send(&with_len(packet(key, Op::Request), 10), b"short");
    assert!(driver.received().is_empty());
    assert_eq!(driver.device.metrics.failures.load(Ordering::Relaxed), 2);
}

#[test]
fn a_guest_has_the_credit_that_it_was_given_and_no_more() {
    let memory = memory();
    let (mut driver, mut program, key) = connected(&memory);
    let data = [9; 2048];
    let mut sent = 0;
    // The socket takes some, and then the buffer is filled.
    while driver.device.table.get(key).unwrap().has_room(2048) {
        driver.send(&with_len(packet(key, Op::ReadWrite), data.len()), &data);
        sent += data.len();
        driver.fill();
        for (header, _) in driver.received() {
            assert_eq!(header.op(), Some(Op::CreditUpdate));
            assert_eq!(header.buf_alloc.get(), 32 << 10);
        }
    }
    let taken = driver.device.metrics.sent_bytes.load(Ordering::Relaxed) as usize;
    assert_eq!(sent - taken, 32 << 10);
    // The program reads on, and all of it comes.
    program.set_nonblocking(true).unwrap();
    let mut got = 0;
    let mut bytes = vec![0; 64 << 10];
    while got < sent {
        match program.read(&mut bytes) {
            Ok(len) => got += len,
            Err(error) => assert_eq!(error.kind(), io::ErrorKind::WouldBlock),
        }
        driver.turn();
    }
    assert_eq!(got, sent);
    let last = driver.received().pop().unwrap().0;
    assert_eq!(last.op(), Some(Op::CreditUpdate));
    // No credit update is sent before half of the buffer is free again.
    assert!(sent - (last.fwd_cnt.get() as usize) < 16 << 10);
    // A guest that sends without room loses the connection.
    let too_much = vec![0; 2048];
    for _ in 0..1000 {
        driver.send(&with_len(packet(key, Op::ReadWrite), 2048), &too_much);
        driver.fill();
        let packets = driver.received();
        if packets.iter().any(|(h, _)| h.op() == Some(Op::Reset)) {
            assert_eq!(driver.device.table.len(), 0);
            return;
        }
    }
    panic!("it was never reset");
}

#[test]
fn the_host_waits_for_the_room_of_the_guest_and_asks_for_it_once() {
    let memory = memory();
    let mut driver = Driver::new(&memory);
    let listener = UnixListener::bind(driver.path(Some(PORT))).unwrap();
    (0..8).for_each(|_| driver.give(0, 4096));
    let key = Key {
        guest: 5,
        host: PORT,
    };
    let small = |op, fwd: u32| Header {
        buf_alloc: 10.into(),
        fwd_cnt: fwd.into(),
        ..packet(key, op)
    };
    driver.send(&small(Op::Request, 0), &[]);
    let (mut program, _) = listener.accept().unwrap();
    program.write_all(&[1; 25]).unwrap();
    driver.turn();
    let printed: Vec<_> = driver
        .received()
        .iter()
        .map(|(h, b)| (h.op().unwrap(), b.len()))
        .collect();
    assert_eq!(
        printed,
        [
            (Op::Response, 0),
            (Op::ReadWrite, 10),
            (Op::CreditRequest, 0)
        ]
    );
    // It says that all, or more than all, has been read.
    driver.send(&small(Op::CreditUpdate, 10), &[]);
    let printed: Vec<_> = driver
        .received()
        .iter()
        .map(|(h, b)| (h.op().unwrap(), b.len()))
        .collect();
    assert_eq!(printed, [(Op::ReadWrite, 10), (Op::CreditRequest, 0)]);
    driver.send(&small(Op::CreditUpdate, 21), &[]);
    assert!(driver.received().is_empty());
}

#[test]
fn a_guest_that_takes_no_responses_is_not_served_until_it_does() {
    let memory = memory();
    let mut driver = Driver::new(&memory);
    let key = Key { guest: 1, host: 2 };
    for _ in 0..200 {
        driver.send(&packet(key, Op::ReadWrite), &[]);
        assert!(driver.device.replies.len() <= 64);
        if driver.device.replies.len() == 64 {
            break;
        }
    }
    let before = driver.device.metrics.sent_packets.load(Ordering::Relaxed);
    driver.send(&packet(key, Op::ReadWrite), &[]);
    assert_eq!(
        before,
        driver.device.metrics.sent_packets.load(Ordering::Relaxed)
    );
    for _ in 0..65 {
        driver.give(0, 4096);
        driver.turn();
        assert_eq!(driver.only().0.op(), Some(Op::Reset));
    }
    assert!(driver.device.replies.is_empty());
}

#[test]
fn a_service_answers_and_ends_the_connection() {
    let memory = memory();
    let mut driver = Driver::new(&memory);
    (0..8).for_each(|_| driver.give(0, 4096));
    let key = Key {
        guest: 3,
        host: SERVICE,
    };
    driver.send(&packet(key, Op::Request), &[]);
    assert_eq!(driver.only().0.op(), Some(Op::Response));
    driver.send(&with_len(packet(key, Op::ReadWrite), 2), b"ab");
    let packets = driver.received();
    assert_eq!(packets[0].1, b"abab");
    assert_eq!(packets[1].0.op(), Some(Op::Shutdown));
    assert_eq!(packets[1].0.flags.get(), 3);
}

#[test]
fn a_paused_device_waits_and_a_restored_one_reports_that_its_connections_are_gone() {
    let memory = memory();
    let (mut driver, mut program, key) = connected(&memory);
    driver.device.pause();
    program.write_all(b"later").unwrap();
    driver.turn();
    assert!(driver.received().is_empty());
    through_json(&driver.device.save_state());
    driver.device.resume();
    driver.turn();
    assert_eq!(driver.only().1, b"later");

    let memory = mock::memory();
    let mut driver = Driver::new(&memory);
    assert!(
        driver.device.restore_state(&VsockState {}).is_err(),
        "it is in use"
    );
    driver.device.reset();
    driver.device.restore_state(&VsockState {}).unwrap();
    driver.activate();
    driver.give(2, 3);
    driver.give(2, 4);
    driver.turn();
    assert_eq!(driver.events(), 0);
    driver.device.resume();
    driver.turn();
    // The first buffer is too short for it.
    assert_eq!(driver.events(), 2);
    driver.give(2, 4);
    driver.turn();
    assert_eq!(driver.events(), 2, "it is told once");
    driver.give(0, 4096);
    driver.send(&packet(key, Op::ReadWrite), &[]);
    assert_eq!(driver.only().0.op(), Some(Op::Reset));
}

#[test]
fn a_reset_ends_all_connections() {
    let memory = memory();
    let (mut driver, mut program, _) = connected(&memory);
    driver.device.reset();
    assert_eq!(program.read(&mut [0]).unwrap(), 0);
    // Nobody is there who could be called.
    let mut caller = driver.call("CONNECT 1\n");
    driver.turn();
    assert_eq!(caller.read(&mut [0]).unwrap(), 0);
    let mut cid = [0; 8];
    driver.device.read_config(0, &mut cid);
    assert_eq!(u64::from_le_bytes(cid), u64::from(CID));
}
