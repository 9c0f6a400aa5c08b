//! What the tests put a device between: a driver, and a network that is a socket.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair,
};
use vm_memory::{Bytes, GuestAddress};

use super::super::mock_ring::{RING_SIZE, Ring};
use super::header::{HEADER_LEN, NetHeader};
use super::*;
pub(super) use crate::rate_limiter::mock::{bucket, limiter};

pub(super) const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
pub(super) const NEXT: u16 = 1;
pub(super) const WRITE: u16 = 2;
/// Buffers of each ring, a page for each head.
const BUFFERS: u64 = 0x4_0000;
pub(super) const PAGE: u64 = 0x1000;
/// All that a device with one pair offers and a driver wants.
pub(super) const ALL: u64 = u64::MAX;

pub(super) fn memory() -> GuestMemory {
    GuestMemory::from_ranges(&[(GuestAddress(0), 0x20_0000)]).unwrap()
}

/// What the device has asked of its link.
pub(super) type Asked = Arc<Mutex<(Vec<Offloads>, Vec<u16>)>>;

struct SocketLink {
    queues: Vec<OwnedFd>,
    asked: Asked,
}

impl Link for SocketLink {
    fn pairs(&self) -> u16 {
        self.queues.len() as u16
    }

    fn queue(&self, pair: u16) -> Option<std::os::fd::BorrowedFd<'_>> {
        self.queues.get(usize::from(pair)).map(AsFd::as_fd)
    }

    fn has_uso(&self) -> bool {
        true
    }

    fn use_pairs(&self, pairs: u16) -> io::Result<()> {
        self.asked.lock().unwrap().1.push(pairs);
        Ok(())
    }

    fn set_offloads(&self, offloads: Offloads) -> io::Result<()> {
        self.asked.lock().unwrap().0.push(offloads);
        Ok(())
    }
}

/// Takes frames that begin with 0xee, and sends each back twice; wants to be asked again in 5 ms after each.
#[derive(Default)]
struct Parrot(Vec<Vec<u8>>);

impl Station for Parrot {
    fn takes(&self, head: &[u8]) -> bool {
        head.first() == Some(&0xee)
    }

    fn receive(&mut self, frame: &[u8], _: Instant) {
        let frame = frame.get(..frame.len().min(1514)).unwrap_or_default();
        self.0.extend([frame.to_vec(), frame.to_vec()]);
        self.0.truncate(4);
    }

    fn send(&mut self, buffer: &mut [u8], _: Instant) -> Option<usize> {
        let frame = self.0.pop()?;
        buffer.get_mut(..frame.len())?.copy_from_slice(&frame);
        Some(frame.len())
    }

    fn wait(&mut self, _: Instant) -> Option<Duration> {
        (!self.0.is_empty()).then_some(Duration::from_millis(5))
    }

    fn reset(&mut self) {
        self.0.clear();
    }
}

/// A device whose network is the other ends of sockets, one for each pair.
pub(super) fn device(pairs: usize) -> (VirtioNet, Vec<OwnedFd>, Asked) {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let pair = || socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
    let (queues, network) = (0..pairs).map(|_| pair()).unzip();
    let asked = Asked::default();
    let link = SocketLink {
        queues,
        asked: asked.clone(),
    };
    let config = NetConfig {
        link: Box::new(link),
        mac: MAC,
        mtu: Some(1500),
        limits: NetLimits::default(),
        station: Some(Box::<Parrot>::default()),
    };
    let irqfd = EventFd::new(libc::EFD_NONBLOCK).unwrap();
    let device = VirtioNet::new(config, Arc::new(Interrupt::new(irqfd))).unwrap();
    (device, network, asked)
}

/// A sound driver, and the network.
pub(super) struct Driver<'a> {
    pub(super) device: VirtioNet,
    pub(super) network: Vec<OwnedFd>,
    pub(super) asked: Asked,
    pub(super) memory: &'a GuestMemory,
    pub(super) rings: Vec<Ring<'a>>,
    pub(super) features: u64,
    /// Used elements that were looked at, by ring.
    seen: Vec<u16>,
}

impl<'a> Driver<'a> {
    pub(super) fn new(memory: &'a GuestMemory, features: u64) -> Self {
        Self::with_pairs(memory, features, 1)
    }

    pub(super) fn with_pairs(memory: &'a GuestMemory, features: u64, pairs: usize) -> Self {
        let (device, network, asked) = device(pairs);
        let rings = Ring::several(memory, 2 * pairs + 1);
        let mut driver = Self {
            seen: vec![0; rings.len()],
            features: features & device.features(),
            device,
            network,
            asked,
            memory,
            rings,
        };
        driver.activate();
        driver
    }

    pub(super) fn activate(&mut self) {
        let event_idx = self.features & (1 << 29) != 0;
        let queues = self.rings.iter().map(|ring| {
            let mut queue = ring.queue();
            virtio_queue::QueueT::set_event_idx(&mut queue, event_idx);
            Some(queue)
        });
        let activation = Activation {
            memory: self.memory.clone(),
            queues: queues.collect(),
            features: self.features,
        };
        self.device.activate(activation).unwrap();
    }

