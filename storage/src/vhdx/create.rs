//! Making a new file.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::FallocateFlags;
use zerocopy::IntoBytes;
use zerocopy::little_endian::{U16, U64};

use super::bat::{BlockState, Entry, Layout};
use super::disk::Vhdx;
use super::format::{
    BLOCK_SIZES, Guid, HEADER_OFFSETS, MAX_DISK, MIB, REGION_TABLE_OFFSETS, SIGNATURE,
};
use super::header::Header;
use super::locator::ParentLocator;
use super::metadata::Metadata;
use super::region::{self, Region};
use crate::disk::{Disk, SectorSize};
use crate::medium::Medium;
use crate::options::{OpenOptions, Parents};
use crate::refusal::OpenError;

/// The name of the program that made the file, in its identifier (2.2.1).
const CREATOR: &str = concat!("Coppice ", env!("CARGO_PKG_VERSION"));
const LOG: Region = Region {
    offset: MIB,
    length: MIB,
};
const METADATA: Region = Region {
    offset: 2 * MIB,
    length: MIB,
};
const BAT_OFFSET: u64 = 3 * MIB;
/// Entries written at once where the table of a fixed disk is filled.
const FILL_ENTRIES: u64 = 8192;

/// What a new disk is to be.
#[derive(Clone, Copy, Debug)]
pub struct CreateOptions {
    /// Size of the virtual disk in bytes: whole logical sectors, up to 64 TiB.
    pub size: u64,
    /// Bytes of a payload block: a power of two from 1 to 256 MiB.
    pub block_size: u32,
    /// Logical sector size.
    pub logical_sector: SectorSize,
    /// Physical sector size.
    pub physical_sector: SectorSize,
    /// Whether all blocks have their space from the start.
    pub fixed: bool,
}

impl CreateOptions {
    /// A dynamic disk of `size` bytes in blocks of 2 MiB, sectors of 512 bytes on a medium of 4096.
    pub fn new(size: u64) -> Self {
        Self {
            size,
            block_size: 2 << 20,
            logical_sector: SectorSize::B512,
            physical_sector: SectorSize::B4096,
            fixed: false,
        }
    }
}

/// Why a disk could not be made.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    /// The size is not one that a disk can have.
    #[error("size {size}: expected whole sectors of {sector} bytes, up to 64 TiB")]
    Size {
        /// The size in bytes.
        size: u64,
        /// The logical sector size in bytes.
        sector: u32,
    },
    /// The block size is not one that the format knows.
    #[error("block size {0}: expected a power of two from 1 to 256 MiB")]
    BlockSize(u32),
    /// The parent cannot be used.
    #[error(transparent)]
    Parent(#[from] OpenError),
    /// The parent's name cannot be written down.
    #[error("{}: the name of a parent has to be UTF-8", .0.display())]
    ParentName(PathBuf),
    /// The host refused; the file is not left behind.
    #[error("{}: cannot {operation}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What was tried.
        operation: &'static str,
        /// The error of the host.
        source: io::Error,
    },
}

/// What a new child is to be, apart from what it has of its parent.
#[derive(Clone, Debug, Default)]
pub struct ChildOptions {
    /// Bytes of a payload block, a power of two from 1 to 256 MiB; as the parent's where that is not said.
    pub block_size: Option<u32>,
    /// Where the parents of the parent may lie.
    pub parents: Parents,
    /// The child goes on as the same disk, with its VirtualDiskId, as after a snapshot; otherwise it is another one
    /// that begins as a copy.
    pub same_disk: bool,
}

impl Vhdx {
    /// Makes a new, durable file; one that is there already is left alone and refused.
    ///
    /// # Errors
    /// See [`CreateError`].
    pub fn create(path: impl AsRef<Path>, options: &CreateOptions) -> Result<(), CreateError> {
        let sector = options.logical_sector.bytes();
        if options.size == 0
            || options.size > MAX_DISK
            || !options.size.is_multiple_of(sector.into())
        {
            return Err(CreateError::Size {
                size: options.size,
                sector,
            });
        }
        let metadata = Metadata {
            block_size: checked_block_size(options.block_size)?,
            fixed: options.fixed,
            size: options.size,
            id: Guid::random(),
            logical_sector: options.logical_sector,
            physical_sector: options.physical_sector,
            parent: None,
        };
        make(path.as_ref(), &metadata)
    }

    /// Makes a new, durable file for a disk that is as the one at `parent` until it is written. The parent must not
    /// change from then on.
    ///
    /// # Errors
    /// See [`CreateError`].
    pub fn create_child(
        path: impl AsRef<Path>,
        parent: impl AsRef<Path>,
        options: &ChildOptions,
    ) -> Result<(), CreateError> {
        let path = path.as_ref();
        let open = OpenOptions {
            parents: options.parents.clone(),
            ..OpenOptions::read_only()
        };
        let disk = Self::open(&parent, &open)?;
        disk.create_child_of(path, parent.as_ref(), options)
    }

