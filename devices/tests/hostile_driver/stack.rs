//! A device as a driver meets it: behind its registers, with an event loop in place of the device thread.

use std::io::Write;
use std::sync::{Arc, Mutex, MutexGuard};

use devices::GuestMemory;
use devices::bus::BusDevice;
use devices::lifecycle::{Device, DeviceState};
use devices::persist::RestoreError;
use devices::virtio::balloon::{BalloonConfig, VirtioBalloon};
use devices::virtio::block::{BlockConfig, VirtioBlock};
use devices::virtio::mmio::{MmioTransport, QUEUE_NOTIFY};
use devices::virtio::pmem::{Backing, FlushError, MappingFigures, PmemConfig, VirtioPmem};
use devices::virtio::rng::VirtioRng;
use devices::virtio::{Interrupt, VirtioDevice};
use event_manager::{EventManager, MutEventSubscriber, SubscriberOps};
use storage::io::EngineKind;
use storage::{Format, OpenOptions};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

pub const VERSION_1: u64 = 1 << 32;
pub const EVENT_IDX: u64 = 1 << 29;
pub const INDIRECT_DESC: u64 = 1 << 28;

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

pub const NEEDS_RESET: u32 = 64;
pub const DRIVER_OK: u32 = 15;

/// Register offsets (VIRTIO 1.2, 4.2.2).
pub mod register {
    pub const DRIVER_FEATURES: u64 = 0x20;
    pub const DRIVER_FEATURES_SEL: u64 = 0x24;
    pub const QUEUE_SEL: u64 = 0x30;
    pub const QUEUE_NUM: u64 = 0x38;
    pub const QUEUE_READY: u64 = 0x44;
    pub const INTERRUPT_STATUS: u64 = 0x60;
    pub const INTERRUPT_ACK: u64 = 0x64;
    pub const STATUS: u64 = 0x70;
    pub const QUEUE_DESC: u64 = 0x80;
    pub const QUEUE_DRIVER: u64 = 0x90;
    pub const QUEUE_DEVICE: u64 = 0xa0;
}

/// Enough for any device to serve a ring of the size used here.
const TURNS: usize = 5;

/// Where the honest driver has its buffers.
const HONEST_BUFFERS: u64 = 0x3_8000;

/// What a sector of the disk holds: as an address, flags or an index it is none that any test uses.
pub const DISK_BYTE: u8 = 0xdd;

/// Two regions that touch, and one behind a hole.
pub fn memory() -> GuestMemory {
    GuestMemory::from_ranges(&[
        (GuestAddress(0), 0x2_0000),
        (GuestAddress(0x2_0000), 0x2_0000),
        (GuestAddress(0x5_0000), 0x1000),
    ])
    .unwrap()
}

/// All of guest memory: the base of each region and its bytes.
pub fn snapshot(memory: &GuestMemory) -> Vec<(u64, Vec<u8>)> {
    memory
        .iter()
        .map(|region| {
            let mut bytes = vec![0; region.len() as usize];
            memory.read_slice(&mut bytes, region.start_addr()).unwrap();
            (region.start_addr().0, bytes)
        })
        .collect()
}

/// The addresses at which two snapshots differ.
pub fn changes(before: &[(u64, Vec<u8>)], after: &[(u64, Vec<u8>)]) -> Vec<u64> {
    const PAGE: usize = 4096;
    let mut changes = Vec::new();
    for ((base, before), (_, after)) in before.iter().zip(after) {
        let pages = before.chunks(PAGE).zip(after.chunks(PAGE));
        for (page, (before, after)) in (*base..).step_by(PAGE).zip(pages) {
            // Most pages are equal, which is quick to see for a page as a whole.
            if before != after {
                let bytes = (page..).zip(before.iter().zip(after));
                changes.extend(bytes.filter(|(_, (a, b))| a != b).map(|(at, _)| at));
            }
        }
    }
    changes
}

/// Where a driver puts the parts of a queue.
#[derive(Clone, Copy, Debug)]
pub struct Rings {
    pub desc: u64,
    pub driver: u64,
    pub device: u64,
}

