//! Tests of the engine over a file in memory that records, cuts and fails.

mod chain;
mod crash;
mod faults;
mod files;
mod hostile;
mod memory;
mod model;
mod power;
mod rearrange;
mod states;

use std::sync::Arc;

use super::{ChildOptions, CreateOptions, Vhdx};
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
    Vhdx::from_medium(Box::new(Arc::clone(memory)), mode, None).unwrap()
}

/// A new parent in memory, in which every sector from `sectors` holds a value, and a new child on it.
fn family(options: &CreateOptions, sectors: &[(u64, u64, u32)]) -> (Contents, Contents) {
    let folder = tempfile::tempdir().unwrap();
    let (base, child) = (
        folder.path().join("base.vhdx"),
        folder.path().join("child.vhdx"),
    );
    Vhdx::create(&base, options).unwrap();
    let disk = Vhdx::open(&base, &OpenMode::ReadWrite.into()).unwrap();
    for (sector, count, value) in sectors {
        let mut extents = Vec::new();
        let range = ByteRange::new(sector * SECTOR, count * SECTOR).unwrap();
        let id = disk.resolve_write(range, &mut extents).unwrap();
        for extent in &extents {
            if let ExtentKind::Data { file, file_offset } = &extent.kind {
                std::os::unix::fs::FileExt::write_all_at(
                    &**file,
                    &filled(*value, extent.len),
                    *file_offset,
                )
                .unwrap();
            }
        }
        disk.finish(id, true);
    }
    drop(disk);
    Vhdx::create_child(&child, &base, &ChildOptions::default()).unwrap();
    (Contents::load(&base), Contents::load(&child))
}

/// A child in memory over its parent in memory, and what the test moves bytes through.
struct Family {
    parent: Arc<Memory>,
    child: Arc<Memory>,
    disk: Vhdx,
}

impl Family {
    fn open(parent: &Contents, child: &Contents, mode: OpenMode) -> Self {
        let (parent, child) = (Memory::new(parent.clone()), Memory::new(child.clone()));
        let below = Arc::new(opened(&parent, OpenMode::ReadOnly));
        let disk = Vhdx::from_medium(Box::new(Arc::clone(&child)), mode, Some(below)).unwrap();
        Self {
            parent,
            child,
            disk,
        }
    }

    /// The disk as it is after a close, or after a kill where it is not closed.
    fn reopened(self, close: bool, mode: OpenMode) -> Self {
        if close {
            self.disk.close().unwrap();
        }
        Self::open(&self.parent.contents(), &self.child.contents(), mode)
    }

    fn write(&self, sector: u64, count: u64, value: u32) {
        write(&self.disk, &self.child, sector, count, value).unwrap();
    }

    /// The value that fills a sector.
    fn value(&self, sector: u64) -> u32 {
        let mut extents = Vec::new();
        let range = ByteRange::new(sector * SECTOR, SECTOR).unwrap();
        let id = self.disk.resolve_read(range, &mut extents).unwrap();
        self.disk.finish(id, true);
        let mut bytes = vec![0; SECTOR as usize];
        for extent in &extents {
            if let ExtentKind::Data { file, file_offset } = &extent.kind {
                let start = (extent.offset - range.offset()) as usize;
                let part = &mut bytes[start..start + extent.len as usize];
                let memory = if Arc::ptr_eq(file, self.parent.file()) {
                    &self.parent
                } else {
                    &self.child
                };
                memory.read_exact_at(part, *file_offset).unwrap();
            }
        }
        let value = u32::from_le_bytes(bytes[..4].try_into().unwrap());
        assert_eq!(bytes, filled(value, SECTOR), "a sector holds one write");
        value
    }
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
    let id = disk.resolve_write(
        ByteRange::new(sector * SECTOR, count * SECTOR).unwrap(),
        &mut extents,
    )?;
    let transferred = extents.iter().try_for_each(|extent| match extent.kind {
        ExtentKind::Data { file_offset, .. } => {
            memory.write_all_at(&filled(value, extent.len), file_offset)
        }
        ExtentKind::Zero | ExtentKind::Unmapped => panic!("a resolved write has space"),
    });
    disk.finish(id, transferred.is_ok());
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
    let id = disk.resolve_read(
        ByteRange::new(sector * SECTOR, SECTOR).unwrap(),
        &mut extents,
    )?;
    disk.finish(id, true);
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
