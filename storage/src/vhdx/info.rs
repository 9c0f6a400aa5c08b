//! What a file says of itself.

use std::path::{Path, PathBuf};

use zerocopy::IntoBytes;
use zerocopy::little_endian::U16;

use super::disk::Vhdx;
use super::format::{Guid, SIGNATURE};
use super::identifiers::Identifiers;
use super::locator::ParentLocator;
use super::open::Layer;
use crate::disk::SectorSize;
use crate::file::open_locked;
use crate::lock::OpenMode;
use crate::refusal::OpenError;

/// One file, without its parents.
#[derive(Clone, Debug)]
pub struct Info {
    /// The file.
    pub path: PathBuf,
    /// Size of the virtual disk in bytes.
    pub size: u64,
    /// Length of the file in bytes.
    pub file_bytes: u64,
    /// Bytes that the file takes on the host.
    pub host_bytes: u64,
    /// Bytes of a payload block.
    pub block_size: u64,
    /// Logical sector size.
    pub logical_sector: SectorSize,
    /// Physical sector size.
    pub physical_sector: SectorSize,
    /// Whether all blocks keep their space.
    pub fixed: bool,
    /// Its identifiers.
    pub identifiers: Identifiers,
    /// Whether its log has to be replayed.
    pub dirty: bool,
    /// The program that made it, as the file says.
    pub creator: String,
    /// The parent that it stands on.
    pub parent: Option<ParentLocator>,
    /// The file of the parent, where it is found.
    pub parent_path: Option<PathBuf>,
}

impl Vhdx {
    /// What the file at `path` says of itself. Parents are looked for, and not opened.
    ///
    /// # Errors
    /// See [`Refusal`](crate::Refusal).
    pub fn info(path: &Path) -> Result<Info, OpenError> {
        use std::os::unix::fs::MetadataExt;
        let failed = |reason| OpenError::new(path, reason);
        let file = open_locked(path, OpenMode::ReadOnly).map_err(failed)?;
        let metadata = file
            .metadata()
            .map_err(|e| failed(crate::Refusal::io("look at the file", e)))?;
        let layer = Layer::read(Box::new(file), OpenMode::ReadOnly).map_err(failed)?;
        let header = layer.headers.current();
        let mut creator = [U16::ZERO; 256];
        layer
            .view
            .read(creator.as_mut_bytes(), SIGNATURE.len() as u64)
            .map_err(|e| failed(crate::Refusal::io("read the creator", e)))?;
        let units: Vec<u16> = creator
            .iter()
            .map(|unit| unit.get())
            .take_while(|unit| *unit != 0)
            .collect();
        let parent = layer.metadata.parent.clone();
        let folder = std::path::absolute(path)
            .ok()
            .and_then(|path| path.parent().map(Path::to_owned))
            .unwrap_or_default();
        Ok(Info {
            path: path.to_owned(),
            size: layer.metadata.size,
            file_bytes: metadata.len(),
            host_bytes: metadata.blocks() * 512,
            block_size: layer.layout.block_size,
            logical_sector: layer.metadata.logical_sector,
            physical_sector: layer.metadata.physical_sector,
            fixed: layer.metadata.fixed,
            identifiers: Identifiers {
                file_write_guid: header.file_write_guid,
                data_write_guid: header.data_write_guid,
                virtual_disk_id: layer.metadata.id,
            },
            dirty: header.log_guid != Guid::ZERO,
            creator: String::from_utf16_lossy(&units),
            parent_path: parent.as_ref().and_then(|parent| {
                let candidates = parent.candidates(&folder);
                candidates.into_iter().find(|candidate| candidate.exists())
            }),
            parent,
        })
    }
}
