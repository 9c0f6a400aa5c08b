//! The metadata region: a table, and the items it names ([MS-VHDX] 2.6).

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, IntoBytes};

use super::format::{
    BLOCK_SIZES, FILE_PARAMETERS, Guid, HAS_PARENT, IS_REQUIRED, IS_USER, IS_VIRTUAL_DISK,
    LEAVE_BLOCKS_ALLOCATED, LOGICAL_SECTOR_SIZE, MAX_DISK, MAX_METADATA_ITEM, MAX_TABLE_ENTRIES,
    MAX_USER_METADATA, METADATA_SIGNATURE, METADATA_TABLE_LEN, PARENT_LOCATOR,
    PHYSICAL_SECTOR_SIZE, RawFileParameters, RawMetadataEntry, RawMetadataTable, VIRTUAL_DISK_ID,
    VIRTUAL_DISK_SIZE,
};
use super::locator::ParentLocator;
use super::region::Region;
use crate::disk::SectorSize;
use crate::refusal::Refusal;

/// What the metadata says of the disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Metadata {
    /// Bytes of a payload block, a power of two.
    pub block_size: u32,
    /// Whether blocks are to stay allocated (2.6.2.1).
    pub fixed: bool,
    /// Bytes of the virtual disk.
    pub size: u64,
    pub id: Guid,
    pub logical_sector: SectorSize,
    pub physical_sector: SectorSize,
    /// The parent that a differencing disk stands on.
    pub parent: Option<ParentLocator>,
}

/// Where an item lies in the file, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ItemAt {
    /// Its first byte.
    pub offset: u64,
    /// Its length.
    pub len: u64,
    /// Its entry of the table.
    pub entry: u64,
}

/// Reads bytes of the file as they are after log replay.
type Read<'a> = &'a dyn Fn(&mut [u8], u64) -> std::io::Result<()>;

impl Metadata {
    /// Reads the table and all items that are known, through `read`.
    pub(super) fn read(read: Read<'_>, region: Region) -> Result<Self, Refusal> {
        let mut table = vec![0; METADATA_TABLE_LEN];
        read(&mut table, region.offset).map_err(|e| Refusal::io("read the metadata table", e))?;
        let items = Items {
            read,
            region,
            entries: entries(&table, region)?,
        };

        let parameters: RawFileParameters = items.get("file parameters", FILE_PARAMETERS)?;
        let block_size = parameters.block_size.get();
        if !BLOCK_SIZES.contains(&block_size.into()) || !block_size.is_power_of_two() {
            return Err(items.corrupt(
                "file parameters",
                FILE_PARAMETERS,
                format!("expected a block size that is a power of two from 1 to 256 MiB, found {block_size:#x}"),
            ));
        }
        let flags = parameters.flags.get();
        let parent =
            if flags & HAS_PARENT == 0 {
                None
            } else {
                let item = items.bytes("parent locator", PARENT_LOCATOR)?;
                Some(ParentLocator::parse(&item).map_err(|expected| {
                    items.corrupt("parent locator", PARENT_LOCATOR, expected)
                })?)
            };
        if parent.is_some() && flags & LEAVE_BLOCKS_ALLOCATED != 0 {
            return Err(items.corrupt(
                "file parameters",
                FILE_PARAMETERS,
                "expected a disk that is fixed or has a parent, found one that is both".into(),
            ));
        }
        let logical_sector = items.sector_size("logical sector size", LOGICAL_SECTOR_SIZE)?;
        let physical_sector = items.sector_size("physical sector size", PHYSICAL_SECTOR_SIZE)?;
        let size = items
            .get::<U64>("virtual disk size", VIRTUAL_DISK_SIZE)?
            .get();
        if size == 0 || size > MAX_DISK || !size.is_multiple_of(logical_sector.bytes().into()) {
            return Err(items.corrupt(
                "virtual disk size",
                VIRTUAL_DISK_SIZE,
                format!(
                    "expected whole sectors of {} bytes, up to 64 TiB, found {size:#x}",
                    logical_sector.bytes()
                ),
            ));
        }
        Ok(Self {
            block_size,
            fixed: flags & LEAVE_BLOCKS_ALLOCATED != 0,
            size,
            id: items.get("virtual disk identifier", VIRTUAL_DISK_ID)?,
            logical_sector,
            physical_sector,
            parent,
        })
    }

