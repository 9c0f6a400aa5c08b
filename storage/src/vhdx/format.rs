//! The structures of [MS-VHDX] 8.0 as they lie on disk, little-endian, and the constants of its sections.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

pub use crate::guid::Guid;

/// One kibibyte.
pub(crate) const KIB: u64 = 1 << 10;
/// One mebibyte: what regions, log and payload blocks are aligned to (2.1).
pub(crate) const MIB: u64 = 1 << 20;
/// One tebibyte.
pub(crate) const TIB: u64 = 1 << 40;

/// Unit of the log (2.3.1) and of what it patches, in bytes.
pub(crate) const LOG_SECTOR: u64 = 4 * KIB;

/// First bytes of a file (2.2.1).
pub const SIGNATURE: &[u8; 8] = b"vhdxfile";
/// Where the two headers lie (2.2).
pub(crate) const HEADER_OFFSETS: [u64; 2] = [64 * KIB, 128 * KIB];
/// First bytes of a header (2.2.2).
pub(crate) const HEADER_SIGNATURE: &[u8; 4] = b"head";
/// The version of the format (2.2.2).
pub(crate) const HEADER_VERSION: u16 = 1;
/// The version of the log (2.2.2).
pub(crate) const LOG_VERSION: u16 = 0;
/// Where the two copies of the region table lie (2.2).
pub(crate) const REGION_TABLE_OFFSETS: [u64; 2] = [192 * KIB, 256 * KIB];
/// Length of a region table (2.2.3).
pub(crate) const REGION_TABLE_LEN: usize = 64 * KIB as usize;
/// First bytes of a region table (2.2.3.1).
pub(crate) const REGION_SIGNATURE: &[u8; 4] = b"regi";
/// Most entries of a region table (2.2.3.1) and of the metadata table (2.6.1.1).
pub(crate) const MAX_TABLE_ENTRIES: usize = 2047;
/// Most user entries of the metadata table (2.6.1.2).
pub(crate) const MAX_USER_METADATA: usize = 1024;
/// First bytes of the metadata table (2.6.1.1).
pub(crate) const METADATA_SIGNATURE: &[u8; 8] = b"metadata";
/// Length of the metadata table; items follow it (2.6.1).
pub(crate) const METADATA_TABLE_LEN: usize = 64 * KIB as usize;
/// Most bytes of a metadata item (2.6.1.2).
pub(crate) const MAX_METADATA_ITEM: u64 = MIB;
/// Largest virtual disk (2.6.2.2).
pub(crate) const MAX_DISK: u64 = 64 * TIB;
/// Smallest and largest payload block (2.6.2.1).
pub(crate) const BLOCK_SIZES: std::ops::RangeInclusive<u64> = MIB..=256 * MIB;
/// Sectors that one sector-bitmap block describes; with the sector size it makes a chunk (2.5).
pub(crate) const SECTORS_PER_BITMAP: u64 = 1 << 23;

/// First bytes of a log entry (2.3.1.1).
pub(crate) const LOG_ENTRY_SIGNATURE: &[u8; 4] = b"loge";
/// First bytes of a descriptor for zeros (2.3.1.2).
pub(crate) const ZERO_SIGNATURE: &[u8; 4] = b"zero";
/// First bytes of a descriptor for data (2.3.1.3).
pub(crate) const DESCRIPTOR_SIGNATURE: &[u8; 4] = b"desc";
/// First bytes of a data sector (2.3.1.4).
pub(crate) const DATA_SIGNATURE: &[u8; 4] = b"data";

// Region caps are those of the largest disk; more is hostile.
/// Most bytes of a BAT region: 64 TiB in blocks of 1 MiB, and the sector bitmap entries.
pub(crate) const MAX_BAT: u64 = 513 * MIB;
/// Most bytes of a metadata region.
pub(crate) const MAX_METADATA: u64 = 128 * MIB;
/// Most bytes of a file: the largest disk twice.
pub(crate) const MAX_FILE: u64 = 2 * MAX_DISK;
/// Most bytes of the log.
pub(crate) const MAX_LOG: u64 = 1024 * MIB;

/// Region that holds the block allocation table (2.2.3.2).
pub(crate) const BAT_REGION: Guid = Guid::new(0x2DC2_7766_F623_4200_9D64_115E_9BFD_4A08);
/// Region that holds the metadata (2.2.3.2).
pub(crate) const METADATA_REGION: Guid = Guid::new(0x8B7C_A206_4790_4B9A_B8FE_575F_050F_886E);
/// File parameters (2.6.2.1).
pub(crate) const FILE_PARAMETERS: Guid = Guid::new(0xCAA1_6737_FA36_4D43_B3B6_33F0_AA44_E76B);
/// Virtual disk size (2.6.2.2).
pub(crate) const VIRTUAL_DISK_SIZE: Guid = Guid::new(0x2FA5_4224_CD1B_4876_B211_5DBE_D83B_F4B8);
/// Virtual disk identifier (2.6.2.3).
pub(crate) const VIRTUAL_DISK_ID: Guid = Guid::new(0xBECA_12AB_B2E6_4523_93EF_C309_E000_C746);
/// Logical sector size (2.6.2.4).
pub(crate) const LOGICAL_SECTOR_SIZE: Guid = Guid::new(0x8141_BF1D_A96F_4709_BA47_F233_A8FA_AB5F);
/// Physical sector size (2.6.2.5).
pub(crate) const PHYSICAL_SECTOR_SIZE: Guid = Guid::new(0xCDA3_48C7_445D_4471_9CC9_E988_5251_C556);
/// Parent locator (2.6.2.6).
pub(crate) const PARENT_LOCATOR: Guid = Guid::new(0xA8D3_5F2D_B30B_454D_ABF7_D3D8_4834_AB0C);

