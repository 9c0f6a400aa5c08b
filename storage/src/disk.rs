//! The seam between disk formats and the engines that move bytes.

use std::any::Any;
use std::fmt;
use std::fs::File;
use std::sync::Arc;

/// A range of the virtual disk, in bytes. Its end never overflows a `u64`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ByteRange {
    offset: u64,
    len: u64,
}

impl ByteRange {
    /// A range of `len` bytes from `offset`; `None` where the end would overflow.
    pub fn new(offset: u64, len: u64) -> Option<Self> {
        offset.checked_add(len)?;
        Some(Self { offset, len })
    }

    /// First byte.
    pub fn offset(self) -> u64 {
        self.offset
    }

    /// Length in bytes.
    pub fn len(self) -> u64 {
        self.len
    }

    /// Whether the range covers no byte.
    pub fn is_empty(self) -> bool {
        self.len == 0
    }

    /// First byte past the range.
    pub fn end(self) -> u64 {
        self.offset + self.len
    }
}

/// A sector size that VHDX and virtio-blk know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SectorSize {
    /// 512 bytes.
    B512,
    /// 4096 bytes.
    B4096,
}

impl SectorSize {
    /// The size in bytes.
    pub const fn bytes(self) -> u32 {
        match self {
            Self::B512 => 512,
            Self::B4096 => 4096,
        }
    }
}

/// What a disk looks like from outside. Only its size may change while it is open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Size of the virtual disk in bytes, a multiple of the logical sector size.
    pub size: u64,
    /// Smallest unit that a read or write addresses.
    pub logical_sector: SectorSize,
    /// Unit below which the medium has to read before it writes.
    pub physical_sector: SectorSize,
    /// Preferred size and alignment, in bytes, of a discard.
    pub discard_granularity: u32,
    /// Whether the disk was opened for reading alone.
    pub read_only: bool,
}

impl Geometry {
    /// Checks that a range lies inside the disk, on its logical sectors.
    ///
    /// # Errors
    /// `Range`.
    pub fn check(&self, range: ByteRange) -> Result<(), DiskError> {
        let sector = u64::from(self.logical_sector.bytes());
        if range.end() > self.size
            || !range.offset().is_multiple_of(sector)
            || !range.len().is_multiple_of(sector)
        {
            return Err(DiskError::Range {
                offset: range.offset(),
                len: range.len(),
            });
        }
        Ok(())
    }
}

/// A part of a virtual disk that is stored one way.
#[derive(Clone, Debug)]
pub struct Extent {
    /// First byte, as an offset into the virtual disk.
    pub offset: u64,
    /// Length in bytes, never zero.
    pub len: u64,
    /// Where the bytes are.
    pub kind: ExtentKind,
}

/// Where the bytes of an extent are.
#[derive(Clone, Debug)]
pub enum ExtentKind {
    /// In `file`, contiguous from `file_offset` bytes.
    Data {
        /// The file of the layer that holds the bytes.
        file: Arc<File>,
        /// Where in that file, in bytes.
        file_offset: u64,
    },
    /// Described as zero: reads return zeros.
    Zero,
    /// Not described by any layer: reads return zeros.
    Unmapped,
}

/// What a range of a virtual disk is, for callers that need more than its bytes: backups, exports, maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// First byte, as an offset into the virtual disk.
    pub offset: u64,
    /// Length in bytes, never zero.
    pub len: u64,
    /// What it is.
    pub state: ExtentState,
    /// The layer that says so: 0 is the disk itself, 1 its parent.
    pub layer: u32,
    /// Where the bytes are in the file of that layer, if it has them, in bytes.
    pub file_offset: Option<u64>,
}

/// What is known of an extent. All but `Mapped` read as zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExtentState {
    /// A file holds its bytes.
    Mapped,
    /// It was said to be zeros.
    Zero,
    /// It was trimmed; its content means nothing to anyone.
    Unmapped,
    /// Its content was never of interest to anyone.
    Undefined,
    /// No layer says anything.
    Transparent,
}

/// Identifies a resolved request. Passed to [`Disk::finish`] exactly once.
#[must_use = "every resolved request is ended by `Disk::finish`"]
#[derive(Debug, PartialEq, Eq)]
pub struct RequestId(u64);

impl RequestId {
    /// An identifier with a number that means something to the disk that made it.
    pub fn new(number: u64) -> Self {
        Self(number)
    }

    /// The number the disk gave it.
    pub fn number(&self) -> u64 {
        self.0
    }
}

/// Why a request to an open disk failed. The disk stays open; a format says which failures poison it.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The range does not lie inside the disk or is not aligned to the logical sector size.
    #[error("range {offset:#x}+{len:#x} is outside the disk or not aligned to its sectors")]
    Range {
        /// First byte of the range.
        offset: u64,
        /// Its length in bytes.
        len: u64,
    },
    /// A write to a disk that was opened for reading.
    #[error("the disk is open for reading only")]
    ReadOnly,
    /// The host refused an operation on a file of the disk.
    #[error("{operation} failed")]
    Io {
        /// What was tried, such as `extend the file to 0x400000`.
        operation: String,
        /// The error of the host.
        #[source]
        source: std::io::Error,
    },
    /// The file does not say what its format demands.
    #[error("{structure} at file offset {offset:#x} is corrupt: {expected}")]
    Corrupt {
        /// The structure of the format, such as `BAT entry 7`.
        structure: String,
        /// Where it lies in the file, in bytes.
        offset: u64,
        /// What was expected and what was found.
        expected: String,
    },
    /// The bytes of a write would make another format of a raw disk whose format was guessed.
    #[error(
        "the write at {offset:#x} would make the raw disk {name} when it is opened again, since its format was guessed; if its bytes are to be those of the disk whatever they look like, name the format raw"
    )]
    Disguise {
        /// First byte of the sector.
        offset: u64,
        /// What the disk would be taken for, with an article.
        name: &'static str,
    },
    /// A size that the disk cannot be given.
    #[error("size {size} {reason}")]
    Size {
        /// The size in bytes.
        size: u64,
        /// Why not.
        reason: String,
    },
    /// What was asked for cannot be done with this file.
    #[error("{0}")]
    Unsupported(String),
    /// The caller cancelled the operation.
    #[error("cancelled")]
    Cancelled,
    /// An earlier failed sync left in doubt what is durable; the disk serves no more writes until it is opened anew.
    #[error("the disk refuses writes since a sync of its file failed; close and open it again")]
    Poisoned,
}