    /// Where a known item lies.
    pub(super) fn find(
        read: Read<'_>,
        region: Region,
        id: Guid,
    ) -> Result<Option<ItemAt>, Refusal> {
        let mut table = vec![0; METADATA_TABLE_LEN];
        read(&mut table, region.offset).map_err(|e| Refusal::io("read the metadata table", e))?;
        let entries = entries(&table, region)?;
        let place = |(index, entry): (usize, &RawMetadataEntry)| ItemAt {
            offset: region.offset + u64::from(entry.offset.get()),
            len: entry.length.get().into(),
            entry: region.offset
                + (size_of::<RawMetadataTable>() + index * size_of::<RawMetadataEntry>()) as u64,
        };
        Ok(entries
            .iter()
            .enumerate()
            .find(|(_, entry)| entry.id == id && entry.flags.get() & IS_USER == 0)
            .map(place))
    }

    /// A place of `len` bytes in the region that no item other than `id` has, as an offset from the region's start.
    pub(super) fn room(
        read: Read<'_>,
        region: Region,
        id: Guid,
        len: u64,
    ) -> Result<Option<u32>, Refusal> {
        let mut table = vec![0; METADATA_TABLE_LEN];
        read(&mut table, region.offset).map_err(|e| Refusal::io("read the metadata table", e))?;
        let mut taken: Vec<(u64, u64)> = entries(&table, region)?
            .iter()
            .filter(|entry| entry.id != id || entry.flags.get() & IS_USER != 0)
            .map(|entry| (entry.offset.get().into(), entry.length.get().into()))
            .collect();
        taken.sort_unstable();
        let mut at = METADATA_TABLE_LEN as u64;
        for (offset, length) in taken {
            if length > 0 && offset < at + len {
                at = at.max(offset + length);
            }
        }
        Ok(u32::try_from(at)
            .ok()
            .filter(|at| u64::from(*at) + len <= region.length))
    }

    /// The region's table and items as they lie on disk, from its first byte.
    pub(super) fn to_disk(&self) -> Vec<u8> {
        let parameters = RawFileParameters {
            block_size: self.block_size.into(),
            flags: match (self.fixed, &self.parent) {
                (true, _) => LEAVE_BLOCKS_ALLOCATED,
                (false, Some(_)) => HAS_PARENT,
                (false, None) => 0,
            }
            .into(),
        };
        let locator = self.parent.as_ref().map(ParentLocator::to_disk);
        let size = U64::new(self.size);
        let (logical, physical) = (
            U32::new(self.logical_sector.bytes()),
            U32::new(self.physical_sector.bytes()),
        );
        let disk = IS_REQUIRED | IS_VIRTUAL_DISK;
        let mut items: Vec<(Guid, u32, &[u8])> = vec![
            (FILE_PARAMETERS, IS_REQUIRED, parameters.as_bytes()),
            (VIRTUAL_DISK_SIZE, disk, size.as_bytes()),
            (VIRTUAL_DISK_ID, disk, self.id.as_bytes()),
            (LOGICAL_SECTOR_SIZE, disk, logical.as_bytes()),
            (PHYSICAL_SECTOR_SIZE, disk, physical.as_bytes()),
        ];
        if let Some(locator) = &locator {
            items.push((PARENT_LOCATOR, IS_REQUIRED, locator));
        }
        let head = RawMetadataTable {
            signature: *METADATA_SIGNATURE,
            reserved: 0.into(),
            entry_count: (items.len() as u16).into(),
            reserved2: [0; 20],
        };
        let mut table = head.as_bytes().to_vec();
        let mut values = Vec::new();
        for (id, flags, value) in items {
            let entry = RawMetadataEntry {
                id,
                offset: ((METADATA_TABLE_LEN + values.len()) as u32).into(),
                length: (value.len() as u32).into(),
                flags: flags.into(),
                reserved: 0.into(),
            };
            table.extend_from_slice(entry.as_bytes());
            values.extend_from_slice(value);
        }
        table.resize(METADATA_TABLE_LEN, 0);
        table.extend_from_slice(&values);
        table
    }
}

struct Items<'a> {
    read: Read<'a>,
    region: Region,
    entries: Vec<RawMetadataEntry>,
}