/// Header (2.2.2).
#[derive(Clone, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(crate) struct RawHeader {
    pub signature: [u8; 4],
    pub checksum: U32,
    pub sequence: U64,
    pub file_write_guid: Guid,
    pub data_write_guid: Guid,
    pub log_guid: Guid,
    pub log_version: U16,
    pub version: U16,
    pub log_length: U32,
    pub log_offset: U64,
    pub reserved: [u8; 4016],
}

/// Start of a region table (2.2.3.1).
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(crate) struct RawRegionTable {
    pub signature: [u8; 4],
    pub checksum: U32,
    pub entry_count: U32,
    pub reserved: U32,
}

/// Entry of a region table (2.2.3.2).
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(crate) struct RawRegion {
    pub guid: Guid,
    pub offset: U64,
    pub length: U32,
    /// Bit 0: required.
    pub flags: U32,
}

/// Start of the metadata table (2.6.1.1).
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(crate) struct RawMetadataTable {
    pub signature: [u8; 8],
    pub reserved: U16,
    pub entry_count: U16,
    pub reserved2: [u8; 20],
}

/// Entry of the metadata table (2.6.1.2).
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(crate) struct RawMetadataEntry {
    pub id: Guid,
    /// Relative to the metadata region.
    pub offset: U32,
    pub length: U32,
    /// [`IS_USER`], [`IS_VIRTUAL_DISK`], [`IS_REQUIRED`].
    pub flags: U32,
    pub reserved: U32,
}

/// The item belongs to a user, not to the system.
pub(crate) const IS_USER: u32 = 1;
/// The item is about the virtual disk, not about the file.
pub(crate) const IS_VIRTUAL_DISK: u32 = 2;
/// A program that does not know the item must not open the file.
pub(crate) const IS_REQUIRED: u32 = 4;

/// File parameters (2.6.2.1).
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(crate) struct RawFileParameters {
    pub block_size: U32,
    /// [`LEAVE_BLOCKS_ALLOCATED`], [`HAS_PARENT`].
    pub flags: U32,
}

/// The disk is fixed.
pub(crate) const LEAVE_BLOCKS_ALLOCATED: u32 = 1;
/// The disk is a child of another.
pub(crate) const HAS_PARENT: u32 = 2;

/// Start of a log entry (2.3.1.1).
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(crate) struct RawLogEntry {
    pub signature: [u8; 4],
    pub checksum: U32,
    pub entry_length: U32,
    pub tail: U32,
    pub sequence: U64,
    pub descriptor_count: U32,
    pub reserved: U32,
    pub log_guid: Guid,
    pub flushed_file_offset: U64,
    pub last_file_offset: U64,
}

/// Descriptor of a log entry: of data (2.3.1.3), or of zeros (2.3.1.2), whose first eight bytes after the trailing ones
/// are a length.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(crate) struct RawDescriptor {
    pub signature: [u8; 4],
    /// Data: the last four bytes of the sector. Zeros: reserved.
    pub trailing: [u8; 4],
    /// Data: the first eight bytes of the sector. Zeros: their length.
    pub leading: [u8; 8],
    pub file_offset: U64,
    pub sequence: U64,
}

/// Data sector of a log entry (2.3.1.4).
#[derive(Clone, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(crate) struct RawDataSector {
    pub signature: [u8; 4],
    pub sequence_high: U32,
    pub data: [u8; 4084],
    pub sequence_low: U32,
}

const _: () = {
    assert!(size_of::<RawHeader>() == 4096);
    assert!(size_of::<RawRegionTable>() == 16);
    assert!(size_of::<RawRegion>() == 32);
    assert!(size_of::<RawMetadataTable>() == 32);
    assert!(size_of::<RawMetadataEntry>() == 32);
    assert!(size_of::<RawFileParameters>() == 8);
    assert!(size_of::<RawLogEntry>() == 64);
    assert!(size_of::<RawDescriptor>() == 32);
    assert!(size_of::<RawDataSector>() == 4096);
};

/// CRC-32C of a structure, its checksum field (bytes 4 to 8) taken as zero, as all structures with a checksum have it.
pub(crate) fn checksum(structure: &[u8]) -> u32 {
    let (signature, rest) = structure.split_at(structure.len().min(4));
    let after = rest.get(4..).unwrap_or_default();
    crc32c::crc32c_append(
        crc32c::crc32c_append(crc32c::crc32c(signature), &[0; 4]),
        after,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guids_are_mixed_endian_on_disk() {
        assert_eq!(
            BAT_REGION.as_bytes()[..8],
            [0x66, 0x77, 0xC2, 0x2D, 0x23, 0xF6, 0x00, 0x42]
        );
        assert_eq!(
            BAT_REGION.to_string(),
            "2dc27766-f623-4200-9d64-115e9bfd4a08"
        );
    }

    #[test]
    fn a_checksum_takes_its_own_field_as_zero() {
        let mut bytes = *b"headXXXXrest of the structure";
        let sum = checksum(&bytes);
        bytes[4..8].fill(0);
        assert_eq!(sum, crc32c::crc32c(&bytes));
    }
}