impl Rings {
    /// Apart from each other and from everything else, one page for each part.
    pub const APART: Self = Self {
        desc: 0x1000,
        driver: 0x2000,
        device: 0x3000,
    };
    /// Where the honest driver has its own.
    const HONEST: Self = Self {
        desc: 0x3_1000,
        driver: 0x3_2000,
        device: 0x3_3000,
    };
}

/// A device under test.
pub trait Subject: VirtioDevice + MutEventSubscriber + Send + 'static {
    /// Makes one, and whatever it rests upon.
    fn make(interrupt: Arc<Interrupt>) -> Self;

    /// A request of an honest driver, as (is writable, length) of its buffers, and the bytes to put into the first.
    fn request() -> (&'static [(bool, u32)], Vec<u8>);

    /// Whether it was served: `buffers` are the buffers of the request.
    fn is_served(buffers: &[Vec<u8>]) -> bool;
}

impl Subject for VirtioRng {
    fn make(interrupt: Arc<Interrupt>) -> Self {
        Self::new(interrupt).unwrap()
    }

    fn request() -> (&'static [(bool, u32)], Vec<u8>) {
        (&[(true, 64)], Vec::new())
    }

    fn is_served(buffers: &[Vec<u8>]) -> bool {
        buffers[0].iter().any(|byte| *byte != 0)
    }
}

impl Subject for VirtioBlock {
    fn make(interrupt: Arc<Interrupt>) -> Self {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&vec![DISK_BYTE; 1 << 16]).unwrap();
        let options = OpenOptions {
            read_only: false,
            format: Some(Format::Raw),
            ..OpenOptions::default()
        };
        let config = BlockConfig {
            disk: storage::open(file.path(), &options).unwrap(),
            serial: "hostile".into(),
            queues: 2,
            queue_size: 16,
            engine: EngineKind::Auto,
        };
        Self::new(config, interrupt).unwrap()
    }

    fn request() -> (&'static [(bool, u32)], Vec<u8>) {
        // The serial number: a hostile driver may have written to any sector before.
        let mut header = vec![0; 16];
        header[0] = 8;
        (&[(false, 16), (true, 20), (true, 1)], header)
    }

    fn is_served(buffers: &[Vec<u8>]) -> bool {
        buffers[1].starts_with(b"hostile\0") && buffers[2] == [0]
    }
}

impl Subject for VirtioBalloon {
    fn make(interrupt: Arc<Interrupt>) -> Self {
        let config = BalloonConfig {
            target_pages: 16,
            deflate_on_oom: true,
            statistics_interval: 1,
            hinting: true,
            reporting: true,
        };
        // What it gives back, the device's own tests look at.
        Self::new(&config, Arc::new(|_, _| Ok(())), interrupt).unwrap()
    }

    fn request() -> (&'static [(bool, u32)], Vec<u8>) {
        (&[(false, 8)], vec![0x20, 0, 0, 0, 0x21, 0, 0, 0])
    }

    fn is_served(buffers: &[Vec<u8>]) -> bool {
        // Its pages are in the balloon, and the buffer is as it was.
        buffers[0] == Self::request().1
    }
}

/// Keeps nothing, and takes its time for it.
struct Nothing;

impl Backing for Nothing {
    fn flush(&self) -> Result<u64, FlushError> {
        std::thread::yield_now();
        Ok(0)
    }
}

impl Subject for VirtioPmem {
    fn make(interrupt: Arc<Interrupt>) -> Self {
        let config = PmemConfig {
            start: 4 << 30,
            size: 2 << 20,
            backing: Some(Arc::new(Nothing)),
            mapping: MappingFigures::default(),
        };
        Self::new(config, interrupt).unwrap()
    }

    fn request() -> (&'static [(bool, u32)], Vec<u8>) {
        (&[(false, 4), (true, 4)], vec![0; 4])
    }

    fn is_served(buffers: &[Vec<u8>]) -> bool {
        buffers[1] == [0; 4]
    }
}

/// What is saved of a guest that has one device.
#[derive(Debug, PartialEq)]
pub struct Saved {
    pub device: DeviceState,
    pub transport: DeviceState,
}

impl Saved {
    pub fn through_json(&self) -> Self {
        let again = |state: &DeviceState| serde_json::from_str(&state.to_string()).unwrap();
        Self {
            device: again(&self.device),
            transport: again(&self.transport),
        }
    }
}

