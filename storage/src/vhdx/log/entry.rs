//! One entry of the log ([MS-VHDX] 2.3.1).

use zerocopy::{FromBytes, IntoBytes};

use crate::vhdx::format::{
    DATA_SIGNATURE, DESCRIPTOR_SIGNATURE, Guid, LOG_ENTRY_SIGNATURE, LOG_SECTOR, RawDataSector,
    RawDescriptor, RawLogEntry, ZERO_SIGNATURE, checksum,
};
use crate::vhdx::region::Region;

const SECTOR: usize = LOG_SECTOR as usize;

/// Sectors at the start of an entry that hold its header and `descriptors` descriptors.
pub(super) fn descriptor_sectors(descriptors: u64) -> u64 {
    (size_of::<RawLogEntry>() as u64 + descriptors * size_of::<RawDescriptor>() as u64)
        .div_ceil(LOG_SECTOR)
}

/// Bytes of an entry with this many data descriptors.
pub(super) fn length(descriptors: u64) -> u64 {
    (descriptor_sectors(descriptors) + descriptors) * LOG_SECTOR
}

/// What an entry says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    /// Where it starts, in bytes from the start of the log.
    pub position: u64,
    /// Its length in bytes.
    pub length: u64,
    /// Where the oldest entry starts that still has to be replayed with this one.
    pub tail: u64,
    pub sequence: u64,
    pub descriptors: u64,
    pub flushed_file_offset: u64,
    pub last_file_offset: u64,
}

/// Reads bytes of the ring: fills a buffer from a position, which wraps around.
pub(super) struct Ring<'a> {
    /// Fills a buffer from a file offset.
    pub read: &'a dyn Fn(&mut [u8], u64) -> std::io::Result<()>,
    /// Where the log lies.
    pub log: Region,
}

impl Ring<'_> {
    /// The file offset of a position in the ring.
    pub(super) fn file_offset(&self, position: u64) -> u64 {
        self.log.offset + position % self.log.length
    }

    /// Reads the sector at a position.
    pub(super) fn sector(&self, position: u64) -> std::io::Result<[u8; SECTOR]> {
        let mut sector = [0; SECTOR];
        (self.read)(&mut sector, self.file_offset(position))?;
        Ok(sector)
    }

    /// The valid entry of the log `guid` that starts at a position, if there is one.
    ///
    /// Stops at the first sector that does not belong to it, so that looking at every position of a
    /// hostile log stays linear in its length.
    pub(super) fn entry(&self, position: u64, guid: Guid) -> std::io::Result<Option<Entry>> {
        let first = self.sector(position)?;
        let Ok((head, _)) = RawLogEntry::read_from_prefix(&first) else {
            return Ok(None);
        };
        let entry = Entry {
            position,
            length: head.entry_length.get().into(),
            tail: head.tail.get().into(),
            sequence: head.sequence.get(),
            descriptors: head.descriptor_count.get().into(),
            flushed_file_offset: head.flushed_file_offset.get(),
            last_file_offset: head.last_file_offset.get(),
        };
        let plausible = head.signature == *LOG_ENTRY_SIGNATURE
            && head.log_guid == guid
            && entry.length != 0
            && entry.length.is_multiple_of(LOG_SECTOR)
            && entry.length <= self.log.length
            && entry.tail.is_multiple_of(LOG_SECTOR)
            && entry.tail < self.log.length
            && entry.sequence != 0
            && descriptor_sectors(entry.descriptors) * LOG_SECTOR <= entry.length;
        if !plausible {
            return Ok(None);
        }
        let mut sum = None;
        let mut left = entry.descriptors;
        let mut data_left = 0;
        for number in 0..entry.length / LOG_SECTOR {
            let sector = if number == 0 {
                first
            } else {
                self.sector(position + number * LOG_SECTOR)?
            };
            if number < descriptor_sectors(entry.descriptors) {
                for descriptor in descriptors_of(&sector, number, &mut left) {
                    if descriptor.sequence.get() != entry.sequence {
                        return Ok(None);
                    }
                    match &descriptor.signature {
                        DESCRIPTOR_SIGNATURE => data_left += 1,
                        ZERO_SIGNATURE => {}
                        _ => return Ok(None),
                    }
                }
            } else {
                let Ok(data) = RawDataSector::ref_from_bytes(&sector) else {
                    return Ok(None);
                };
                let sequence =
                    u64::from(data.sequence_high.get()) << 32 | u64::from(data.sequence_low.get());
                if data.signature != *DATA_SIGNATURE || sequence != entry.sequence || data_left == 0
                {
                    return Ok(None);
                }
                data_left -= 1;
            }
            sum = Some(match sum {
                None => checksum(&sector),
                Some(before) => crc32c::crc32c_append(before, &sector),
            });
        }
        Ok((data_left == 0 && sum == Some(head.checksum.get())).then_some(entry))
    }

    /// The descriptors of an entry that was found valid.
    pub(super) fn descriptors(&self, entry: &Entry) -> std::io::Result<Vec<RawDescriptor>> {
        let mut all = Vec::new();
        let mut left = entry.descriptors;
        for number in 0..descriptor_sectors(entry.descriptors) {
            all.extend(descriptors_of(
                &self.sector(entry.position + number * LOG_SECTOR)?,
                number,
                &mut left,
            ));
        }
        Ok(all)
    }
}

