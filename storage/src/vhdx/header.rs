//! The file identifier and the pair of headers ([MS-VHDX] 2.2.1, 2.2.2).
//!
//! The current header is the valid one with the higher sequence number. An update writes the other one, so that a
//! cut in between leaves a valid header; a second update then brings both up to date, so that losing
//! one of them later does not bring an old log identifier back.

use zerocopy::{FromZeros, IntoBytes};

use super::format::{
    Guid, HEADER_OFFSETS, HEADER_SIGNATURE, HEADER_VERSION, LOG_VERSION, MAX_LOG, MIB, RawHeader,
    SIGNATURE, checksum,
};
use crate::disk::DiskError;
use crate::medium::Medium;
use crate::refusal::Refusal;

/// Checks the first bytes of the file.
pub(super) fn check_identifier(medium: &dyn Medium) -> Result<(), Refusal> {
    let mut found = [0; SIGNATURE.len()];
    medium
        .read_exact_at(&mut found, 0)
        .map_err(|e| Refusal::io("read the file identifier", e))?;
    if &found != SIGNATURE {
        return Err(Refusal::corrupt(
            "file identifier",
            0,
            format!("expected \"vhdxfile\", found \"{}\"", found.escape_ascii()),
        ));
    }
    Ok(())
}

/// What a header says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub sequence: u64,
    pub file_write_guid: Guid,
    pub data_write_guid: Guid,
    pub log_guid: Guid,
    pub log_offset: u64,
    pub log_length: u64,
}

impl Header {
    /// The header as it lies on disk.
    pub(super) fn to_disk(self) -> RawHeader {
        let mut raw = RawHeader::new_zeroed();
        raw.signature = *HEADER_SIGNATURE;
        raw.sequence = self.sequence.into();
        raw.file_write_guid = self.file_write_guid;
        raw.data_write_guid = self.data_write_guid;
        raw.log_guid = self.log_guid;
        raw.log_version = LOG_VERSION.into();
        raw.version = HEADER_VERSION.into();
        raw.log_length = (self.log_length as u32).into();
        raw.log_offset = self.log_offset.into();
        raw.checksum = checksum(raw.as_bytes()).into();
        raw
    }

    fn parse(raw: &RawHeader, offset: u64, file_len: u64) -> Result<Self, Refusal> {
        if raw.version.get() != HEADER_VERSION {
            return Err(Refusal::Unsupported(format!(
                "header at file offset {offset:#x} has version {}; only version {HEADER_VERSION} is supported",
                raw.version
            )));
        }
        let log_guid = raw.log_guid;
        if log_guid != Guid::ZERO && raw.log_version.get() != LOG_VERSION {
            return Err(Refusal::Unsupported(format!(
                "header at file offset {offset:#x} has log version {}; only version {LOG_VERSION} is supported",
                raw.log_version
            )));
        }
        let (log_offset, log_length) = (raw.log_offset.get(), u64::from(raw.log_length.get()));
        let end = log_offset.checked_add(log_length);
        if log_offset < MIB
            || log_offset % MIB != 0
            || log_length % MIB != 0
            || !(MIB..=MAX_LOG).contains(&log_length)
        {
            return Err(Refusal::corrupt(
                "header",
                offset,
                format!(
                    "expected a log of 1 MiB to 1 GiB, in whole MiB, after the first MiB; found {log_offset:#x}+{log_length:#x}"
                ),
            ));
        }
        if end.is_none_or(|end| end > file_len) {
            return Err(Refusal::corrupt(
                "header",
                offset,
                format!(
                    "expected a log inside the file of {file_len:#x} bytes; found {log_offset:#x}+{log_length:#x}"
                ),
            ));
        }
        Ok(Self {
            sequence: raw.sequence.get(),
            file_write_guid: raw.file_write_guid,
            data_write_guid: raw.data_write_guid,
            log_guid,
            log_offset,
            log_length,
        })
    }
}

