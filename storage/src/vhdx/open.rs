//! Opening a file and its parents: all is checked before anything is written.

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64};

use parking_lot::{Condvar, Mutex};

use super::bat::{self, Found, Layout};
use super::disk::Vhdx;
use super::format::Guid;
use super::header::{self, Headers};
use super::in_flight::RequestsInFlight;
use super::locator::ParentLocator;
use super::log::sequence;
use super::metadata::Metadata;
use super::pages::Pages;
use super::region::{Region, Regions};
use super::space::Space;
use super::state::{Commit, Level, State};
use super::view::View;
use crate::disk::{ByteRange, DiskError, Geometry, SectorSize};
use crate::file::open_locked;
use crate::lock::OpenMode;
use crate::medium::Medium;
use crate::options::{OpenOptions, Parents};
use crate::refusal::{OpenError, ParentRefusal, Refusal};

impl Vhdx {
    /// Opens and locks the VHDX at `path`, and its parents for reading. A log that has to be replayed is replayed into
    /// the file where that is opened for writing; apart from that nothing is written.
    ///
    /// # Errors
    /// See [`Refusal`]; the file that is named may be one of the parents.
    pub fn open(path: impl AsRef<Path>, options: &OpenOptions) -> Result<Self, OpenError> {
        let path = path.as_ref();
        let file = open_locked(path, options.mode()).map_err(|e| OpenError::new(path, e))?;
        Self::open_chain(path, file, options)
    }

    /// Opens the VHDX in a file that is open and locked, and its parents.
    pub(crate) fn open_chain(
        path: &Path,
        file: Arc<File>,
        options: &OpenOptions,
    ) -> Result<Self, OpenError> {
        Self::open_layers(path, file, options, OpenMode::ReadOnly)
    }

    /// Opens the child at `path` and its parent, both for writing, and what is below for reading.
    pub(super) fn open_with_parent_for_writing(
        path: &Path,
        options: &OpenOptions,
    ) -> Result<Self, OpenError> {
        let file = open_locked(path, OpenMode::ReadWrite).map_err(|e| OpenError::new(path, e))?;
        Self::open_layers(path, file, options, OpenMode::ReadWrite)
    }

    /// Opens the VHDX in a file that is open and locked for reading, and its parents, although entries of its BAT may
    /// lead nowhere. Gives the ranges of such blocks too, in order, which are not to be read: their entries may name
    /// what belongs to others.
    pub(crate) fn open_damaged(
        path: &Path,
        file: Arc<File>,
        options: &OpenOptions,
    ) -> Result<(Self, Vec<ByteRange>), OpenError> {
        let failed = |e| OpenError::new(path, e);
        let identity = identity(&file).map_err(failed)?;
        let mut bad = Vec::new();
        let mut note = |index, _| {
            bad.push(index);
            Ok(())
        };
        let mode = OpenMode::ReadOnly;
        let top = Layer::read_with(Box::new(file), mode, Some(&mut note)).map_err(failed)?;
        let lost = top.layout.ranges(bad, top.metadata.size);
        let disk = Self::on_parents(path, (top, identity), options, mode)?;
        Ok((disk, lost))
    }

    fn open_layers(
        path: &Path,
        file: Arc<File>,
        options: &OpenOptions,
        parent_mode: OpenMode,
    ) -> Result<Self, OpenError> {
        let failed = |e| OpenError::new(path, e);
        let identity = identity(&file).map_err(failed)?;
        let top = Layer::read(Box::new(file), options.mode()).map_err(failed)?;
        Self::on_parents(path, (top, identity), options, parent_mode)
    }