/// The device, its registers and its event loop.
pub struct Stack<D> {
    pub memory: GuestMemory,
    transport: MmioTransport,
    device: Arc<Mutex<D>>,
    events: EventManager<Arc<Mutex<D>>>,
}

impl<D: Subject> Stack<D> {
    pub fn new() -> Self {
        Self::on(memory())
    }

    fn on(memory: GuestMemory) -> Self {
        let irqfd = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let device = Arc::new(Mutex::new(D::make(Arc::new(Interrupt::new(irqfd)))));
        let mut events = EventManager::new().unwrap();
        events.add_subscriber(device.clone());
        Self {
            transport: MmioTransport::new(device.clone(), memory.clone()),
            memory,
            device,
            events,
        }
    }

    /// What is saved of a guest that is paused.
    pub fn saved(&self) -> Saved {
        let device = {
            let mut device = self.device();
            device.pause();
            device.save().unwrap()
        };
        Saved {
            device,
            transport: self.transport.save().unwrap(),
        }
    }

    /// A new device for the same guest, which goes on with it.
    ///
    /// # Errors
    /// As the device and its transport.
    pub fn restored(memory: &GuestMemory, saved: &Saved) -> Result<Self, RestoreError> {
        let mut stack = Self::on(memory.clone());
        stack.device().restore(&saved.device)?;
        stack.transport.restore(&saved.transport)?;
        Ok(stack)
    }

    /// Saves the guest and restores it, which changes nothing that it can see.
    pub fn go_on_elsewhere(&mut self) {
        let saved = self.saved();
        let before = snapshot(&self.memory);
        *self = Self::restored(&self.memory, &saved.through_json()).unwrap();
        assert_eq!(self.saved(), saved);
        assert!(changes(&before, &snapshot(&self.memory)).is_empty());
        self.device().resume();
    }

    /// Whether an interrupt was raised since the last call.
    pub fn was_interrupted(&self) -> bool {
        self.device().interrupt().irqfd().read().is_ok()
    }