/// The descriptors in an entry's sector of this number, of which `left` are still to come.
fn descriptors_of(sector: &[u8; SECTOR], number: u64, left: &mut u64) -> Vec<RawDescriptor> {
    let skipped = if number == 0 {
        size_of::<RawLogEntry>()
    } else {
        0
    };
    let found: Vec<RawDescriptor> = sector[skipped..]
        .chunks_exact(size_of::<RawDescriptor>())
        .take(usize::try_from(*left).unwrap_or(usize::MAX))
        .filter_map(|bytes| RawDescriptor::read_from_bytes(bytes).ok())
        .collect();
    *left -= found.len() as u64;
    found
}

/// A sector that an entry is to describe.
pub(super) struct Sector<'a> {
    /// Where it goes, a multiple of 4 KiB.
    pub file_offset: u64,
    /// What it will hold.
    pub bytes: &'a [u8; SECTOR],
}

/// The entry as it lies on disk. Position, length and number of descriptors of `entry` follow from `sectors`.
pub(super) fn encode(entry: &Entry, guid: Guid, sectors: &[Sector<'_>]) -> Vec<u8> {
    let head = RawLogEntry {
        signature: *LOG_ENTRY_SIGNATURE,
        checksum: 0.into(),
        entry_length: (entry.length as u32).into(),
        tail: (entry.tail as u32).into(),
        sequence: entry.sequence.into(),
        descriptor_count: (entry.descriptors as u32).into(),
        reserved: 0.into(),
        log_guid: guid,
        flushed_file_offset: entry.flushed_file_offset.into(),
        last_file_offset: entry.last_file_offset.into(),
    };
    let mut bytes = Vec::with_capacity(entry.length as usize);
    bytes.extend_from_slice(head.as_bytes());
    for sector in sectors {
        let mut descriptor = RawDescriptor {
            signature: *DESCRIPTOR_SIGNATURE,
            trailing: [0; 4],
            leading: [0; 8],
            file_offset: sector.file_offset.into(),
            sequence: entry.sequence.into(),
        };
        descriptor.leading.copy_from_slice(&sector.bytes[..8]);
        descriptor
            .trailing
            .copy_from_slice(&sector.bytes[SECTOR - 4..]);
        bytes.extend_from_slice(descriptor.as_bytes());
    }
    bytes.resize(
        (descriptor_sectors(entry.descriptors) * LOG_SECTOR) as usize,
        0,
    );
    for sector in sectors {
        bytes.extend_from_slice(DATA_SIGNATURE);
        bytes.extend_from_slice(&((entry.sequence >> 32) as u32).to_le_bytes());
        bytes.extend_from_slice(&sector.bytes[8..SECTOR - 4]);
        bytes.extend_from_slice(&(entry.sequence as u32).to_le_bytes());
    }
    let sum = checksum(&bytes).to_le_bytes();
    bytes[4..8].copy_from_slice(&sum);
    bytes
}
