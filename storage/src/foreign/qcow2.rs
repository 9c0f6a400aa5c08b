//! qcow2, read by `imago`: versions 2 and 3, compressed clusters, backing files. It refuses by name what it does not
//! know, such as extended L2 entries.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use imago::file::File as ImagoFile;
use imago::format::builder::FormatDriverBuilder;
use imago::format::gate::ImplicitOpenGate;
use imago::{FormatAccess, Mapping, StorageOpenOptions};

use super::source::{Source, SourceError};
use crate::blocking::Span;

/// An open image.
pub(super) struct Qcow2 {
    access: FormatAccess<ImagoFile>,
    /// Keeps the lock.
    _file: Arc<File>,
}

/// Largest disk that is read: the largest that a VHDX can be.
const MAX_SIZE: u64 = 64 << 40;

/// Opens what an image names only where that lies in this folder or below, and for reading alone.
#[derive(Clone)]
struct Beside(PathBuf);

impl Beside {
    /// The file itself, whatever links lead to it.
    fn check(&self, name: Option<&Path>) -> io::Result<PathBuf> {
        let refused = |what: String| io::Error::new(io::ErrorKind::PermissionDenied, what);
        let name =
            name.ok_or_else(|| refused("the image needs something without a name".into()))?;
        let found = name.canonicalize()?;
        if !found.starts_with(&self.0) {
            return Err(refused(format!(
                "it names {}, which does not lie in {} or below; only such files are opened",
                found.display(),
                self.0.display()
            )));
        }
        // Not what waits for somebody else, or has effects of its own.
        if !found.metadata()?.is_file() {
            return Err(refused(format!("{} is no regular file", found.display())));
        }
        Ok(found)
    }
}

impl ImplicitOpenGate<ImagoFile> for Beside {
    fn open_format<F: FormatDriverBuilder<ImagoFile>>(
        &mut self,
        builder: F,
    ) -> io::Result<FormatAccess<ImagoFile>> {
        self.check(builder.get_image_path().as_deref())?;
        Ok(FormatAccess::new(builder.open(self.clone())?))
    }

    fn open_storage(&mut self, builder: StorageOpenOptions) -> io::Result<ImagoFile> {
        let found = self.check(builder.get_filename())?;
        imago::Storage::open(builder.filename(found).write(false))
    }
}

impl Qcow2 {
    pub(super) fn open(path: &Path, file: Arc<File>) -> Result<Self, SourceError> {
        let failed = |e| SourceError::io("open the qcow2 image", e);
        let path = path.canonicalize().map_err(failed)?;
        let folder = path.parent().map(Path::to_owned).unwrap_or_default();
        let image = imago::qcow2::Qcow2::<ImagoFile>::builder_path(&path)
            .open(Beside(folder))
            .map_err(failed)?;
        let access = FormatAccess::new(image);
        if access.size() > MAX_SIZE {
            return Err(SourceError::corrupt(
                "qcow2 header",
                24,
                format!(
                    "expected a disk of up to 64 TiB, found {:#x} bytes",
                    access.size()
                ),
            ));
        }
        Ok(Self {
            access,
            _file: file,
        })
    }
}

impl Source for Qcow2 {
    fn size(&self) -> u64 {
        self.access.size()
    }

    fn span_at(&mut self, offset: u64) -> Result<Span, SourceError> {
        let left = self.access.size() - offset;
        let (mapping, len) = self
            .access
            .get_mapping(offset, left)
            .map_err(|e| SourceError::io(format!("look up the image at {offset:#x}"), e))?;
        let is_data = !matches!(mapping, Mapping::Zero { .. } | Mapping::Eof { .. });
        Ok(Span {
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