/// The pair of headers of an open file.
#[derive(Debug)]
pub(super) struct Headers {
    current: Header,
    /// Which of the two is current.
    slot: usize,
}

impl Headers {
    /// Reads both and picks the current one.
    pub(super) fn read(medium: &dyn Medium, file_len: u64) -> Result<Self, Refusal> {
        let mut valid = Vec::with_capacity(2);
        for (slot, offset) in HEADER_OFFSETS.into_iter().enumerate() {
            let mut raw = RawHeader::new_zeroed();
            match medium.read_exact_at(raw.as_mut_bytes(), offset) {
                Ok(()) => {}
                Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => continue,
                Err(e) => return Err(Refusal::io(format!("read the header at {offset:#x}"), e)),
            }
            if raw.signature == *HEADER_SIGNATURE && raw.checksum.get() == checksum(raw.as_bytes())
            {
                valid.push((slot, offset, raw));
            }
        }
        let chosen = match valid.as_slice() {
            [] => {
                return Err(Refusal::corrupt(
                    "header pair",
                    HEADER_OFFSETS[0],
                    "expected at least one header with signature \"head\" and a matching checksum, found none",
                ));
            }
            [only] => only,
            [first, second, ..] => match first.2.sequence.get().cmp(&second.2.sequence.get()) {
                std::cmp::Ordering::Less => second,
                std::cmp::Ordering::Greater => first,
                std::cmp::Ordering::Equal if first.2.as_bytes() == second.2.as_bytes() => first,
                std::cmp::Ordering::Equal => {
                    return Err(Refusal::corrupt(
                        "header pair",
                        HEADER_OFFSETS[0],
                        format!(
                            "expected two sequence numbers, found {} in two headers that differ",
                            first.2.sequence
                        ),
                    ));
                }
            },
        };
        Ok(Self {
            current: Header::parse(&chosen.2, chosen.1, file_len)?,
            slot: chosen.0,
        })
    }

    /// Which of the two headers are no valid ones of the file.
    pub(super) fn damaged(medium: &dyn Medium) -> Vec<u64> {
        HEADER_OFFSETS
            .into_iter()
            .filter(|offset| {
                let mut raw = RawHeader::new_zeroed();
                medium.read_exact_at(raw.as_mut_bytes(), *offset).is_err()
                    || raw.signature != *HEADER_SIGNATURE
                    || raw.checksum.get() != checksum(raw.as_bytes())
            })
            .collect()
    }

    /// What the current header says.
    pub(super) fn current(&self) -> &Header {
        &self.current
    }

    /// Refuses a file whose sequence number has no room for the updates that writing it takes.
    pub(super) fn check_room(&self) -> Result<(), Refusal> {
        if self.current.sequence > u64::MAX / 2 {
            return Err(Refusal::corrupt(
                "header",
                HEADER_OFFSETS[self.slot],
                format!(
                    "expected a sequence number that can still grow, found {:#x}",
                    self.current.sequence
                ),
            ));
        }
        Ok(())
    }

    /// Writes a changed header over the one that is not current, and makes it durable and current.
    pub(super) fn update(
        &mut self,
        medium: &dyn Medium,
        change: impl FnOnce(&mut Header),
    ) -> Result<(), DiskError> {
        let slot = 1 - self.slot;
        let offset = HEADER_OFFSETS[slot];
        let mut next = self.current;
        change(&mut next);
        next.sequence = self
            .current
            .sequence
            .checked_add(1)
            .ok_or_else(|| DiskError::Corrupt {
                structure: "header".into(),
                offset: HEADER_OFFSETS[self.slot],
                expected: "expected a sequence number that can still grow, found the highest one"
                    .into(),
            })?;
        medium
            .write_all_at(next.to_disk().as_bytes(), offset)
            .and_then(|()| medium.sync_data())
            .map_err(|source| DiskError::Io {
                operation: format!("write the header at {offset:#x}"),
                source,
            })?;
        self.current = next;
        self.slot = slot;
        Ok(())
    }
}