    /// Makes a child of this open disk, whose file is at `parent`.
    pub(super) fn create_child_of(
        &self,
        path: &Path,
        parent: &Path,
        options: &ChildOptions,
    ) -> Result<(), CreateError> {
        let failed = |operation| {
            move |source| CreateError::Io {
                path: path.to_owned(),
                operation,
                source,
            }
        };
        let parent = parent
            .canonicalize()
            .map_err(failed("find the parent's name"))?;
        let folder = folder_of(path)
            .canonicalize()
            .map_err(failed("find the folder's name"))?;
        let geometry = self.geometry();
        let own = u32::try_from(self.block_size).unwrap_or(u32::MAX);
        let identifiers = self.identifiers();
        let locator = ParentLocator::new(identifiers.data_write_guid, &folder, &parent);
        if locator.paths().next().is_none() {
            return Err(CreateError::ParentName(parent));
        }
        let metadata = Metadata {
            block_size: checked_block_size(options.block_size.unwrap_or(own))?,
            fixed: false,
            size: geometry.size,
            id: if options.same_disk {
                identifiers.virtual_disk_id
            } else {
                Guid::random()
            },
            logical_sector: geometry.logical_sector,
            physical_sector: geometry.physical_sector,
            parent: Some(locator),
        };
        make(path, &metadata)
    }
}

fn checked_block_size(block_size: u32) -> Result<u32, CreateError> {
    if !BLOCK_SIZES.contains(&block_size.into()) || !block_size.is_power_of_two() {
        return Err(CreateError::BlockSize(block_size));
    }
    Ok(block_size)
}

fn make(path: &Path, metadata: &Metadata) -> Result<(), CreateError> {
    let failed = |operation| {
        move |source| CreateError::Io {
            path: path.to_owned(),
            operation,
            source,
        }
    };
    let file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(path)
        .map_err(failed("create the file"))?;
    let written = write(&Arc::new(file), metadata)
        .map_err(failed("write the file"))
        .and_then(|()| sync_name(path).map_err(failed("make the file's name durable")));
    if written.is_err() {
        // What is reported is why it could not be written.
        let _ = std::fs::remove_file(path);
    }
    written
}

fn write(file: &Arc<File>, metadata: &Metadata) -> io::Result<()> {
    let mut layout = Layout::of(metadata);
    let table = layout.table_len();
    layout.region = Region {
        offset: BAT_OFFSET,
        length: table.next_multiple_of(MIB),
    };
    let payload = layout.region.end();

    if metadata.fixed {
        let end = payload + layout.blocks * layout.block_size;
        file.set_len(end)?;
        match rustix::fs::fallocate(&**file, FallocateFlags::empty(), 0, end) {
            // Without such a call the space comes when it is written, as in any sparse file.
            Ok(()) | Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) => {}
            Err(e) => return Err(e.into()),
        }
        fill(file, &layout, payload)?;
    } else {
        file.set_len(payload)?;
    }

    file.write_all_at(&metadata.to_disk(), METADATA.offset)?;
    for offset in REGION_TABLE_OFFSETS {
        file.write_all_at(&region::table(layout.region, METADATA), offset)?;
    }
    let header = Header {
        sequence: 1,
        file_write_guid: Guid::random(),
        data_write_guid: Guid::random(),
        log_guid: Guid::ZERO,
        log_offset: LOG.offset,
        log_length: LOG.length,
    };
    for (sequence, offset) in (1..).zip(HEADER_OFFSETS) {
        file.write_all_at(Header { sequence, ..header }.to_disk().as_bytes(), offset)?;
    }
    let creator: Vec<U16> = CREATOR.encode_utf16().map(U16::new).collect();
    file.write_all_at(creator.as_bytes(), SIGNATURE.len() as u64)?;
    file.write_all_at(SIGNATURE, 0)?;
    file.sync_all()
}

/// Writes the table of a fixed disk, whose blocks lie in order from `payload`.
fn fill(file: &Arc<File>, layout: &Layout, payload: u64) -> io::Result<()> {
    let mut first = 0;
    while first < layout.blocks {
        let last = (first + FILL_ENTRIES).min(layout.blocks) - 1;
        let start = layout.index(first);
        let mut entries = vec![U64::ZERO; (layout.index(last) - start + 1) as usize];
        for block in first..=last {
            let entry = Entry {
                state: BlockState::FullyPresent,
                offset: payload + block * layout.block_size,
            };
            entries[(layout.index(block) - start) as usize] = entry.raw().into();
        }
        file.write_all_at(entries.as_bytes(), layout.entry_offset(start))?;
        first = last + 1;
    }
    Ok(())
}

/// The folder of a file.
pub(super) fn folder_of(path: &Path) -> &Path {
    path.parent()
        .filter(|folder| !folder.as_os_str().is_empty())
        .unwrap_or(Path::new("."))
}

/// Makes the name of a file durable.
pub(super) fn sync_name(path: &Path) -> io::Result<()> {
    File::open(folder_of(path))?.sync_all()
}
