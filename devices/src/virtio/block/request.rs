//! Requests as the driver frames them (VIRTIO 1.2, 5.2.6): a header, data, and a status byte, cut into descriptors in
//! any way.

use storage::io::Request;
use storage::{ByteRange, Geometry};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use vm_memory::GuestAddress;
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes};

use super::super::chain::{self, Chain, ChainError, Segment};
use super::buffer::Operation;
use super::config_space::{
    MAX_DISCARD_SECTORS, MAX_RANGES, MAX_WRITE_ZEROES_SECTORS, SECTOR, SIZE_MAX, seg_max,
};
use crate::GuestMemory;

/// Length of the serial number (5.2.6).
pub(super) const ID_LEN: usize = VIRTIO_BLK_ID_BYTES as usize;

/// The head of `struct virtio_blk_req`.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub(super) struct Header {
    pub(super) kind: U32,
    pub(super) reserved: U32,
    pub(super) sector: U64,
}

/// `struct virtio_blk_discard_write_zeroes`.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub(super) struct RangeSegment {
    pub(super) sector: U64,
    pub(super) num_sectors: U32,
    pub(super) flags: U32,
}

const HEADER_LEN: u32 = size_of::<Header>() as u32;
const RANGE_LEN: u32 = size_of::<RangeSegment>() as u32;

/// What the device knows when it parses.
pub(super) struct Rules<'a> {
    pub(super) geometry: &'a Geometry,
    pub(super) queue_size: u16,
    /// Whether each write has to be durable: the driver did not accept `VIRTIO_BLK_F_FLUSH`.
    pub(super) write_through: bool,
}

/// The end of a request that was refused; the value is the status byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// `VIRTIO_BLK_S_IOERR`: it breaks the rules or the disk's limits.
    Invalid,
    /// `VIRTIO_BLK_S_UNSUPP`.
    Unsupported,
}

impl Refusal {
    pub(super) fn status(self) -> u8 {
        match self {
            Self::Invalid => VIRTIO_BLK_S_IOERR as u8,
            Self::Unsupported => VIRTIO_BLK_S_UNSUPP as u8,
        }
    }
}

impl From<ChainError> for Refusal {
    fn from(_: ChainError) -> Self {
        Self::Invalid
    }
}

/// What a request asks for.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Command {
    /// Something for the disk, with the data in these segments.
    Disk {
        request: Request,
        operation: Operation,
        data: Vec<Segment>,
    },
    /// The serial number, to be written to these segments.
    GetId(Vec<Segment>),
}

impl Command {
    /// Bytes of data that it moves, as far as a rate limiter counts them.
    pub(super) fn bandwidth(&self) -> u64 {
        match self {
            Self::Disk { data, .. } => chain::total_len(data),
            Self::GetId(_) => 0,
        }
    }
}

/// Takes the status byte, the last that the device may write, off a chain; `None` where there is none.
pub(super) fn take_status(chain: &mut Chain) -> Option<GuestAddress> {
    chain::split_last_byte(&mut chain.writable)
}

