//! qcow2, read by `imago`: versions 2 and 3, compressed clusters, backing files, files with the data. It refuses by
//! name what it does not know, such as extended L2 entries. Which other files are opened is decided here, not there.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use imago::file::File as ImagoFile;
use imago::raw::Raw;
use imago::{DenyImplicitOpenGate, FormatAccess, FormatDriverBuilder, Mapping};

use super::named::{Chain, NamedFiles};
use super::source::{Source, SourceError};
use crate::blocking::Span;
use crate::open::detect_in;
use crate::signature::SourceFormat;

/// An open image.
pub(super) struct Qcow2 {
    access: FormatAccess<ImagoFile>,
}

/// One file of an image, over the one below it.
type Layer = imago::qcow2::Qcow2<ImagoFile>;

/// Largest disk that is read: the largest that a VHDX can be.
const MAX_SIZE: u64 = 64 << 40;

/// The file as the library takes it. The copy of the descriptor keeps the lock.
fn storage(file: &Arc<File>) -> Result<ImagoFile, SourceError> {
    file.try_clone()
        .and_then(ImagoFile::try_from)
        .map_err(|e| SourceError::io("open the qcow2 image", e))
}

/// An image without what it names.
fn layer(file: &Arc<File>) -> Result<Layer, SourceError> {
    Layer::builder(storage(file)?)
        .backing(None)
        .data_file(None)
        .open(DenyImplicitOpenGate::default())
        .map_err(|e| SourceError::io("open the qcow2 image", e))
}

/// The format of the backing file, as an image of version 2 records it. The library looks for the extensions of its
/// header where those of version 3 are, at 104, and there they begin at 72 ("Header extensions" of QEMU's `qcow2.rst`).
fn format_of_version_2(file: &File) -> Result<Option<String>, SourceError> {
    const VERSION: usize = 4;
    const EXTENSIONS: usize = 72;
    const BACKING_FORMAT: u32 = 0xE279_2ACA;
    let failed = |e| SourceError::io("read the header extensions", e);
    let len = file.metadata().map_err(failed)?.len();
    // Extensions lie in the first cluster, and the smallest has 512 bytes; QEMU puts this one first.
    let mut head = vec![0; len.min(512) as usize];
    file.read_exact_at(&mut head, 0).map_err(failed)?;
    let number = |at: usize| {
        let bytes = head.get(at..at.checked_add(4)?)?;
        Some(u32::from_be_bytes(bytes.try_into().ok()?))
    };
    if number(VERSION) != Some(2) {
        return Ok(None);
    }
    let mut at = EXTENSIONS;
    while let (Some(kind), Some(len)) = (number(at), number(at + 4))
        && kind != 0
    {
        let start = at + 8;
        let Some(data) = head.get(start..start.saturating_add(len as usize)) else {
            break;
        };
        if kind == BACKING_FORMAT {
            return Ok(Some(String::from_utf8_lossy(data).into_owned()));
        }
        at = start + data.len().next_multiple_of(8);
    }
    Ok(None)
}

/// What stands below a layer.
enum Below {
    Nothing,
    Raw(Arc<File>),
    Image(Arc<File>),
}

/// Opens the file that holds a layer's data, where it is not the layer's own.
fn open_data(layer: &mut Layer, chain: &Chain, files: &NamedFiles) -> Result<(), SourceError> {
    if !layer.requires_external_data_file() {
        return Ok(());
    }
    let name = layer.implicit_external_data_file().ok_or_else(|| {
        SourceError::Unsupported(
            "is a qcow2 image whose data lie in another file, which it does not name".into(),
        )
    })?;
    let named = files.open(chain, "file with the data", name)?;
    layer.set_data_file(Some(storage(&named.file)?));
    Ok(())
}

/// Opens the backing file of a layer. Where the layer does not say what format that is, it is guessed, and so names
/// nothing itself.
fn open_backing(
    (layer, file): (&Layer, &File),
    chain: &mut Chain,
    files: &mut NamedFiles,
) -> Result<Below, SourceError> {
    let Some(name) = layer.implicit_backing_file() else {
        return Ok(Below::Nothing);
    };
    let recorded = match layer.implicit_backing_format() {
        Some(format) => Some(format.clone()),
        None => format_of_version_2(file)?,
    };
    let named = files.open(chain, "backing file", name)?;
    let file = chain.push(named);
    let format = match recorded.as_deref() {
        Some("raw" | "file") => SourceFormat::Raw,
        Some("qcow2") => SourceFormat::Qcow2,
        Some(other) => return Err(other_backing(other)),
        None => {
            let found = detect_in(&file).map_err(|reason| SourceError::Named {
                what: "backing file",
                name: name.clone(),
                reason: reason.into(),
            })?;
            *files = NamedFiles::Guessed(found);
            found
        }
    };
    match format {
        SourceFormat::Raw => Ok(Below::Raw(file)),
        SourceFormat::Qcow2 => Ok(Below::Image(file)),
        SourceFormat::Vhdx | SourceFormat::Vhd | SourceFormat::Vmdk => {
            Err(other_backing(format.name()))
        }
    }
}

fn other_backing(format: &str) -> SourceError {
    SourceError::Unsupported(format!(
        "is a qcow2 image on a backing file of the format {format:?}; raw and qcow2 can be read"
    ))
}

impl Qcow2 {
    pub(super) fn open(
        file: &Arc<File>,
        mut chain: Chain,
        mut files: NamedFiles,
    ) -> Result<Self, SourceError> {
        // From the top down, one after the other, as far as the chain may go.
        let mut above = Vec::new();
        let mut file = Arc::clone(file);
        let mut image = layer(&file)?;
        let base = loop {
            open_data(&mut image, &chain, &files)?;
            match open_backing((&image, &file), &mut chain, &mut files)? {
                Below::Nothing => break None,
                Below::Raw(base) => break Some(base),
                Below::Image(below) => {
                    above.push(std::mem::replace(&mut image, layer(&below)?));
                    file = below;
                }
            }
        };
        if let Some(file) = base {
            let raw = Raw::builder(storage(&file)?)
                .open(DenyImplicitOpenGate::default())
                .map_err(|e| SourceError::io("open the backing file", e))?;
            image.set_backing(Some(FormatAccess::new(raw)));
        }
        for mut over in above.into_iter().rev() {
            over.set_backing(Some(FormatAccess::new(image)));
            image = over;
        }
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
        Ok(Self { access })
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