impl Items<'_> {
    fn find(&self, id: Guid) -> Option<&RawMetadataEntry> {
        self.entries
            .iter()
            .find(|entry| entry.id == id && entry.flags.get() & IS_USER == 0)
    }

    fn corrupt(&self, name: &str, id: Guid, expected: String) -> Refusal {
        let inside = self.find(id).map_or(0, |entry| entry.offset.get().into());
        Refusal::corrupt(
            format!("metadata item \"{name}\""),
            self.region.offset + inside,
            expected,
        )
    }

    fn get<T: FromBytes + IntoBytes>(&self, name: &str, id: Guid) -> Result<T, Refusal> {
        let entry = self
            .find(id)
            .ok_or_else(|| self.corrupt(name, id, "expected this item, found none".into()))?;
        let length = entry.length.get() as usize;
        if length != size_of::<T>() {
            return Err(self.corrupt(
                name,
                id,
                format!("expected {} bytes, found {length}", size_of::<T>()),
            ));
        }
        let mut value = T::new_zeroed();
        (self.read)(
            value.as_mut_bytes(),
            self.region.offset + u64::from(entry.offset.get()),
        )
        .map_err(|e| Refusal::io(format!("read the metadata item \"{name}\""), e))?;
        Ok(value)
    }

    fn bytes(&self, name: &str, id: Guid) -> Result<Vec<u8>, Refusal> {
        let entry = self
            .find(id)
            .ok_or_else(|| self.corrupt(name, id, "expected this item, found none".into()))?;
        // At most 1 MiB, see `entries`.
        let mut value = vec![0; entry.length.get() as usize];
        (self.read)(
            &mut value,
            self.region.offset + u64::from(entry.offset.get()),
        )
        .map_err(|e| Refusal::io(format!("read the metadata item \"{name}\""), e))?;
        Ok(value)
    }

    fn sector_size(&self, name: &str, id: Guid) -> Result<SectorSize, Refusal> {
        match self.get::<U32>(name, id)?.get() {
            512 => Ok(SectorSize::B512),
            4096 => Ok(SectorSize::B4096),
            other => Err(self.corrupt(name, id, format!("expected 512 or 4096, found {other}"))),
        }
    }
}