/// Parses what is left of a chain when its status byte is off.
pub(super) fn parse(
    memory: &GuestMemory,
    mut chain: Chain,
    rules: &Rules<'_>,
) -> Result<Command, Refusal> {
    let front = chain::split_front(&mut chain.readable, HEADER_LEN).ok_or(Refusal::Invalid)?;
    let mut header = Header::new_zeroed();
    chain::read(memory, &front, header.as_mut_bytes())?;
    let writable = chain.writable;
    let readable = chain.readable;
    match header.kind.get() {
        VIRTIO_BLK_T_IN => {
            let range = transfer_range(header.sector.get(), &writable, rules)?;
            Ok(Command::Disk {
                request: Request::Read(range),
                operation: Operation::Read,
                data: writable,
            })
        }
        VIRTIO_BLK_T_OUT => {
            check_writable(rules)?;
            let range = transfer_range(header.sector.get(), &readable, rules)?;
            Ok(Command::Disk {
                request: if rules.write_through {
                    Request::WriteThrough(range)
                } else {
                    Request::Write(range)
                },
                operation: Operation::Write,
                data: readable,
            })
        }
        VIRTIO_BLK_T_FLUSH => Ok(Command::Disk {
            request: Request::Flush,
            operation: Operation::Flush,
            data: Vec::new(),
        }),
        VIRTIO_BLK_T_GET_ID if chain::total_len(&writable) >= ID_LEN as u64 => {
            Ok(Command::GetId(writable))
        }
        VIRTIO_BLK_T_GET_ID => Err(Refusal::Invalid),
        VIRTIO_BLK_T_DISCARD => {
            check_writable(rules)?;
            let (ranges, _) = ranges(memory, &readable, rules, MAX_DISCARD_SECTORS, 0)?;
            Ok(Command::Disk {
                request: Request::Discard(ranges),
                operation: Operation::Discard,
                data: Vec::new(),
            })
        }
        VIRTIO_BLK_T_WRITE_ZEROES => {
            check_writable(rules)?;
            let unmap = VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP;
            let (ranges, flags) =
                ranges(memory, &readable, rules, MAX_WRITE_ZEROES_SECTORS, unmap)?;
            Ok(Command::Disk {
                request: Request::WriteZeroes {
                    ranges,
                    may_unmap: flags & unmap != 0,
                    durable: rules.write_through,
                },
                operation: Operation::Discard,
                data: Vec::new(),
            })
        }
        _ => Err(Refusal::Unsupported),
    }
}

/// A request that would write to a disk that is for reading ends in an error (5.2.6.2).
fn check_writable(rules: &Rules<'_>) -> Result<(), Refusal> {
    if rules.geometry.read_only {
        Err(Refusal::Invalid)
    } else {
        Ok(())
    }
}

/// The bytes of the disk that `data` are for.
fn transfer_range(sector: u64, data: &[Segment], rules: &Rules<'_>) -> Result<ByteRange, Refusal> {
    let len = chain::total_len(data);
    let limit = seg_max(rules.queue_size);
    if data.len() as u64 > u64::from(limit) || len > u64::from(limit) * u64::from(SIZE_MAX) {
        return Err(Refusal::Invalid);
    }
    range(sector, len, rules)
}

fn range(sector: u64, len: u64, rules: &Rules<'_>) -> Result<ByteRange, Refusal> {
    let range = sector
        .checked_mul(SECTOR)
        .and_then(|offset| ByteRange::new(offset, len))
        .ok_or(Refusal::Invalid)?;
    rules.geometry.check(range).map_err(|_| Refusal::Invalid)?;
    Ok(range)
}

/// The ranges of a discard or write-zeroes request, and the flags of them all; an unmap of some alone is no unmap,
/// which is allowed.
fn ranges(
    memory: &GuestMemory,
    data: &[Segment],
    rules: &Rules<'_>,
    max_sectors: u32,
    known_flags: u32,
) -> Result<(Vec<ByteRange>, u32), Refusal> {
    let len = chain::total_len(data);
    let count = len / u64::from(RANGE_LEN);
    if count == 0 || !len.is_multiple_of(RANGE_LEN.into()) || count > MAX_RANGES.into() {
        return Err(Refusal::Invalid);
    }
    let mut segments = vec![RangeSegment::new_zeroed(); count as usize];
    chain::read(memory, data, segments.as_mut_bytes())?;
    let mut flags = known_flags;
    let mut ranges = Vec::with_capacity(segments.len());
    for segment in segments {
        if segment.flags.get() & !known_flags != 0 {
            return Err(Refusal::Unsupported);
        }
        if segment.num_sectors.get() > max_sectors {
            return Err(Refusal::Invalid);
        }
        flags &= segment.flags.get();
        let len = u64::from(segment.num_sectors.get()) * SECTOR;
        ranges.push(range(segment.sector.get(), len, rules)?);
    }
    Ok((ranges, flags))
}
