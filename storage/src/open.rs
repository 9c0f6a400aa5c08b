//! Opening a disk, whatever its format.

use std::fs::{File, FileType};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::OFlags;

use crate::disk::Disk;
use crate::foreign::signature::{self, Reader, Signature, SourceFormat};
use crate::lock::{self, OpenMode};
use crate::raw::Raw;
use crate::refusal::{OpenError, Refusal};
use crate::vhdx::{self, Vhdx};

/// The format of a disk's file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// The file is the disk.
    Raw,
    /// [MS-VHDX].
    Vhdx,
}

/// How to open a disk.
#[derive(Clone, Debug)]
pub struct OpenOptions {
    /// Open for reading alone; the file is shared with other readers and never written.
    pub read_only: bool,
    /// The format. `None` looks for signatures: it knows VHDX, refuses the containers of other formats, and takes
    /// everything else as raw. Right for files that their owner made, but name the format of a raw disk that a
    /// guest can write, since the guest decides what its first bytes look like.
    pub format: Option<Format>,
    /// Where the parents of a differencing disk may lie.
    pub parents: Parents,
    /// Read a child whose parent has changed since it was made. What is read may never have been on the disk. Only with
    /// `read_only`.
    pub ignore_changed_parents: bool,
    /// Give space that is freed back to the host at once, rather than keep it for the next block.
    pub punch_holes: bool,
}

impl Default for OpenOptions {
    fn default() -> Self {
        Self {
            read_only: false,
            format: None,
            parents: Parents::default(),
            ignore_changed_parents: false,
            punch_holes: true,
        }
    }
}

impl From<OpenMode> for OpenOptions {
    fn from(mode: OpenMode) -> Self {
        Self {
            read_only: mode.is_read_only(),
            ..Self::default()
        }
    }
}

impl OpenOptions {
    /// To open for reading alone.
    pub fn read_only() -> Self {
        Self {
            read_only: true,
            ..Self::default()
        }
    }

    /// What these options open a file for.
    pub fn mode(&self) -> OpenMode {
        if self.read_only {
            OpenMode::ReadOnly
        } else {
            OpenMode::ReadWrite
        }
    }
}

/// Where the parents of a differencing disk may lie. The disk's own file says which files they are, so whoever made it
/// could name any file of the host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Parents {
    /// Anywhere: for disks of an owner who is trusted.
    #[default]
    Anywhere,
    /// In this folder or below, links followed.
    Within(PathBuf),
    /// A disk with a parent is refused.
    Nowhere,
}

/// Opens and locks the disk in the file at `path`. Nothing is written to a file that is refused.
///
/// # Errors
/// See [`Refusal`].
pub fn open(path: impl AsRef<Path>, options: &OpenOptions) -> Result<Arc<dyn Disk>, OpenError> {
    let path = path.as_ref();
    let failed = |reason| OpenError::new(path, reason);
    let file = open_locked(path, options.mode()).map_err(failed)?;
    let format = match options.format {
        Some(format) => format,
        None => detect_in(&file).and_then(usable).map_err(failed)?,
    };
    Ok(match format {
        Format::Raw => Arc::new(Raw::new(file, options.mode()).map_err(failed)?),
        Format::Vhdx => Arc::new(Vhdx::open_chain(path, file, options)?),
    })
}

/// Opens a regular file and locks it. Never waits, neither for the other end of a FIFO nor for a lock.
pub(crate) fn open_locked(path: &Path, mode: OpenMode) -> Result<Arc<File>, Refusal> {
    let file = open_unlocked(path, mode)?;
    lock::lock(&file, mode).map_err(Refusal::Locked)?;
    Ok(Arc::new(file))
}

fn open_unlocked(path: &Path, mode: OpenMode) -> Result<File, Refusal> {
    let cannot = |error| Refusal::io("open the file", error);
    // Looked at before it is opened, because opening a device can have effects of its own, and after, because the
    // name may have come to mean another file.
    check_kind(std::fs::metadata(path).map_err(cannot)?.file_type())?;
    let file = File::options()
        .read(true)
        .write(!mode.is_read_only())
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(path)
        .map_err(cannot)?;
    check_kind(file.metadata().map_err(cannot)?.file_type())?;
    // io_uring answers `EAGAIN` instead of waiting where the file is non-blocking.
    let flags = rustix::fs::fcntl_getfl(&file).map_err(|e| cannot(e.into()))?;
    rustix::fs::fcntl_setfl(&file, flags - OFlags::NONBLOCK).map_err(|e| cannot(e.into()))?;
    Ok(file)
}

fn check_kind(kind: FileType) -> Result<(), Refusal> {
    let found = if kind.is_file() {
        return Ok(());
    } else if kind.is_dir() {
        "a directory"
    } else if kind.is_fifo() {
        "a FIFO"
    } else if kind.is_block_device() {
        "a block device"
    } else if kind.is_char_device() {
        "a character device"
    } else if kind.is_socket() {
        "a socket"
    } else {
        "no regular file"
    };
    Err(Refusal::FileKind { found })
}

/// What the file at `path` is, by its signature; raw where it has none that is known. The file is not locked, so that
/// of a disk in use can be asked.
///
/// # Errors
/// `Io`, `FileKind`; `Container` where it is one that cannot be read here; `Corrupt` where it is a VHDX with another
/// identifier.
pub fn detect(path: &Path) -> Result<SourceFormat, OpenError> {
    open_unlocked(path, OpenMode::ReadOnly)
        .and_then(|file| detect_in(&file))
        .map_err(|reason| OpenError::new(path, reason))
}

/// As [`detect`], of a file that is open.
pub(crate) fn detect_in(file: &File) -> Result<SourceFormat, Refusal> {
    let unreadable = |e| Refusal::io("read the signature", e);
    if let Some(Signature { name, reader, .. }) = signature::recognise(file).map_err(unreadable)? {
        return match *reader {
            Reader::Here(format) => Ok(format),
            Reader::Elsewhere(program) => Err(Refusal::Container { name, program }),
        };
    }
    // A VHDX whose first bytes are damaged must not reach a guest as a raw disk.
    for offset in vhdx::HEADER_OFFSETS {
        if signature::is_at(file, offset, vhdx::HEADER_SIGNATURE).map_err(unreadable)? {
            return Err(Refusal::corrupt(
                "VHDX file identifier",
                0,
                format!(
                    "expected \"vhdxfile\", as there is a VHDX header at {offset:#x}; name the format if the disk is raw"
                ),
            ));
        }
    }
    Ok(SourceFormat::Raw)
}

/// The format of a disk that is to be used as it is, not converted.
fn usable(format: SourceFormat) -> Result<Format, Refusal> {
    let name = match format {
        SourceFormat::Raw => return Ok(Format::Raw),
        SourceFormat::Vhdx => return Ok(Format::Vhdx),
        SourceFormat::Qcow2 => "a qcow2 image",
        SourceFormat::Vhd => "a VHD",
        SourceFormat::Vmdk => "a VMDK",
    };
    let program = "coppice disk convert";
    Err(Refusal::Container { name, program })
}
