//! qcow2, read by `imago`.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use imago::file::File as ImagoFile;
use imago::format::builder::FormatDriverBuilder;
use imago::format::gate::ImplicitOpenGate;
use imago::{FormatAccess, Mapping, StorageOpenOptions};

use super::{Run, Source, SourceError, beside};

/// An open image.
pub(super) struct Qcow2 {
    access: FormatAccess<ImagoFile>,
    /// Keeps the lock.
    _file: Arc<File>,
}

/// Opens what an image names only where that lies beside it.
struct Beside<'a>(&'a Path);

impl Beside<'_> {
    fn check(&self, name: Option<&Path>) -> std::io::Result<()> {
        let name = name.and_then(Path::to_str).unwrap_or_default();
        match beside(self.0, name) {
            Ok(_) => Ok(()),
            Err(e) => Err(std::io::Error::new(
                std::io::ErrorKind::PermissionDenied,
                e.to_string(),
            )),
        }
    }
}

impl ImplicitOpenGate<ImagoFile> for Beside<'_> {
    fn open_format<F: FormatDriverBuilder<ImagoFile>>(
        &mut self,
        builder: F,
    ) -> std::io::Result<FormatAccess<ImagoFile>> {
        self.check(builder.get_image_path().as_deref())?;
        Ok(FormatAccess::new(builder.open(Beside(self.0))?))
    }

    fn open_storage(&mut self, builder: StorageOpenOptions) -> std::io::Result<ImagoFile> {
        self.check(builder.get_filename())?;
        imago::Storage::open(builder)
    }
}

impl Qcow2 {
    pub(super) fn open(path: &Path, file: Arc<File>) -> Result<Self, SourceError> {
        let failed = |e| SourceError::io("open the qcow2 image", e);
        let image = imago::qcow2::Qcow2::<ImagoFile>::builder_path(path)
            .open(Beside(path))
            .map_err(failed)?;
        Ok(Self {
            access: FormatAccess::new(image),
            _file: file,
        })
    }
}

impl Source for Qcow2 {
    fn size(&self) -> u64 {
        self.access.size()
    }

    fn run_at(&mut self, offset: u64) -> Result<Run, SourceError> {
        let left = self.access.size() - offset;
        let (mapping, len) = self
            .access
            .get_mapping(offset, left)
            .map_err(|e| SourceError::io(format!("look up the image at {offset:#x}"), e))?;
        let is_data = !matches!(mapping, Mapping::Zero { .. } | Mapping::Eof { .. });
        Ok(Run {
            // A mapping is never empty inside the disk; a step of one sector would still end.
            len: len.clamp(1, left),
            is_data,
        })
    }

    fn read_at(&mut self, buffer: &mut [u8], offset: u64) -> Result<(), SourceError> {
        self.access
            .read(buffer, offset)
            .map_err(|e| SourceError::io(format!("read the image at {offset:#x}"), e))
    }
}
