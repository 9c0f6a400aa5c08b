//! A driver that has devices log as often as it can.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use devices::virtio::balloon::VirtioBalloon;
use devices::virtio::block::VirtioBlock;
use devices::virtio::pmem::VirtioPmem;
use devices::virtio::rng::VirtioRng;
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};
use vm_memory::{Bytes, GuestAddress};

use super::malice::QUEUE_SIZE;
use super::stack::{Rings, Stack, Subject, VERSION_1};

/// Counts what would be logged where warnings are.
struct Count(Arc<AtomicUsize>);

impl Subscriber for Count {
    fn enabled(&self, of: &Metadata<'_>) -> bool {
        *of.level() <= Level::WARN
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, _: &Event<'_>) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

/// Times that the driver does the same.
const OFTEN: usize = 2000;

/// How many lines `driver` causes, and how many seconds that takes at most.
fn lines(driver: impl FnOnce()) -> (usize, usize) {
    let count = Arc::new(AtomicUsize::new(0));
    let begun = std::time::Instant::now();
    tracing::subscriber::with_default(Count(count.clone()), driver);
    let seconds = usize::try_from(begun.elapsed().as_secs()).unwrap() + 1;
    (count.load(Ordering::Relaxed), seconds)
}

/// Starts a device with a ring where no memory is.
fn start_nowhere<D: Subject>() {
    let mut stack = Stack::<D>::new();
    let nowhere = Rings {
        desc: 0xdead_0000,
        ..Rings::APART
    };
    for _ in 0..OFTEN {
        stack.start(VERSION_1, QUEUE_SIZE, nowhere);
    }
}

/// Has a device find more in a ring than there can be.
fn break_the_ring<D: Subject>() {
    let mut stack = Stack::<D>::new();
    for _ in 0..OFTEN {
        stack.start(VERSION_1, QUEUE_SIZE, Rings::APART);
        let index = GuestAddress(Rings::APART.driver + 2);
        stack.memory.write_obj(0x7fff_u16, index).unwrap();
        stack.kick(0);
    }
}

fn do_both<D: Subject>() {
    start_nowhere::<D>();
    break_the_ring::<D>();
}

#[test]
fn a_driver_cannot_fill_the_log() {
    let (lines, seconds) = lines(|| {
        do_both::<VirtioRng>();
        do_both::<VirtioBlock>();
        do_both::<VirtioBalloon>();
        do_both::<VirtioPmem>();
    });
    // One place of the transport, and one of each device: ten lines at once and one a second.
    assert!(lines > 0, "it was not told of");
    assert!(lines <= 5 * (10 + seconds), "{lines} lines in {seconds} s");
}
