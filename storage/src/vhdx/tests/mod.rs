//! Tests of the engine over a file in memory that records, cuts and fails.

mod crash;
mod faults;
mod hostile;
mod memory;
mod model;

use std::sync::Arc;

use super::{CreateOptions, Vhdx};
use crate::disk::{ByteRange, Disk, DiskError, ExtentKind};
use crate::lock::OpenMode;
use crate::medium::Medium;
use memory::{Contents, Memory};

/// Unit of the tests' writes and of what a cut tears.
const SECTOR: u64 = 4096;

/// A new disk in memory.
fn created(options: &CreateOptions) -> Contents {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.vhdx");
    Vhdx::create(&path, options).unwrap();
    Contents::load(&path)
}

fn opened(memory: &Arc<Memory>, mode: OpenMode) -> Vhdx {
    Vhdx::from_medium(Box::new(Arc::clone(memory)), mode).unwrap()
}

/// Writes whole sectors of a value, as an engine would; the payload goes through the double too.
fn write(
    disk: &Vhdx,
    memory: &Memory,
    sector: u64,
    count: u64,
    value: u32,
) -> Result<(), DiskError> {
    let mut extents = Vec::new();
    let ticket = disk.resolve_write(
        ByteRange::new(sector * SECTOR, count * SECTOR).unwrap(),
        &mut extents,
    )?;
    let transferred = extents.iter().try_for_each(|extent| match extent.kind {
        ExtentKind::Data { file_offset, .. } => {
            memory.write_all_at(&filled(value, extent.len), file_offset)
        }
        ExtentKind::Zero | ExtentKind::Unmapped => panic!("a resolved write has space"),
    });
    disk.finish_write(ticket, transferred.is_ok());
    transferred.map_err(|source| DiskError::Io {
        operation: "write payload".into(),
        source,
    })
}

fn filled(value: u32, len: u64) -> Vec<u8> {
    value.to_le_bytes().repeat((len / 4) as usize)
}

/// The value that fills a sector.
fn value(disk: &Vhdx, memory: &Memory, sector: u64) -> Result<u32, DiskError> {
    let mut extents = Vec::new();
    disk.resolve_read(
        ByteRange::new(sector * SECTOR, SECTOR).unwrap(),
        &mut extents,
    )?;
    let [extent] = &extents[..] else {
        panic!("a sector lies in one extent")
    };
    let mut bytes = vec![0; SECTOR as usize];
    match extent.kind {
        ExtentKind::Data { file_offset, .. } => {
            memory.read_exact_at(&mut bytes, file_offset).unwrap();
        }
        ExtentKind::Zero | ExtentKind::Unmapped => {}
    }
    let value = u32::from_le_bytes(bytes[..4].try_into().unwrap());
    assert_eq!(bytes, filled(value, SECTOR), "a sector holds one write");
    Ok(value)
}
