//! The region table, in two copies ([MS-VHDX] 2.2.3).

use zerocopy::{FromBytes, IntoBytes};

use super::format::{
    BAT_REGION, Guid, MAX_BAT, MAX_METADATA, MAX_TABLE_ENTRIES, METADATA_REGION, MIB,
    REGION_SIGNATURE, REGION_TABLE_LEN, REGION_TABLE_OFFSETS, RawRegion, RawRegionTable, checksum,
};
use crate::medium::Medium;
use crate::refusal::Refusal;

/// A part of the file, in whole MiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Region {
    pub offset: u64,
    pub length: u64,
}

impl Region {
    /// First byte after it. Checked not to overflow when the region was read.
    pub(super) fn end(self) -> u64 {
        self.offset + self.length
    }

    fn overlaps(self, other: Self) -> bool {
        self.offset < other.end() && other.offset < self.end()
    }
}

/// The regions of a file.
#[derive(Debug)]
pub(super) struct Regions {
    pub bat: Region,
    pub metadata: Region,
    /// All of them, the log included: what payload must not touch.
    pub all: Vec<Region>,
    /// The copy of the table that has to be written anew from the other before the file is used for writing.
    pub damaged_copy: Option<usize>,
}

impl Regions {
    /// Reads the first intact copy, through `read`, which fills a buffer from an offset.
    pub(super) fn read(
        read: &dyn Fn(&mut [u8], u64) -> std::io::Result<()>,
        log: Region,
        file_len: u64,
    ) -> Result<Self, Refusal> {
        let mut table = vec![0; REGION_TABLE_LEN];
        let mut intact = [false; 2];
        // The first copy is read last, so that it is the one in the buffer where both are intact.
        for copy in [1, 0] {
            let mut candidate = vec![0; REGION_TABLE_LEN];
            match read(&mut candidate, REGION_TABLE_OFFSETS[copy]) {
                Ok(()) => {}
                Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => continue,
                Err(e) => return Err(Refusal::io(format!("read region table {}", copy + 1), e)),
            }
            if is_intact(&candidate) {
                intact[copy] = true;
                table = candidate;
            }
        }
        let copy = match intact {
            [true, _] => 0,
            [false, true] => 1,
            [false, false] => {
                return Err(Refusal::corrupt(
                    "region table",
                    REGION_TABLE_OFFSETS[0],
                    "expected at least one copy with signature \"regi\" and a matching checksum, found none",
                ));
            }
        };
        let mut regions = parse(&table, REGION_TABLE_OFFSETS[copy], log, file_len)?;
        regions.damaged_copy = intact.iter().position(|intact| !intact);
        Ok(regions)
    }
}

/// Writes the intact copy of the table over the damaged one.
pub(super) fn repair(medium: &dyn Medium, damaged: usize) -> std::io::Result<()> {
    let mut table = vec![0; REGION_TABLE_LEN];
    medium.read_exact_at(&mut table, REGION_TABLE_OFFSETS[1 - damaged])?;
    medium.write_all_at(&table, REGION_TABLE_OFFSETS[damaged])
}

/// Both copies of the table as they are to be once the BAT lies at another place: where they go, and their bytes.
pub(super) fn moved(
    medium: &dyn Medium,
    from: Region,
    to: Region,
) -> Result<[(u64, Vec<u8>); 2], Refusal> {
    let mut table = vec![0; REGION_TABLE_LEN];
    medium
        .read_exact_at(&mut table, REGION_TABLE_OFFSETS[0])
        .map_err(|e| Refusal::io("read region table 1", e))?;
    let corrupt = |expected: &str| {
        Refusal::corrupt("region table", REGION_TABLE_OFFSETS[0], expected.to_owned())
    };
    if !is_intact(&table) {
        return Err(corrupt("expected a matching checksum"));
    }
    let head = size_of::<RawRegionTable>();
    let entry = table[head..]
        .chunks_exact_mut(size_of::<RawRegion>())
        .find_map(|bytes| {
            RawRegion::mut_from_bytes(bytes)
                .ok()
                .filter(|entry| entry.guid == BAT_REGION && entry.offset.get() == from.offset)
        })
        .ok_or_else(|| corrupt("expected the BAT region where it was when the file was opened"))?;
    entry.offset = to.offset.into();
    entry.length = (to.length as u32).into();
    table[4..8].fill(0);
    let sum = checksum(&table).to_le_bytes();
    table[4..8].copy_from_slice(&sum);
    Ok(REGION_TABLE_OFFSETS.map(|offset| (offset, table.clone())))
}

/// A table that lists the two regions every file has.
pub(super) fn table(bat: Region, metadata: Region) -> Vec<u8> {
    let entry = |guid: Guid, region: Region| RawRegion {
        guid,
        offset: region.offset.into(),
        length: (region.length as u32).into(),
        flags: 1.into(),
    };
    let mut table = vec![0; REGION_TABLE_LEN];
    let head = RawRegionTable {
        signature: *REGION_SIGNATURE,
        checksum: 0.into(),
        entry_count: 2.into(),
        reserved: 0.into(),
    };
    let content = [
        head.as_bytes(),
        entry(BAT_REGION, bat).as_bytes(),
        entry(METADATA_REGION, metadata).as_bytes(),
    ]
    .concat();
    table[..content.len()].copy_from_slice(&content);
    let sum = checksum(&table).to_le_bytes();
    table[4..8].copy_from_slice(&sum);
    table
}