    /// Opens the parents of a layer, whose file has this identity, and makes the disk.
    fn on_parents(
        path: &Path,
        (top, identity): (Layer, (u64, u64)),
        options: &OpenOptions,
        parent_mode: OpenMode,
    ) -> Result<Self, OpenError> {
        let mode = options.mode();
        let failed = |e| OpenError::new(path, e);
        let mut chain = Chain {
            options,
            seen: HashMap::from([(identity, path.to_owned())]),
        };
        // From the top down, so that nothing is written before all is known to be sound.
        let mut parents = Vec::new();
        let mut child = (path.to_owned(), &top);
        while child.1.metadata.parent.is_some() {
            let (name, layer) = child;
            let mode = if parents.is_empty() {
                parent_mode
            } else {
                OpenMode::ReadOnly
            };
            let parent = chain
                .parent_of(&name, layer, mode)
                .map_err(|e| OpenError::new(&name, e))?;
            parents.push(parent);
            child = match parents.last() {
                Some((name, layer)) => (name.clone(), layer),
                None => break,
            };
        }
        let mut below = None;
        for (depth, (name, layer)) in parents.into_iter().enumerate().rev() {
            let mode = if depth == 0 {
                parent_mode
            } else {
                OpenMode::ReadOnly
            };
            let parent = layer
                .finish(mode, below, options.punch_holes)
                .map_err(|e| OpenError::new(&name, e))?;
            below = Some(Arc::new(parent));
        }
        top.finish(mode, below, options.punch_holes).map_err(failed)
    }

    /// Opens the VHDX in a file that is open and locked for `mode`, over a parent that is open.
    #[cfg(any(test, feature = "fuzzing"))]
    pub(crate) fn from_medium(
        medium: Box<dyn Medium>,
        mode: OpenMode,
        parent: Option<Arc<Self>>,
    ) -> Result<Self, Refusal> {
        let layer = Layer::read(medium, mode)?;
        match (&layer.metadata.parent, &parent) {
            (None, None) => {}
            (Some(locator), Some(parent)) => {
                let found = parent.identifiers().data_write_guid;
                if !locator.links_to(found) {
                    return Err(ParentRefusal::Changed {
                        parent: PathBuf::new(),
                        expected: locator.linkage,
                        found,
                    }
                    .into());
                }
            }
            (None, Some(_)) | (Some(_), None) => {
                return Err(Refusal::Unsupported("a child without its parent".into()));
            }
        }
        layer.finish(mode, parent, true)
    }
}

/// A file whose structures have been read, down to the metadata, and not yet its blocks.
struct Described {
    view: View,
    headers: Headers,
    regions: Regions,
    metadata: Metadata,
    file_len: u64,
}

impl Described {
    /// Reads a file as it is once its log has been replayed. Nothing is written.
    fn read(medium: Box<dyn Medium>) -> Result<Self, Refusal> {
        let file_len = medium
            .len()
            .map_err(|e| Refusal::io("read the length", e))?;
        if file_len == 0 {
            return Err(Refusal::Empty);
        }
        header::check_identifier(&*medium).map_err(|e| truncated(e, file_len))?;
        let headers = Headers::read(&*medium, file_len)?;
        let log = Region {
            offset: headers.current().log_offset,
            length: headers.current().log_length,
        };
        let log_guid = headers.current().log_guid;

        let mut view = View::new(medium, file_len);
        if log_guid != Guid::ZERO {
            let read = |buffer: &mut [u8], offset| view.medium.read_exact_at(buffer, offset);
            let replay = sequence::read(&read, log, log_guid, file_len)?;
            view.lay_over(&replay.patches, replay.len);
        }
        let read = |buffer: &mut [u8], offset| view.read(buffer, offset);
        let regions = Regions::read(&read, log, view.len())?;
        let metadata = Metadata::read(&read, regions.metadata)?;
        Ok(Self {
            view,
            headers,
            regions,
            metadata,
            file_len,
        })
    }
}

/// The parent that the VHDX in a file stands on, as that file describes it, where it stands on one. The file is neither
/// locked nor written to.
///
/// # Errors
/// See [`Refusal`].
pub fn parent_locator(file: File) -> Result<Option<ParentLocator>, Refusal> {
    Ok(Described::read(Box::new(Arc::new(file)))?.metadata.parent)
}

