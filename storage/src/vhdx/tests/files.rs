//! What tests do with disks in files.

use std::os::unix::fs::FileExt;
use std::path::Path;

use super::{SECTOR, filled};
use crate::disk::{ByteRange, Disk, ExtentKind};
use crate::options::OpenOptions;
use crate::vhdx::format::MIB;
use crate::vhdx::{CreateOptions, Vhdx};

/// Opens a chain.
pub(super) fn open(path: &Path, read_only: bool) -> Vhdx {
    let options = OpenOptions {
        read_only,
        ..OpenOptions::default()
    };
    Vhdx::open(path, &options).unwrap()
}

/// Writes sectors of a value.
pub(super) fn put(disk: &Vhdx, sector: u64, count: u64, value: u32) {
    let mut extents = Vec::new();
    let range = ByteRange::new(sector * SECTOR, count * SECTOR).unwrap();
    let id = disk.resolve_write(range, &mut extents).unwrap();
    for extent in extents {
        let ExtentKind::Data { file, file_offset } = extent.kind else {
            panic!("a resolved write has space")
        };
        file.write_all_at(&filled(value, extent.len), file_offset)
            .unwrap();
    }
    disk.finish(id, true);
}

/// The value that fills a sector, wherever in the chain it lies.
pub(super) fn get(disk: &Vhdx, sector: u64) -> u32 {
    let mut extents = Vec::new();
    let range = ByteRange::new(sector * SECTOR, SECTOR).unwrap();
    let id = disk.resolve_read(range, &mut extents).unwrap();
    disk.finish(id, true);
    let mut bytes = vec![0; SECTOR as usize];
    for extent in extents {
        if let ExtentKind::Data { file, file_offset } = extent.kind {
            let start = (extent.offset - range.offset()) as usize;
            let part = &mut bytes[start..start + extent.len as usize];
            file.read_exact_at(part, file_offset).unwrap();
        }
    }
    let value = u32::from_le_bytes(bytes[..4].try_into().unwrap());
    assert_eq!(bytes, filled(value, SECTOR));
    value
}

/// A disk of 64 blocks.
pub(super) fn small() -> CreateOptions {
    CreateOptions {
        block_size: 1 << 20,
        ..CreateOptions::new(64 * MIB)
    }
}