    pub fn device(&self) -> MutexGuard<'_, D> {
        self.device.lock().unwrap()
    }

    pub fn access(&mut self, offset: u64, value: u64, width: usize, is_write: bool) {
        let mut data = value.to_le_bytes();
        if is_write {
            self.transport.write(offset, &data[..width]);
        } else {
            self.transport.read(offset, &mut data[..width]);
        }
    }

    pub fn write(&mut self, register: u64, value: u32) {
        self.access(register, value.into(), 4, true);
    }

    pub fn read(&mut self, register: u64) -> u32 {
        let mut data = [0; 4];
        self.transport.read(register, &mut data);
        u32::from_le_bytes(data)
    }

    /// From a reset to `FEATURES_OK`.
    pub fn negotiate(&mut self, features: u64) {
        for status in [0, 1, 3] {
            self.write(register::STATUS, status);
        }
        for half in [0, 1] {
            self.write(register::DRIVER_FEATURES_SEL, half);
            self.write(register::DRIVER_FEATURES, (features >> (32 * half)) as u32);
        }
        self.write(register::STATUS, 11);
    }

    pub fn set_up_queue(&mut self, queue: u32, size: u32, rings: Rings) {
        self.write(register::QUEUE_SEL, queue);
        self.write(register::QUEUE_NUM, size);
        for (register, address) in [
            (register::QUEUE_DESC, rings.desc),
            (register::QUEUE_DRIVER, rings.driver),
            (register::QUEUE_DEVICE, rings.device),
        ] {
            self.write(register, address as u32);
            self.write(register + 4, (address >> 32) as u32);
        }
        self.write(register::QUEUE_READY, 1);
    }

    /// Resets the device and starts it with one queue, as a driver should.
    pub fn start(&mut self, features: u64, size: u16, rings: Rings) {
        self.poke(rings.driver, 0, &[0; 4]);
        self.poke(rings.device, 0, &[0; 4]);
        self.negotiate(features);
        self.set_up_queue(0, size.into(), rings);
        self.write(register::STATUS, DRIVER_OK);
    }

    /// Writes to guest memory; there is nothing to write to elsewhere.
    pub fn poke(&self, address: u64, offset: u64, value: &[u8]) {
        let _ = self
            .memory
            .write_slice(value, GuestAddress(address.wrapping_add(offset)));
    }

    /// Writes a descriptor into the table at `table`.
    pub fn describe(&self, table: u64, index: u64, (address, len, flags, next): Buffer) {
        let at = 16 * index;
        self.poke(table, at, &address.to_le_bytes());
        self.poke(table, at + 8, &len.to_le_bytes());
        self.poke(table, at + 12, &flags.to_le_bytes());
        self.poke(table, at + 14, &next.to_le_bytes());
    }

    /// Puts `heads` into the available ring of `size` elements at `ring`, from element `first` on, and sets its index.
    pub fn make_available(&self, ring: u64, size: u16, first: u16, heads: &[u16], index: u16) {
        for (slot, head) in (0..).zip(heads) {
            let element = u64::from(first.wrapping_add(slot) % size);
            self.poke(ring, 4 + 2 * element, &head.to_le_bytes());
        }
        self.poke(ring, 2, &index.to_le_bytes());
    }

    /// The device's index in the used ring.
    pub fn used_index(&self, rings: Rings) -> u16 {
        self.memory
            .read_obj(GuestAddress(rings.device + 2))
            .unwrap()
    }

    /// Notifies the queue, and gives the device thread one turn; requests may be under way after it.
    pub fn notify(&mut self, queue: u32) {
        self.write(QUEUE_NOTIFY, queue);
        self.events.run_with_timeout(0).unwrap();
    }

    /// Notifies the queue, and gives the device thread turns until nothing is under way.
    pub fn kick(&mut self, queue: u32) {
        self.write(QUEUE_NOTIFY, queue);
        self.turns();
    }

    /// Gives the device thread turns until nothing is under way.
    pub fn turns(&mut self) {
        // All but the first turn are for what the one before found no time for, which a hostile driver can make without end.
        for _ in 0..TURNS {
            self.events.run_with_timeout(0).unwrap();
            let mut device = self.device();
            device.pause();
            device.resume();
        }
    }

    /// Resets the device, and uses it as a driver should.
    pub fn serves_an_honest_driver(&mut self) -> bool {
        self.start_honestly();
        self.offer_honestly(1);
        self.kick(0);
        self.read(register::INTERRUPT_STATUS) == 1 && self.has_served(1)
    }

    /// Resets the device and guest memory, and starts as a driver should.
    pub fn start_honestly(&mut self) {
        for (base, bytes) in snapshot(&self.memory) {
            self.memory
                .write_slice(&vec![0; bytes.len()], GuestAddress(base))
                .unwrap();
        }
        self.start(VERSION_1 | EVENT_IDX, 8, Rings::HONEST);
    }

    /// Makes the honest driver's request available, as the driver's `count`-th.
    pub fn offer_honestly(&mut self, count: u16) {
        let (buffers, first) = D::request();
        for (index, (is_writable, len)) in (0..).zip(buffers) {
            let last = index + 1 == buffers.len() as u64;
            let flags = if *is_writable { WRITE } else { 0 } | if last { 0 } else { NEXT };
            let address = HONEST_BUFFERS + 0x100 * index;
            self.poke(address, 0, &vec![0; *len as usize]);
            self.describe(
                Rings::HONEST.desc,
                index,
                (address, *len, flags, index as u16 + 1),
            );
        }
        self.poke(HONEST_BUFFERS, 0, &first);
        self.make_available(Rings::HONEST.driver, 8, count - 1, &[0], count);
        // `used_event`: it wants to hear of each.
        self.poke(Rings::HONEST.driver, 4 + 2 * 8, &(count - 1).to_le_bytes());
    }

    /// Whether the honest driver has got all back that it has made available.
    pub fn has_served(&mut self, count: u16) -> bool {
        let (buffers, _) = D::request();
        let contents: Vec<Vec<u8>> = (0..)
            .zip(buffers)
            .map(|(index, (_, len))| {
                let mut bytes = vec![0; *len as usize];
                let at = GuestAddress(HONEST_BUFFERS + 0x100 * index);
                self.memory.read_slice(&mut bytes, at).unwrap();
                bytes
            })
            .collect();
        self.read(register::STATUS) == DRIVER_OK
            && self.used_index(Rings::HONEST) == count
            && D::is_served(&contents)
    }
}

/// A descriptor: address, length, flags, next.
pub type Buffer = (u64, u32, u16, u16);