/// The DataWriteGuid of the VHDX in a file, by which its children know it ([MS-VHDX] 2.2.2). Nothing but the two
/// headers is read, and their places are the same in all files.
///
/// # Errors
/// See [`Refusal`].
pub fn data_write_guid(file: File) -> Result<Guid, Refusal> {
    let len = file
        .metadata()
        .map_err(|e| Refusal::io("read the length", e))?
        .len();
    Ok(Headers::read(&Arc::new(file), len)?
        .current()
        .data_write_guid)
}

/// A file whose structures have been read and found sound; nothing is written yet.
pub(super) struct Layer {
    pub view: View,
    pub headers: Headers,
    pub regions: Regions,
    pub metadata: Metadata,
    pub layout: Layout,
    pub found: Found,
    pub file_len: u64,
}

impl Layer {
    /// Reads and checks a file that is open and locked for `mode`.
    pub(super) fn read(medium: Box<dyn Medium>, mode: OpenMode) -> Result<Self, Refusal> {
        Self::read_with(medium, mode, None)
    }

    /// As [`Layer::read`]; `bad` is called with each bad entry of the BAT, if it is given.
    pub(super) fn read_with(
        medium: Box<dyn Medium>,
        mode: OpenMode,
        bad: Option<bat::Bad<'_>>,
    ) -> Result<Self, Refusal> {
        let Described {
            view,
            headers,
            regions,
            metadata,
            file_len,
        } = Described::read(medium)?;
        let layout = Layout::new(&metadata, regions.bat)?;
        let found = match bad {
            Some(bad) => bat::check_with(&view, &layout, &regions.all, bad)?,
            None => bat::check(&view, &layout, &regions.all)?,
        };
        if mode.is_read_only() {
            check_payload_untouched(&view, &regions, &found)?;
        } else {
            headers.check_room()?;
        }
        Ok(Self {
            view,
            headers,
            regions,
            metadata,
            layout,
            found,
            file_len,
        })
    }

    /// Takes all of the file for described, so that nothing is cut off its end when it is closed.
    pub(super) fn keep_length(&mut self) {
        self.found.end = self.found.end.max(self.file_len);
    }

    /// The parent that the disk stands on.
    pub(super) fn locator(&self) -> Option<&ParentLocator> {
        self.metadata.parent.as_ref()
    }

    fn geometry(&self) -> Geometry {
        Geometry {
            size: self.metadata.size,
            logical_sector: self.metadata.logical_sector,
            physical_sector: self.metadata.physical_sector,
            // What the file system frees under a part of a block.
            discard_granularity: SectorSize::B4096.bytes(),
            read_only: true,
        }
    }

    /// Whether a disk of this geometry, in the file at `path`, can be the parent.
    pub(super) fn check_parent(&self, parent: &Geometry, path: &Path) -> Result<(), ParentRefusal> {
        let own = &self.metadata;
        if parent.logical_sector != own.logical_sector {
            return Err(ParentRefusal::SectorSize {
                parent: path.to_owned(),
                expected: own.logical_sector.bytes(),
                found: parent.logical_sector.bytes(),
            });
        }
        if parent.size > own.size {
            return Err(ParentRefusal::Size {
                parent: path.to_owned(),
                child: own.size,
                found: parent.size,
            });
        }
        Ok(())
    }

