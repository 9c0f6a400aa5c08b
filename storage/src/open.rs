//! Opening a disk, whatever its format.

use std::any::Any;
use std::fs::{File, Metadata};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;

use crate::disk::Disk;
use crate::file::{open_locked_of, open_unlocked};
use crate::lock::OpenMode;
use crate::medium::is_block_device;
use crate::options::{Format, OpenOptions};
use crate::raw::Raw;
use crate::refusal::{OpenError, Refusal};
use crate::signature::{self, Reader, Signature, SourceFormat};
use crate::vhdx::{self, Vhdx};

/// Opens and locks the disk in the file at `path`. Nothing is written to a file that is refused. A raw disk whose
/// format was guessed refuses writes that would make it one of another format
/// ([`DiskError::Disguise`](crate::DiskError)).
///
/// # Errors
/// See [`Refusal`].
pub fn open(path: impl AsRef<Path>, options: &OpenOptions) -> Result<Arc<dyn Disk>, OpenError> {
    let path = path.as_ref();
    let failed = |reason| OpenError::new(path, reason);
    let file = open_locked_of(path, options.mode(), options.kinds).map_err(failed)?;
    let format = match options.format {
        Some(format) => format,
        None => detect_in(&file).and_then(usable).map_err(failed)?,
    };
    Ok(match format {
        Format::Raw => {
            let disk = Raw::new(file, options.mode()).map_err(failed)?;
            let is_named = options.format.is_some();
            Arc::new(if is_named { disk } else { disk.guessed() })
        }
        Format::Vhdx if is_block_device(&file) => {
            return Err(failed(Refusal::FileKind {
                found: "a block device, which can be nothing but raw",
            }));
        }
        Format::Vhdx => Arc::new(Vhdx::open_chain(path, file, options)?),
    })
}

/// A raw disk that is open, with the size that its file has now: for a file, or a block device, at `path` that was made
/// larger or smaller. `None` where the disk is another one, or in another format, which knows its size by itself.
///
/// # Errors
/// `Io`, `Empty`, `RawSize`.
pub fn remeasure(disk: &Arc<dyn Disk>, path: &Path) -> Result<Option<Arc<dyn Disk>>, OpenError> {
    let any: Arc<dyn Any + Send + Sync> = disk.clone();
    let Ok(raw) = any.downcast::<Raw>() else {
        return Ok(None);
    };
    let failed = |reason| OpenError::new(path, reason);
    let inode = |metadata: Metadata| (metadata.dev(), metadata.ino());
    let unreadable = |error| failed(Refusal::io("look at the file", error));
    let named = std::fs::metadata(path).map_err(unreadable)?;
    let own = disk.files().first().map(|file| file.metadata());
    let is_same = match own {
        Some(own) => inode(own.map_err(unreadable)?) == inode(named),
        None => false,
    };
    if !is_same {
        return Ok(None);
    }
    Ok(Some(Arc::new(raw.remeasured().map_err(failed)?)))
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
