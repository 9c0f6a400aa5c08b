//! What the tests put a device between: a driver, and programs of the host.

use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;

use vm_memory::{Bytes, GuestAddress};
use zerocopy::{FromBytes, IntoBytes};

use super::super::mock_ring::{RING_SIZE, Ring};
use super::packet::{Header, Key, Op};
use super::*;
use crate::service::Session;

pub(super) const CID: u32 = 7;
pub(super) const SERVICE: u32 = 80;
/// Buffers of each ring, a page for each head.
const BUFFERS: u64 = 0x4_0000;
const PAGE: u64 = 0x1000;
const WRITE: u16 = 2;

pub(super) fn memory() -> GuestMemory {
    GuestMemory::from_ranges(&[(GuestAddress(0), 0x20_0000)]).unwrap()
}

/// Says everything twice, and then that this is all.
struct Echo(Vec<u8>);

struct EchoService;

impl Service for EchoService {
    fn open(&self) -> Box<dyn Session> {
        Box::new(Echo(Vec::new()))
    }
}

impl Session for Echo {
    fn receive(&mut self, bytes: &[u8]) {
        self.0.extend(bytes.repeat(2));
        self.0.truncate(1 << 10);
    }

    fn send(&mut self, buffer: &mut [u8]) -> Option<usize> {
        if self.0.is_empty() {
            return None;
        }
        if self.0 == b"." {
            return Some(0);
        }
        let len = buffer.len().min(self.0.len());
        buffer[..len].copy_from_slice(&self.0[..len]);
        self.0.drain(..len);
        if self.0.is_empty() {
            self.0.push(b'.');
        }
        Some(len)
    }
}

/// A device whose socket lies in a folder of its own.
pub(super) fn device() -> (VirtioVsock, tempfile::TempDir) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("v");
    let config = VsockConfig {
        guest_cid: CID,
        listener: UnixListener::bind(&path).unwrap(),
        path: &path,
        service: Some((SERVICE, Arc::new(EchoService))),
    };
    let irqfd = EventFd::new(libc::EFD_NONBLOCK).unwrap();
    let device = VirtioVsock::new(config, Arc::new(Interrupt::new(irqfd))).unwrap();
    (device, folder)
}

/// A sound driver, and where the host's programs connect to.
pub(super) struct Driver<'a> {
    pub(super) device: VirtioVsock,
    folder: tempfile::TempDir,
    memory: &'a GuestMemory,
    rings: Vec<Ring<'a>>,
    /// Used elements of the rx and event rings that were looked at.
    seen: [u16; 3],
}

impl<'a> Driver<'a> {
    pub(super) fn new(memory: &'a GuestMemory) -> Self {
        let (device, folder) = device();
        let mut driver = Self {
            device,
            folder,
            memory,
            rings: Ring::several(memory, QUEUES),
            seen: [0; 3],
        };
        driver.activate();
        driver
    }

    pub(super) fn activate(&mut self) {
        let queues = self.rings.iter().map(|ring| Some(ring.queue())).collect();
        let activation = Activation {
            memory: self.memory.clone(),
            queues,
            features: RING_FEATURES,
        };
        self.device.activate(activation).unwrap();
    }

    pub(super) fn path(&self, port: Option<u32>) -> PathBuf {
        let name = port.map_or("v".to_owned(), |port| format!("v_{port}"));
        self.folder.path().join(name)
    }

    pub(super) fn call(&self, line: &str) -> UnixStream {
        let mut stream = UnixStream::connect(self.path(None)).unwrap();
        io::Write::write_all(&mut stream, line.as_bytes()).unwrap();
        stream
    }

    fn buffer(queue: usize, head: u16) -> u64 {
        BUFFERS + PAGE * (u64::from(RING_SIZE) * queue as u64 + u64::from(head))
    }

    /// Gives the device a buffer of a ring.
    pub(super) fn give(&mut self, queue: usize, len: u32) {
        let ring = &self.rings[queue];
        let index = ring.available();
        let head = index % RING_SIZE;
        ring.describe(head, (Self::buffer(queue, head), len, WRITE, 0));
        ring.set_head(index, head);
        ring.set_available(index.wrapping_add(1));
    }

    /// Gives it as many rx buffers as a driver keeps there.
    pub(super) fn fill(&mut self) {
        while self.rings[0].available().wrapping_sub(self.rings[0].used()) < 8 {
            self.give(0, 4096);
        }
    }

    /// Looks at what the device has been woken for, until there is nothing more.
    pub(super) fn turn(&mut self) {
        for _ in 0..64 {
            self.device.poll();
            self.device.serve();
        }
    }

    /// Sends a packet, with its payload in a buffer of its own.
    pub(super) fn send(&mut self, header: &Header, payload: &[u8]) {
        let ring = &self.rings[1];
        let index = ring.available();
        let head = (2 * index) % RING_SIZE;
        let at = Self::buffer(1, head);
        self.memory
            .write_slice(header.as_bytes(), GuestAddress(at))
            .unwrap();
        self.memory
            .write_slice(payload, GuestAddress(at + 64))
            .unwrap();
        if payload.is_empty() {
            ring.describe(head, (at, packet::HEADER, 0, 0));
        } else {
            ring.describe(head, (at, packet::HEADER, 1, head + 1));
            ring.describe(head + 1, (at + 64, payload.len() as u32, 0, 0));
        }
        ring.set_head(index, head);
        ring.set_available(index.wrapping_add(1));
        self.turn();
    }

    /// The packets that the device has written since.
    pub(super) fn received(&mut self) -> Vec<(Header, Vec<u8>)> {
        let mut packets = Vec::new();
        while self.seen[0] != self.rings[0].used() {
            let at = Self::buffer(0, self.seen[0] % RING_SIZE);
            let mut bytes = [0; packet::HEADER as usize];
            self.memory
                .read_slice(&mut bytes, GuestAddress(at))
                .unwrap();
            let header = Header::read_from_bytes(&bytes).unwrap();
            let mut payload = vec![0; header.len.get() as usize];
            let behind = GuestAddress(at + u64::from(packet::HEADER));
            self.memory.read_slice(&mut payload, behind).unwrap();
            packets.push((header, payload));
            self.seen[0] = self.seen[0].wrapping_add(1);
        }
        packets
    }

    /// The one packet that the device has written since.
    pub(super) fn only(&mut self) -> (Header, Vec<u8>) {
        let mut packets = self.received();
        assert_eq!(packets.len(), 1, "{packets:?}");
        packets.remove(0)
    }

    pub(super) fn events(&self) -> u16 {
        self.rings[2].used()
    }
}

/// A packet of the guest, which has 64 KiB of room.
pub(super) fn packet(key: Key, op: Op) -> Header {
    Header {
        src_cid: u64::from(CID).into(),
        dst_cid: packet::HOST_CID.into(),
        src_port: key.guest.into(),
        dst_port: key.host.into(),
        kind: packet::STREAM.into(),
        op: op.number().into(),
        buf_alloc: 0x1_0000.into(),
        ..Header::default()
    }
}