    /// Replays the log, where the file is open for writing, and makes the disk.
    pub(super) fn finish(
        self,
        mode: OpenMode,
        parent: Option<Arc<Vhdx>>,
        punch_holes: bool,
    ) -> Result<Vhdx, Refusal> {
        let geometry = Geometry {
            read_only: mode.is_read_only(),
            ..self.geometry()
        };
        let Self {
            mut view,
            mut headers,
            regions,
            metadata,
            layout,
            found,
            file_len,
        } = self;
        if !mode.is_read_only() && headers.current().log_guid != Guid::ZERO {
            replay(&mut view, &mut headers)?;
        }
        tracing::debug!(
            size = metadata.size,
            block_size = metadata.block_size,
            fixed = metadata.fixed,
            id = %metadata.id,
            data_write_guid = %headers.current().data_write_guid,
            "opened a VHDX"
        );
        Ok(Vhdx {
            geometry,
            id: metadata.id,
            size: AtomicU64::new(metadata.size),
            frozen: AtomicBool::new(false),
            block_size: layout.block_size,
            readable_end: if mode.is_read_only() {
                file_len
            } else {
                u64::MAX
            },
            fixed: metadata.fixed,
            punch_holes,
            view,
            state: Mutex::new(State {
                layout,
                locator: metadata.parent,
                pages: Pages::default(),
                space: Space::of(&found),
                in_flight: RequestsInFlight::default(),
                writes: HashMap::new(),
                below: HashMap::new(),
                next_write: 0,
                announced: Level::Untouched,
                poisoned: false,
                unsynced: false,
                ordered: false,
                excluded: None,
            }),
            changed: Condvar::new(),
            growth: Mutex::new(()),
            commit: Mutex::new(Commit {
                headers,
                metadata: regions.metadata,
                regions: regions.all,
                log: None,
                announced: Level::Untouched,
                damaged_region_table: regions.damaged_copy,
                flushed: 0,
                unapplied: Vec::new(),
            }),
            flushes: AtomicU64::new(0),
            parent,
        })
    }
}

/// A file of the host, whatever its name: device and inode.
fn identity(file: &File) -> Result<(u64, u64), Refusal> {
    let metadata = file
        .metadata()
        .map_err(|e| Refusal::io("look at the file", e))?;
    Ok((metadata.dev(), metadata.ino()))
}

/// The files of a chain, as far as they are known.
struct Chain<'a> {
    options: &'a OpenOptions,
    seen: HashMap<(u64, u64), PathBuf>,
}

impl Chain<'_> {
    /// Finds, opens and checks the parent of a layer.
    fn parent_of(
        &mut self,
        child: &Path,
        layer: &Layer,
        mode: OpenMode,
    ) -> Result<(PathBuf, Layer), Refusal> {
        let Some(locator) = &layer.metadata.parent else {
            return Err(Refusal::Unsupported("the disk has no parent".into()));
        };
        let folder = std::path::absolute(child)
            .ok()
            .and_then(|path| path.parent().map(Path::to_owned))
            .unwrap_or_default();
        let mut tried = Vec::new();
        let mut refused = None;
        for candidate in locator.candidates(&folder) {
            match self.open_parent(&candidate, layer, locator, mode) {
                Ok(parent) => return Ok((candidate, parent)),
                Err(ParentRefusal::Missing { .. }) => tried.push(candidate),
                Err(other) => {
                    // The next path may lead to the right file.
                    refused.get_or_insert(other);
                }
            }
        }
        Err(refused
            .unwrap_or_else(|| ParentRefusal::Missing {
                tried,
                recorded: locator
                    .paths()
                    .map(|(key, path)| format!("{key} {path:?}"))
                    .collect(),
            })
            .into())
    }

    fn open_parent(
        &mut self,
        path: &Path,
        child: &Layer,
        locator: &ParentLocator,
        mode: OpenMode,
    ) -> Result<Layer, ParentRefusal> {
        let missing = || ParentRefusal::Missing {
            tried: Vec::new(),
            recorded: Vec::new(),
        };
        let found = std::fs::canonicalize(path).map_err(|_| missing())?;
        match &self.options.parents {
            Parents::Anywhere => {}
            Parents::Within(folder) => {
                let allowed =
                    std::fs::canonicalize(folder).is_ok_and(|folder| found.starts_with(folder));
                if !allowed {
                    return Err(ParentRefusal::Forbidden {
                        parent: found,
                        allowed: Some(folder.clone()),
                    });
                }
            }
            Parents::Nowhere => {
                return Err(ParentRefusal::Forbidden {
                    parent: found,
                    allowed: None,
                });
            }
        }
        let unusable = |reason: Refusal| ParentRefusal::Unusable {
            parent: path.to_owned(),
            reason: Box::new(reason),
        };
        // Before it is locked: a cycle would wait for itself.
        let metadata =
            std::fs::metadata(path).map_err(|e| unusable(Refusal::io("open the file", e)))?;
        if let Some(other) = self.seen.get(&(metadata.dev(), metadata.ino())) {
            return Err(ParentRefusal::Cycle {
                parent: path.to_owned(),
                other: other.clone(),
            });
        }
        let file = open_locked(path, mode).map_err(unusable)?;
        let identity = identity(&file).map_err(unusable)?;
        let layer = Layer::read(Box::new(file), mode).map_err(unusable)?;
        let found = layer.headers.current().data_write_guid;
        if !locator.links_to(found) {
            if !(self.options.ignore_changed_parents && self.options.read_only) {
                return Err(ParentRefusal::Changed {
                    parent: path.to_owned(),
                    expected: locator.linkage,
                    found,
                });
            }
            tracing::warn!(
                parent = %path.display(),
                expected = %locator.linkage,
                found = %found,
                "reading a child whose parent has changed: what it reads may never have been on the disk"
            );
        }
        child.check_parent(&layer.geometry(), path)?;
        self.seen.insert(identity, path.to_owned());
        Ok(layer)
    }
}