/// An open virtual disk.
///
/// All methods take `&self` and may be called from several threads. The contract of a request is to resolve it, then
/// the caller's own transfer from or to every `Data` extent that was named, then `finish`: until then the space of
/// those extents is used for nothing else. A write whose range has sectors that are [`Disk::inspected`] begins only
/// when the disk has looked at them. Nothing a write changed is promised to survive a power cut before a `flush` that
/// began after its `finish` has returned.
///
/// It is [`Any`], for the operations that only one format has: see [`Vhdx::of`](crate::vhdx::Vhdx::of).
pub trait Disk: Any + Send + Sync + fmt::Debug {
    /// Size, sector sizes and mode, as they are now.
    fn geometry(&self) -> Geometry;

    /// Appends to `out`, in order and without gaps, the extents that hold `range`.
    ///
    /// # Errors
    /// `Range` where the range is not inside the disk or not sector-aligned; `out` is as it was then.
    fn resolve_read(&self, range: ByteRange, out: &mut Vec<Extent>)
    -> Result<RequestId, DiskError>;

    /// Like [`Disk::resolve_read`], but allocates what is missing, so that every extent appended is `Data`. Bytes of a
    /// newly allocated extent that the caller does not write read as before. May block on the file at the first write
    /// and where the file has to grow.
    ///
    /// # Errors
    /// `Range`, `ReadOnly`, `Poisoned`, and `Io` where the file cannot grow; then `out` is as it was, and so is what a
    /// reader sees.
    fn resolve_write(
        &self,
        range: ByteRange,
        out: &mut Vec<Extent>,
    ) -> Result<RequestId, DiskError>;

    /// The sectors of `range` whose bytes the disk wants to see before they are written, in order: none for most disks.
    /// A writer copies each where others can change it, has [`Disk::inspect`] look at the copy, and writes the copy, so
    /// that what was inspected is what is written.
    fn inspected(&self, range: ByteRange) -> Vec<ByteRange> {
        let _ = range;
        Vec::new()
    }

    /// Whether `bytes` may be written to `sector`, which is one of [`Disk::inspected`].
    ///
    /// # Errors
    /// `Disguise`.
    fn inspect(&self, sector: ByteRange, bytes: &[u8]) -> Result<(), DiskError> {
        let _ = (sector, bytes);
        Ok(())
    }

    /// Ends a resolved request: the transfer of all its extents is complete, or has failed (`ok` is false).
    fn finish(&self, id: RequestId, ok: bool);

    /// The file whose `fdatasync` alone is a flush at this moment; `None` where metadata waits to be written too and
    /// [`Disk::flush`] has to be called.
    fn flush_by_sync(&self) -> Option<Arc<File>>;

    /// Makes every finished write durable. Blocks on the file.
    ///
    /// # Errors
    /// `Io` and `Poisoned`; then durability of what was written since the last flush is unknown.
    fn flush(&self) -> Result<(), DiskError>;

    /// Tells that the content of the range is no longer needed; it reads as zeros or as before. Gives space back where
    /// the format and the file system can. May block on the file.
    ///
    /// # Errors
    /// `Range`, `ReadOnly`, `Poisoned`, `Io`.
    fn discard(&self, range: ByteRange) -> Result<(), DiskError>;

    /// Makes the range read as zeros, without allocating where it does so already. Where `may_unmap` is set the space
    /// behind it may be given back. May block on the file.
    ///
    /// # Errors
    /// `Range`, `ReadOnly`, `Poisoned`, `Io`.
    fn write_zeroes(&self, range: ByteRange, may_unmap: bool) -> Result<(), DiskError>;

    /// Appends to `out`, in order and without gaps, what the range is.
    ///
    /// # Errors
    /// `Range`, and `Io` and `Corrupt` where the format's tables cannot be read; `out` is as it was then.
    fn map(&self, range: ByteRange, out: &mut Vec<Mapping>) -> Result<(), DiskError>;

    /// Brings the file to its clean state (log empty, nothing pending) and makes it durable. The disk serves reads
    /// afterwards; a later write makes it unclean again. Also done, errors logged, when the disk is dropped.
    ///
    /// # Errors
    /// Like [`Disk::flush`].
    fn close(&self) -> Result<(), DiskError>;

    /// Whether no process writes to a file, which an extent of this disk has named, as long as the disk is open as it
    /// is: bytes that were read from it once can be read again.
    fn is_immutable(&self, file: &Arc<File>) -> bool {
        let _ = file;
        false
    }

    /// The files that extents can name, the disk's own first.
    fn files(&self) -> Vec<Arc<File>> {
        Vec::new()
    }
}