fn entries(table: &[u8], region: Region) -> Result<Vec<RawMetadataEntry>, Refusal> {
    let corrupt = |expected: String| Refusal::corrupt("metadata table", region.offset, expected);
    let (head, rest) = RawMetadataTable::read_from_prefix(table)
        .map_err(|_| corrupt("expected a table of 64 KiB".into()))?;
    if head.signature != *METADATA_SIGNATURE {
        return Err(corrupt(format!(
            "expected \"metadata\", found \"{}\"",
            head.signature.escape_ascii()
        )));
    }
    let count = usize::from(head.entry_count.get());
    if count > MAX_TABLE_ENTRIES {
        return Err(corrupt(format!(
            "expected at most {MAX_TABLE_ENTRIES} entries, found {count}"
        )));
    }
    let entries = <[RawMetadataEntry]>::ref_from_prefix_with_elems(rest, count)
        .map_err(|_| corrupt(format!("expected {count} entries to fit the table")))?
        .0;
    let mut seen = std::collections::HashSet::new();
    let mut ranges = Vec::with_capacity(count);
    for (index, entry) in entries.iter().enumerate() {
        let (offset, length, flags) = (
            u64::from(entry.offset.get()),
            u64::from(entry.length.get()),
            entry.flags.get(),
        );
        let found = format!(
            "found {offset:#x}+{length:#x} in entry {index} ({})",
            entry.id
        );
        if !seen.insert((entry.id, flags & IS_USER)) {
            return Err(corrupt(format!("expected each item once; {found} again")));
        }
        if length > MAX_METADATA_ITEM {
            return Err(corrupt(format!("expected items of at most 1 MiB; {found}")));
        }
        if length != 0 {
            if offset < METADATA_TABLE_LEN as u64 || offset + length > region.length {
                return Err(corrupt(format!(
                    "expected items after the table, inside the region; {found}"
                )));
            }
            ranges.push((offset, length));
        }
        let known = flags & IS_USER == 0
            && [
                FILE_PARAMETERS,
                VIRTUAL_DISK_SIZE,
                VIRTUAL_DISK_ID,
                LOGICAL_SECTOR_SIZE,
                PHYSICAL_SECTOR_SIZE,
                PARENT_LOCATOR,
            ]
            .contains(&entry.id);
        if flags & IS_REQUIRED != 0 && !known {
            return Err(Refusal::Unsupported(format!(
                "metadata table at file offset {:#x} requires the item {}, which is not known",
                region.offset, entry.id
            )));
        }
    }
    let users = entries
        .iter()
        .filter(|entry| entry.flags.get() & IS_USER != 0)
        .count();
    if users > MAX_USER_METADATA {
        return Err(corrupt(format!(
            "expected at most {MAX_USER_METADATA} user items, found {users}"
        )));
    }
    ranges.sort_unstable();
    if ranges
        .windows(2)
        .any(|pair| pair[0].0 + pair[0].1 > pair[1].0)
    {
        return Err(corrupt(
            "expected items not to overlap, found two that do".into(),
        ));
    }
    Ok(entries.to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vhdx::format::MIB;

    const REGION: Region = Region {
        offset: 0,
        length: MIB,
    };

    fn metadata() -> Metadata {
        Metadata {
            block_size: 2 << 20,
            fixed: false,
            size: 10 << 30,
            id: Guid::random(),
            logical_sector: SectorSize::B512,
            physical_sector: SectorSize::B4096,
            parent: None,
        }
    }

    fn parsed(bytes: &[u8]) -> Result<Metadata, Refusal> {
        let read = |buffer: &mut [u8], offset: u64| {
            buffer.copy_from_slice(&bytes[offset as usize..][..buffer.len()]);
            Ok(())
        };
        Metadata::read(&read, REGION)
    }

    #[test]
    fn metadata_is_read_as_it_was_written() {
        let metadata = metadata();
        assert_eq!(parsed(&metadata.to_disk()).unwrap(), metadata);
    }

    #[test]
    fn values_outside_the_specification_are_refused_by_name() {
        let cases: [(&str, Metadata); 6] = [
            (
                "file parameters",
                Metadata {
                    block_size: 3 << 20,
                    ..metadata()
                },
            ),
            (
                "file parameters",
                Metadata {
                    block_size: 512 << 20,
                    ..metadata()
                },
            ),
            (
                "file parameters",
                Metadata {
                    block_size: 0,
                    ..metadata()
                },
            ),
            (
                "virtual disk size",
                Metadata {
                    size: 0,
                    ..metadata()
                },
            ),
            (
                "virtual disk size",
                Metadata {
                    size: MAX_DISK + 512,
                    ..metadata()
                },
            ),
            (
                "virtual disk size",
                Metadata {
                    size: 513,
                    ..metadata()
                },
            ),
        ];
        for (name, metadata) in cases {
            let error = parsed(&metadata.to_disk()).unwrap_err();
            assert!(
                matches!(&error, Refusal::Corrupt { structure, .. } if structure.contains(name)),
                "{error}"
            );
        }
    }

    #[test]
    fn a_locator_is_demanded_of_a_file_with_a_parent_and_a_fixed_one_has_none() {
        let child = Metadata {
            parent: Some(ParentLocator::new(
                Guid::random(),
                "/a".as_ref(),
                "/a/b".as_ref(),
            )),
            ..metadata()
        };
        assert_eq!(parsed(&child.to_disk()).unwrap(), child);

        // The flags of the file parameters, the first item.
        let flags = METADATA_TABLE_LEN + 4;
        let mut orphan = metadata().to_disk();
        orphan[flags] |= HAS_PARENT as u8;
        let error = parsed(&orphan).unwrap_err().to_string();
        assert!(error.contains("parent locator"), "{error}");

        let mut both = child.to_disk();
        both[flags] |= LEAVE_BLOCKS_ALLOCATED as u8;
        let error = parsed(&both).unwrap_err().to_string();
        assert!(error.contains("fixed or has a parent"), "{error}");
    }

    #[test]
    fn an_item_is_found_and_room_for_a_longer_one_too() {
        let bytes = metadata().to_disk();
        let read = |buffer: &mut [u8], offset: u64| {
            buffer.copy_from_slice(&bytes[offset as usize..][..buffer.len()]);
            Ok(())
        };
        let size = Metadata::find(&read, REGION, VIRTUAL_DISK_SIZE)
            .unwrap()
            .unwrap();
        assert_eq!(size.len, 8);
        assert_eq!(
            bytes[size.offset as usize..][..8],
            metadata().size.to_le_bytes()
        );
        assert_eq!(
            bytes[size.entry as usize..][..16],
            *VIRTUAL_DISK_SIZE.as_bytes()
        );
        let room = Metadata::room(&read, REGION, PARENT_LOCATOR, 5000).unwrap();
        assert_eq!(room, Some(bytes.len() as u32));
        // Its own old place counts as free.
        let same = Metadata::room(&read, REGION, FILE_PARAMETERS, 8).unwrap();
        assert_eq!(same, Some(METADATA_TABLE_LEN as u32));
        assert_eq!(
            Metadata::room(&read, REGION, PARENT_LOCATOR, MIB).unwrap(),
            None
        );
    }

    #[test]
    fn a_required_item_that_nobody_knows_and_doubled_or_overlapping_items_are_refused() {
        let entry = |index: usize| 32 + 32 * index;
        let mut unknown = metadata().to_disk();
        unknown[entry(4)] ^= 1;
        assert!(matches!(parsed(&unknown), Err(Refusal::Unsupported(_))));

        let mut doubled = metadata().to_disk();
        doubled.copy_within(entry(3)..entry(3) + 16, entry(4));
        assert!(
            parsed(&doubled)
                .unwrap_err()
                .to_string()
                .contains("each item once")
        );

        let mut overlapping = metadata().to_disk();
        overlapping.copy_within(entry(3) + 16..entry(3) + 20, entry(4) + 16);
        assert!(
            parsed(&overlapping)
                .unwrap_err()
                .to_string()
                .contains("not to overlap")
        );

        let mut outside = metadata().to_disk();
        outside[entry(2) + 16..entry(2) + 20].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(
            parsed(&outside)
                .unwrap_err()
                .to_string()
                .contains("inside the region")
        );
    }
}