/// A short file ends inside a structure; say that rather than what the read said.
fn truncated(refusal: Refusal, file_len: u64) -> Refusal {
    match refusal {
        Refusal::Io { source, .. } if source.kind() == std::io::ErrorKind::UnexpectedEof => {
            Refusal::corrupt(
                "file identifier",
                0,
                format!("expected \"vhdxfile\", found a file of {file_len} bytes"),
            )
        }
        other => other,
    }
}

/// Payload of a file that is read goes past the view, so the log must have nothing to say about it.
fn check_payload_untouched(view: &View, regions: &Regions, found: &Found) -> Result<(), Refusal> {
    let first_mib = Region {
        offset: 0,
        length: super::format::MIB,
    };
    // They do not overlap, so that the last one that begins before a patch is the only one that it can lie in.
    let mut described: Vec<Region> = std::iter::once(&first_mib)
        .chain(&regions.all)
        .chain(&found.bitmaps)
        .copied()
        .collect();
    described.sort_unstable_by_key(|region| region.offset);
    for patch in view.patches() {
        let next = described.partition_point(|region| region.offset <= patch.offset());
        let last = next.checked_sub(1).and_then(|last| described.get(last));
        if last.is_none_or(|region| patch.end() > region.end()) {
            return Err(Refusal::Unsupported(format!(
                "the log changes the payload at file offset {:#x}; open the file once for writing to replay it",
                patch.offset()
            )));
        }
    }
    Ok(())
}

/// Replays the log into the file, after an identifier that says that the file changes. The identifier of the log goes
/// only when all is durable.
fn replay(view: &mut View, headers: &mut Headers) -> Result<(), Refusal> {
    tracing::info!(
        changes = view.changes(),
        "replaying the log of a VHDX that was not closed"
    );
    let refused = |e| match e {
        DiskError::Io { operation, source } => Refusal::io(operation, source),
        other => Refusal::Unsupported(report::chain(&other).to_string()),
    };
    let file_write_guid = Guid::random();
    headers
        .update(&*view.medium, |header| {
            header.file_write_guid = file_write_guid;
        })
        .map_err(refused)?;
    view.write_out()
        .map_err(|e| Refusal::io("replay the log", e))?;
    for _ in 0..2 {
        headers
            .update(&*view.medium, |header| header.log_guid = Guid::ZERO)
            .map_err(refused)?;
    }
    Ok(())
}
