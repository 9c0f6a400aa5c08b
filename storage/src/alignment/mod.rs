//! Why guests would not share pages of a disk.
//!
//! Guests share a page of a file only where they read it whole into a page of theirs: 4096 bytes, at a multiple of 4096
//! of the disk. A file system with smaller blocks, or in a partition that begins elsewhere, puts the pages of its files
//! anywhere, so that nothing of it is ever shared, and no guest says so. Partition tables and superblocks tell it
//! beforehand.
//!
//! The bytes are those of a guest: whatever they say, no more is read than a bounded number of sectors, and what makes
//! no sense is passed over.

mod file_system;
mod partitions;
mod window;

use std::fmt;

use crate::blocking;
use crate::disk::{ByteRange, Disk, DiskError};
use file_system::FileSystem;
use partitions::Partition;
use window::{PAGE, Window};

/// What keeps guests from sharing pages of a disk, or of a part of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unshared {
    /// The number of the partition, from 1; none where the disk has no partitions.
    pub partition: Option<u32>,
    /// Why.
    pub reason: Reason,
}

/// Why pages are not shared.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reason {
    /// The partition begins at this byte, off all pages.
    PartitionStart(u64),
    /// A file system has blocks of so many bytes, fewer than a page has.
    Blocks {
        /// What it is called.
        file_system: &'static str,
        /// Bytes of a block.
        bytes: u64,
    },
    /// The blocks of a file system are large enough, and begin off all pages.
    BlocksStart {
        /// What it is called.
        file_system: &'static str,
        /// The byte of the partition, or disk, at which they begin.
        offset: u64,
    },
    /// A file system packs its files, and a guest unpacks what it reads.
    Packed {
        /// What it is called.
        file_system: &'static str,
    },
}

impl fmt::Display for Unshared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(number) = self.partition {
            write!(f, "partition {number}: ")?;
        }
        match &self.reason {
            Reason::PartitionStart(offset) => write!(
                f,
                "begins at byte {offset}, which is not a multiple of {PAGE}: guests share none of its pages"
            ),
            Reason::Blocks { file_system, bytes } => {
                write!(
                    f,
                    "{file_system} with blocks of {bytes} bytes: guests share pages of {PAGE} bytes only"
                )?;
                if file_system.starts_with("ext") {
                    write!(
                        f,
                        "; `mke2fs -b {PAGE}` makes a file system with such blocks"
                    )?;
                }
                Ok(())
            }
            Reason::BlocksStart {
                file_system,
                offset,
            } => write!(
                f,
                "{file_system} whose clusters begin at byte {offset}, which is not a multiple of {PAGE}: guests share none of its pages"
            ),
            Reason::Packed { file_system } => write!(
                f,
                "{file_system} packs its files: each guest has the pages that it unpacks to itself"
            ),
        }
    }
}

/// Looks for what keeps guests from sharing pages of a disk: nothing is found where the disk holds nothing that is
/// known.
///
/// # Errors
/// Where the disk cannot be read.
pub fn unshared(disk: &dyn Disk) -> Result<Vec<Unshared>, DiskError> {
    let geometry = disk.geometry();
    let mut bytes = Window {
        size: geometry.size,
        read: &mut |buffer, offset| blocking::read_at(disk, buffer, offset),
    };
    look(&mut bytes, u64::from(geometry.logical_sector.bytes()))
}

fn look<E>(bytes: &mut Window<'_, E>, sector: u64) -> Result<Vec<Unshared>, E> {
    let mut found = Vec::new();
    let whole = ByteRange::new(0, bytes.size);
    let partitions = partitions::list(bytes, sector)?;
    for Partition { number, range } in &partitions {
        let partition = Some(*number);
        if !range.offset().is_multiple_of(PAGE) {
            let reason = Reason::PartitionStart(range.offset());
            found.push(Unshared { partition, reason });
        }
        let reason = judge(file_system::find(bytes, *range)?);
        found.extend(reason.map(|reason| Unshared { partition, reason }));
    }
    if let Some(whole) = whole.filter(|_| partitions.is_empty()) {
        let (partition, reason) = (None, judge(file_system::find(bytes, whole)?));
        found.extend(reason.map(|reason| Unshared { partition, reason }));
    }
    Ok(found)
}

fn judge(found: Option<FileSystem>) -> Option<Reason> {
    match found? {
        FileSystem {
            name: file_system,
            is_packed: true,
            ..
        } => Some(Reason::Packed { file_system }),
        FileSystem {
            name: file_system,
            block: bytes,
            ..
        } if bytes < PAGE => Some(Reason::Blocks { file_system, bytes }),
        FileSystem {
            name: file_system,
            first: offset,
            ..
        } => (!offset.is_multiple_of(PAGE)).then_some(Reason::BlocksStart {
            file_system,
            offset,
        }),
    }
}

#[cfg(test)]
mod tests;
