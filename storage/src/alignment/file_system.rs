//! File systems by their superblocks, and the units in which they keep files.

use super::window::{Window, le16, le32};
use crate::disk::ByteRange;

/// A file system that was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct FileSystem {
    /// What it is called.
    pub name: &'static str,
    /// Bytes of the unit in which the places of files are counted.
    pub block: u64,
    /// Where the first of these units begins, in bytes from the start of the file system.
    pub first: u64,
    /// Its files are packed.
    pub is_packed: bool,
}

/// What is known of a file system whose blocks are counted from its start.
fn plain(name: &'static str, block: u64) -> Option<FileSystem> {
    // Anything else is not a superblock.
    let makes_sense = block.is_power_of_two() && (512..=1 << 20).contains(&block);
    makes_sense.then_some(FileSystem {
        name,
        block,
        first: 0,
        is_packed: false,
    })
}

/// The file system in a range of the disk, if it has one that is known.
pub(super) fn find<E>(
    bytes: &mut Window<'_, E>,
    range: ByteRange,
) -> Result<Option<FileSystem>, E> {
    let start = range.offset();
    // A superblock lies in its range.
    let end = bytes.size;
    bytes.size = range.end().min(end);
    let found = (|| {
        for probe in [boot_sector, at_start, at_1024, btrfs, iso] {
            if let Some(found) = probe(bytes, start)? {
                return Ok(Some(found));
            }
        }
        Ok(None)
    })();
    bytes.size = end;
    found
}

/// Whether the disk begins with the boot sector of a FAT or NTFS.
pub(super) fn has_boot_sector<E>(bytes: &mut Window<'_, E>) -> Result<bool, E> {
    Ok(boot_sector(bytes, 0)?.is_some())
}

/// Whether there is an ISO 9660 image.
pub(super) fn is_iso<E>(bytes: &mut Window<'_, E>, start: u64) -> Result<bool, E> {
    Ok(iso(bytes, start)?.is_some())
}

/// What begins with a boot sector of DOS: FAT ([MS-FAT] 3), exFAT ([MS-EXFAT] 3.1), NTFS.
fn boot_sector<E>(bytes: &mut Window<'_, E>, start: u64) -> Result<Option<FileSystem>, E> {
    let Some(boot) = bytes.at::<512>(start)? else {
        return Ok(None);
    };
    if boot[510..] != [0x55, 0xAA] {
        return Ok(None);
    }
    if boot[3..11] == *b"EXFAT   " {
        let (sector, cluster) = (u32::from(boot[108]), u32::from(boot[109]));
        // Up to 4 KiB, and up to 32 MiB (3.1.15, 3.1.16).
        let is_sound = (9..=12).contains(&sector) && cluster <= 25 - sector;
        return Ok(is_sound.then(|| FileSystem {
            name: "exFAT",
            block: 1 << (sector + cluster),
            first: le32(&boot, 88) << sector,
            is_packed: false,
        }));
    }
    let (sector, count) = (le16(&boot, 11), u64::from(boot[13]));
    if ![512, 1024, 2048, 4096].contains(&sector) {
        return Ok(None);
    }
    if boot[3..11] == *b"NTFS    " {
        // More than 128 is the power of two, negated.
        let count = match boot[13] {
            few @ 0..=128 => u64::from(few),
            negated => 1_u64.checked_shl(256 - u32::from(negated)).unwrap_or(0),
        };
        return Ok(plain("NTFS", sector.saturating_mul(count)));
    }
    let (reserved, tables) = (le16(&boot, 14), u64::from(boot[16]));
    let is_fat = boot[54..57] == *b"FAT" || boot[82..85] == *b"FAT";
    if !is_fat || !count.is_power_of_two() || reserved == 0 || tables == 0 {
        return Ok(None);
    }
    let table = match le16(&boot, 22) {
        0 => le32(&boot, 36),
        sectors => sectors,
    };
    let root = (le16(&boot, 17) * 32).div_ceil(sector);
    // Each is less than 2^40, so nothing overflows.
    Ok(Some(FileSystem {
        name: "FAT",
        block: sector * count,
        first: (reserved + tables * table + root) * sector,
        is_packed: false,
    }))
}

/// What has its superblock at its start: XFS, squashfs.
fn at_start<E>(bytes: &mut Window<'_, E>, start: u64) -> Result<Option<FileSystem>, E> {
    Ok(bytes.at::<8>(start)?.and_then(|head| match &head[..4] {
        b"XFSB" => {
            let block = u32::from_be_bytes([head[4], head[5], head[6], head[7]]);
            plain("XFS", u64::from(block))
        }
        b"hsqs" => Some(FileSystem {
            name: "squashfs",
            block: 1,
            first: 0,
            is_packed: true,
        }),
        _ => None,
    }))
}

/// What has its superblock 1024 bytes on: ext2, ext3, ext4 (Linux, `Documentation/filesystems/ext4/super.rst`), EROFS.
fn at_1024<E>(bytes: &mut Window<'_, E>, start: u64) -> Result<Option<FileSystem>, E> {
    let head = start.checked_add(1024).map(|at| bytes.at::<104>(at));
    let Some(head) = head.transpose()?.flatten() else {
        return Ok(None);
    };
    if head[..4] == [0xE2, 0xE1, 0xF5, 0xE0] {
        return Ok(1_u64
            .checked_shl(u32::from(head[12]))
            .and_then(|block| plain("EROFS", block)));
    }
    let power = le32(&head, 24);
    if head[56..58] != [0x53, 0xEF] || power > 6 {
        return Ok(None);
    }
    let (has_journal, has_extents) = (le32(&head, 92) & 0x4 != 0, le32(&head, 96) & 0x40 != 0);
    let name = match (has_extents, has_journal) {
        (true, _) => "ext4",
        (false, true) => "ext3",
        (false, false) => "ext2",
    };
    Ok(plain(name, 1024 << power))
}

/// btrfs (Linux, `include/uapi/linux/btrfs_tree.h`).
fn btrfs<E>(bytes: &mut Window<'_, E>, start: u64) -> Result<Option<FileSystem>, E> {
    let head = start.checked_add(65536).map(|at| bytes.at::<148>(at));
    Ok(head
        .transpose()?
        .flatten()
        .filter(|head| head[64..72] == *b"_BHRfS_M")
        .and_then(|head| plain("btrfs", le32(&head, 144))))
}

/// ISO 9660 (ECMA-119 8.4): the first descriptor lies in the sixteenth sector.
fn iso<E>(bytes: &mut Window<'_, E>, start: u64) -> Result<Option<FileSystem>, E> {
    let head = start.checked_add(32768).map(|at| bytes.at::<130>(at));
    Ok(head
        .transpose()?
        .flatten()
        .filter(|head| head[1..6] == *b"CD001" && head[0] == 1)
        .and_then(|head| plain("ISO 9660", le16(&head, 128))))
}
