//! The header that every packet begins with (VIRTIO 1.2, 5.10.6).

use vm_memory::GuestAddress;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::super::chain::{self, ChainError, Segment};
use crate::GuestMemory;

/// The host's context identifier (5.10.4).
pub(super) const HOST_CID: u64 = 2;
/// `VIRTIO_VSOCK_TYPE_STREAM` (5.10.6.1).
pub(super) const STREAM: u16 = 1;
/// `VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE`: the sender receives no more (5.10.6.5).
pub(super) const SHUTDOWN_RECEIVE: u32 = 1;
/// `VIRTIO_VSOCK_SHUTDOWN_F_SEND`: the sender sends no more.
pub(super) const SHUTDOWN_SEND: u32 = 2;
/// Bytes of a header.
pub(super) const HEADER: u32 = size_of::<Header>() as u32;

/// `enum virtio_vsock_op`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Op {
    Request,
    Response,
    Reset,
    Shutdown,
    ReadWrite,
    CreditUpdate,
    CreditRequest,
}

impl Op {
    fn new(number: u16) -> Option<Self> {
        Some(match number {
            1 => Self::Request,
            2 => Self::Response,
            3 => Self::Reset,
            4 => Self::Shutdown,
            5 => Self::ReadWrite,
            6 => Self::CreditUpdate,
            7 => Self::CreditRequest,
            _ => return None,
        })
    }

    pub(super) const fn number(self) -> u16 {
        match self {
            Self::Request => 1,
            Self::Response => 2,
            Self::Reset => 3,
            Self::Shutdown => 4,
            Self::ReadWrite => 5,
            Self::CreditUpdate => 6,
            Self::CreditRequest => 7,
        }
    }
}

/// `struct virtio_vsock_hdr`.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct Header {
    pub(super) src_cid: U64,
    pub(super) dst_cid: U64,
    pub(super) src_port: U32,
    pub(super) dst_port: U32,
    /// Bytes behind the header.
    pub(super) len: U32,
    pub(super) kind: U16,
    pub(super) op: U16,
    pub(super) flags: U32,
    /// Room of the sender for what is sent to it on this connection (5.10.6.3).
    pub(super) buf_alloc: U32,
    /// Bytes that have left that room, modulo 2^32.
    pub(super) fwd_cnt: U32,
}

/// A connection, by its two ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Key {
    pub(super) guest: u32,
    pub(super) host: u32,
}

impl Header {
    /// The connection that a packet of the guest is about.
    pub(super) fn key(&self) -> Key {
        Key {
            guest: self.src_port.get(),
            host: self.dst_port.get(),
        }
    }

    /// The operation; `None` for one that the specification does not define.
    pub(super) fn op(&self) -> Option<Op> {
        Op::new(self.op.get())
    }

    /// A packet to the guest.
    pub(super) fn to_guest(cid: u64, key: Key, op: Op) -> Self {
        Self {
            src_cid: HOST_CID.into(),
            dst_cid: cid.into(),
            src_port: key.host.into(),
            dst_port: key.guest.into(),
            kind: STREAM.into(),
            op: op.number().into(),
            ..Self::default()
        }
    }

    /// The reset that refuses a packet of the guest, whatever its destination.
    pub(super) fn refuse(packet: &Self) -> Self {
        Self {
            src_cid: packet.dst_cid,
            dst_cid: packet.src_cid,
            src_port: packet.dst_port,
            dst_port: packet.src_port,
            kind: packet.kind,
            op: Op::Reset.number().into(),
            ..Self::default()
        }
    }
}

/// The header and the payload of a packet of the guest, which may lie in any number of buffers (2.7.4).
///
/// # Errors
/// Where the buffers are shorter than the packet says.
pub(super) fn read(
    memory: &GuestMemory,
    mut readable: Vec<Segment>,
) -> Result<(Header, Vec<Segment>), ChainError> {
    let head = chain::split_front(&mut readable, HEADER).ok_or(ChainError::Memory)?;
    let mut header = Header::default();
    chain::read(memory, &head, header.as_mut_bytes())?;
    let payload = chain::split_front(&mut readable, header.len.get());
    Ok((header, payload.ok_or(ChainError::Memory)?))
}

/// Where an answer goes: the room for its header, and for its payload behind that.
pub(super) struct Room {
    header: Vec<Segment>,
    payload: Vec<Segment>,
}

impl Room {
    /// In the buffers of a chain; `None` where a header and a byte have no place there: such a buffer would never do
    /// for what is to be sent.
    pub(super) fn new(mut writable: Vec<Segment>) -> Option<Self> {
        let header = chain::split_front(&mut writable, HEADER)?;
        (!writable.is_empty()).then_some(Self {
            header,
            payload: writable,
        })
    }

    /// Bytes of payload that there is room for.
    pub(super) fn payload(&self) -> usize {
        usize::try_from(chain::total_len(&self.payload)).unwrap_or(usize::MAX)
    }

    /// Writes a packet; the bytes that it has.
    pub(super) fn write(
        &self,
        memory: &GuestMemory,
        header: &Header,
        payload: &[u8],
    ) -> Result<u32, ChainError> {
        let head = chain::write(memory, &self.header, header.as_bytes())?;
        Ok(head + chain::write(memory, &self.payload, payload)?)
    }
}

/// `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET`: all connections are gone, and the guest may have another identifier
/// (5.10.6.7).
pub(super) const TRANSPORT_RESET: [u8; 4] = 0u32.to_le_bytes();

/// Bytes of `segments`, a piece at a time.
pub(super) fn pieces(segments: &[Segment], size: u32) -> impl Iterator<Item = Segment> + '_ {
    segments.iter().flat_map(move |segment| {
        let starts = (0..segment.len).step_by(size as usize);
        starts.map(move |start| Segment {
            // Inside a checked segment.
            address: GuestAddress(segment.address.0 + u64::from(start)),
            len: size.min(segment.len - start),
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_is_44_bytes_in_the_order_of_the_specification() {
        let header = Header {
            src_cid: 1.into(),
            dst_cid: 2.into(),
            src_port: 3.into(),
            dst_port: 4.into(),
            len: 5.into(),
            kind: 6.into(),
            op: 7.into(),
            flags: 8.into(),
            buf_alloc: 9.into(),
            fwd_cnt: 10.into(),
        };
        let bytes = header.as_bytes();
        assert_eq!(bytes.len(), 44);
        let firsts: Vec<u8> = [0, 8, 16, 20, 24, 28, 30, 32, 36, 40]
            .iter()
            .map(|at: &usize| bytes[*at])
            .collect();
        assert_eq!(firsts, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]);
    }

    #[test]
    fn operations_have_the_numbers_of_the_specification() {
        for number in 1..=7 {
            assert_eq!(Op::new(number).unwrap().number(), number);
        }
        assert!(Op::new(0).is_none() && Op::new(8).is_none());
    }

    #[test]
    fn pieces_cover_each_byte_once() {
        let segment = |address, len| Segment {
            address: GuestAddress(address),
            len,
        };
        let cut: Vec<_> = pieces(&[segment(0, 10), segment(100, 4)], 4).collect();
        assert_eq!(
            cut,
            [segment(0, 4), segment(4, 4), segment(8, 2), segment(100, 4)]
        );
    }
}