    pub(super) fn buffer(queue: usize, head: u16) -> u64 {
        BUFFERS + PAGE * (u64::from(RING_SIZE) * queue as u64 + u64::from(head))
    }

    /// Makes buffers of a receive ring available: so many, of such a length.
    pub(super) fn post(&mut self, queue: usize, count: u16, len: u32) {
        let ring = &self.rings[queue];
        for _ in 0..count {
            let index = ring.available();
            let head = index % RING_SIZE;
            ring.describe(head, (Self::buffer(queue, head), len, WRITE, 0));
            ring.set_head(index, head);
            ring.set_available(index.wrapping_add(1));
        }
        self.device.serve(queue);
    }

    /// Offers bytes to the device, as one chain whose descriptors have such lengths; the last takes the rest.
    pub(super) fn offer(&mut self, queue: usize, bytes: &[u8], cuts: &[usize]) {
        let ring = &self.rings[queue];
        let at = Self::buffer(queue, 0);
        self.memory.write_slice(bytes, GuestAddress(at)).unwrap();
        let (mut start, mut parts) = (0, Vec::new());
        for cut in cuts {
            parts.push((start, *cut));
            start += cut;
        }
        parts.push((start, bytes.len() - start));
        let last = parts.len() - 1;
        for (index, (start, len)) in parts.into_iter().enumerate() {
            let flags = if index < last { NEXT } else { 0 };
            let next = index as u16 + 1;
            ring.describe(index as u16, (at + start as u64, len as u32, flags, next));
        }
        let index = ring.available();
        ring.set_head(index, 0);
        ring.set_available(index.wrapping_add(1));
    }

    /// Sends a frame behind a header.
    pub(super) fn send(&mut self, header: &NetHeader, frame: &[u8]) {
        let bytes = [header.as_bytes(), frame].concat();
        self.offer(1, &bytes, &[]);
        self.device.serve(1);
    }

    /// What the network has got from the guest, header first.
    pub(super) fn arrived(&self) -> Option<Vec<u8>> {
        let mut bytes = vec![0; 1 << 17];
        let (len, _) = recv(&self.network[0], &mut bytes[..], RecvFlags::empty()).ok()?;
        bytes.truncate(len);
        Some(bytes)
    }

    /// Has the network send a frame behind an empty header.
    pub(super) fn network_sends(&self, frame: &[u8]) {
        let bytes = [&[0; HEADER_LEN], frame].concat();
        send(&self.network[0], &bytes, SendFlags::empty()).unwrap();
    }

    /// The next frame in the buffers of a receive ring, header first, and how many buffers it takes.
    pub(super) fn received(&mut self, queue: usize) -> Option<(Vec<u8>, u16)> {
        let mut bytes = Vec::new();
        let mut wanted = 1;
        let mut got = 0;
        while got < wanted {
            let (head, len) = self.used(queue)?;
            let mut part = vec![0; len as usize];
            self.memory
                .read_slice(&mut part, GuestAddress(Self::buffer(queue, head as u16)))
                .unwrap();
            bytes.extend(part);
            if got == 0 {
                wanted = u16::from_le_bytes([bytes[10], bytes[11]]);
            }
            got += 1;
        }
        Some((bytes, wanted))
    }

    /// Buffers of a ring that the device has not given back.
    pub(super) fn posted(&self, queue: usize) -> u16 {
        let ring = &self.rings[queue];
        ring.available().wrapping_sub(ring.used())
    }

    /// The next used element of a ring.
    pub(super) fn used(&mut self, queue: usize) -> Option<(u32, u32)> {
        let ring = &self.rings[queue];
        if self.seen[queue] == ring.used() {
            return None;
        }
        let slot = u64::from(self.seen[queue] % RING_SIZE);
        self.seen[queue] += 1;
        let at = ring.used_ring().start + 4 + 8 * slot;
        let element: [u32; 2] = self.memory.read_obj(GuestAddress(at)).unwrap();
        Some((element[0], element[1]))
    }

    /// Gives a command of the control queue, and what is acknowledged; 255 is nothing.
    pub(super) fn command(&mut self, command: &[u8]) -> u8 {
        let queue = self.rings.len() - 1;
        let ring = &self.rings[queue];
        let at = Self::buffer(queue, 0);
        self.memory.write_slice(command, GuestAddress(at)).unwrap();
        self.memory
            .write_obj(255u8, GuestAddress(at + 2048))
            .unwrap();
        ring.describe(0, (at, command.len() as u32, NEXT, 1));
        ring.describe(1, (at + 2048, 1, WRITE, 0));
        let index = ring.available();
        ring.set_head(index, 0);
        ring.set_available(index.wrapping_add(1));
        self.device.serve(queue);
        self.memory.read_obj(GuestAddress(at + 2048)).unwrap()
    }
}