fn is_intact(table: &[u8]) -> bool {
    RawRegionTable::read_from_prefix(table).is_ok_and(|(head, _)| {
        head.signature == *REGION_SIGNATURE && head.checksum.get() == checksum(table)
    })
}

fn parse(table: &[u8], offset: u64, log: Region, file_len: u64) -> Result<Regions, Refusal> {
    let corrupt = |expected: String| Refusal::corrupt("region table", offset, expected);
    let (head, rest) = RawRegionTable::read_from_prefix(table)
        .map_err(|_| corrupt("expected a table of 64 KiB".into()))?;
    let count = head.entry_count.get() as usize;
    if count > MAX_TABLE_ENTRIES {
        return Err(corrupt(format!(
            "expected at most {MAX_TABLE_ENTRIES} entries, found {count}"
        )));
    }
    let entries = <[RawRegion]>::ref_from_prefix_with_elems(rest, count)
        .map_err(|_| corrupt(format!("expected {count} entries to fit the table")))?
        .0;
    let mut all = vec![log];
    let (mut bat, mut metadata) = (None, None);
    for (index, entry) in entries.iter().enumerate() {
        let region = Region {
            offset: entry.offset.get(),
            length: entry.length.get().into(),
        };
        let found = format!(
            "found {:#x}+{:#x} in entry {index} ({})",
            region.offset, region.length, entry.guid
        );
        if region.offset < MIB
            || !region.offset.is_multiple_of(MIB)
            || region.length == 0
            || !region.length.is_multiple_of(MIB)
        {
            return Err(corrupt(format!(
                "expected a region in whole MiB after the first; {found}"
            )));
        }
        if region
            .offset
            .checked_add(region.length)
            .is_none_or(|end| end > file_len)
        {
            return Err(corrupt(format!(
                "expected a region inside the file of {file_len:#x} bytes; {found}"
            )));
        }
        if all.iter().any(|other| other.overlaps(region)) {
            return Err(corrupt(format!(
                "expected regions and log not to overlap; {found}"
            )));
        }
        all.push(region);
        let (place, cap) = match entry.guid {
            BAT_REGION => (&mut bat, MAX_BAT),
            METADATA_REGION => (&mut metadata, MAX_METADATA),
            unknown if entry.flags.get() & 1 != 0 => {
                return Err(Refusal::Unsupported(format!(
                    "region table at file offset {offset:#x} requires the region {unknown}, which is not known"
                )));
            }
            _ => continue,
        };
        if region.length > cap {
            return Err(corrupt(format!(
                "expected a region of at most {cap:#x} bytes; {found}"
            )));
        }
        if place.replace(region).is_some() {
            return Err(corrupt(format!("expected each region once; {found} again")));
        }
    }
    match (bat, metadata) {
        (Some(bat), Some(metadata)) => Ok(Regions {
            bat,
            metadata,
            all,
            damaged_copy: None,
        }),
        (None, _) => Err(corrupt("expected a BAT region, found none".into())),
        (_, None) => Err(corrupt("expected a metadata region, found none".into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOG: Region = Region {
        offset: MIB,
        length: MIB,
    };
    const METADATA: Region = Region {
        offset: 2 * MIB,
        length: MIB,
    };
    const BAT: Region = Region {
        offset: 3 * MIB,
        length: MIB,
    };

    fn parsed(bat: Region, metadata: Region) -> Result<Regions, Refusal> {
        parse(&table(bat, metadata), 0, LOG, 4 * MIB)
    }

    #[test]
    fn a_table_is_read_as_it_was_written() {
        let regions = parsed(BAT, METADATA).unwrap();
        assert_eq!((regions.bat, regions.metadata), (BAT, METADATA));
        assert_eq!(regions.all, [LOG, BAT, METADATA]);
    }

    #[test]
    fn regions_that_overlap_leave_the_file_or_are_off_the_mebibyte_are_refused() {
        let at = |offset, length| Region { offset, length };
        for bat in [
            METADATA,
            LOG,
            at(0, MIB),
            at(4 * MIB, MIB),
            at(3 * MIB, 2 * MIB),
            at(3 * MIB + 4096, MIB),
            at(3 * MIB, 0),
        ] {
            assert!(
                matches!(parsed(bat, METADATA), Err(Refusal::Corrupt { .. })),
                "{bat:?}"
            );
        }
        let far = at(u64::MAX - MIB + 1, MIB);
        assert!(matches!(
            parsed(far, METADATA),
            Err(Refusal::Corrupt { .. })
        ));
    }

    #[test]
    fn an_unknown_region_is_refused_only_where_required() {
        let mut bytes = table(BAT, METADATA);
        // The first byte of the BAT's GUID.
        bytes[16] ^= 1;
        assert!(matches!(
            parse(&bytes, 0, LOG, 4 * MIB),
            Err(Refusal::Unsupported(_))
        ));
        // The flags of the same entry.
        bytes[16 + 28] = 0;
        let error = parse(&bytes, 0, LOG, 4 * MIB).unwrap_err();
        assert!(
            error.to_string().contains("expected a BAT region"),
            "{error}"
        );
    }

    #[test]
    fn more_entries_than_a_table_holds_are_refused() {
        let mut bytes = table(BAT, METADATA);
        bytes[8..12].copy_from_slice(&2048_u32.to_le_bytes());
        assert!(matches!(
            parse(&bytes, 0, LOG, 4 * MIB),
            Err(Refusal::Corrupt { .. })
        ));
    }
}
