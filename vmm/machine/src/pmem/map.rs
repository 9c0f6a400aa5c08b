//! The memory that shows a disk.
//!
//! Whole pages of the disk's files are mapped, from whichever layer has them. What reads as zeros stays fresh memory,
//! for which the host has one page for all. What is no whole page of a file, such as sectors that two layers share a
//! page of, or the end of a file, is copied.
//!
//! A mapping is right as long as nobody uses that space of the file for anything else. [`Disk::resolve_read`] promises
//! just that until the request ends, so the requests are kept until the guest has stopped. A disk that is open for
//! reading changes nothing anyway, nor does any parent: others are kept from writing by locks. In a disk that is open
//! for writing, the writes of this guest's own flushes alone reach mapped pages, with what the guest's copy of the page
//! holds.

use std::fs::File;
use std::io;
use std::sync::Arc;

use devices::virtio::pmem::MappingFigures;
use memshare::{
    Backing, FileRegistry, LostPage, PAGE_SIZE, PageState, SharedFile, Table, Window, max_map_count,
};
use parking_lot::{Mutex, MutexGuard};
use storage::{ByteRange, Disk, DiskError, Extent, ExtentKind, RequestId, blocking};

/// The guest's kernel takes memory in units of 2 MiB (Linux, `memremap_compat_align`).
const UNIT: u64 = 2 << 20;
/// Bytes of the disk that are resolved at once: bounds what their extents take.
const PIECE: u64 = 64 << 20;

/// Why a disk cannot be mapped.
#[derive(Debug, thiserror::Error)]
pub enum MapError {
    /// Too many pieces.
    #[error(
        "is in too many pieces: it takes {needed} mappings, and {left} are left (half of vm.max_map_count, for all pmem devices together); bring them together by `coppice disk convert` or `coppice disk compact`, use it as a drive, or raise vm.max_map_count"
    )]
    Fragmented {
        /// How many mappings it takes.
        needed: usize,
        /// How many there may be.
        left: usize,
    },
    /// A file ends before what is said to be in it.
    #[error("has {len} bytes at offset {offset:#x} of a file that ends before them")]
    Short {
        /// Where the bytes are to be.
        offset: u64,
        /// How many.
        len: u64,
    },
    /// The disk does not say where its bytes are.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// The host does not map it.
    #[error("cannot map {len:#x} bytes")]
    Host {
        /// How many bytes.
        len: u64,
        /// What the host said.
        source: io::Error,
    },
}

/// How many mappings are left to the disks of a guest.
#[derive(Clone, Copy, Debug)]
pub struct MapBudget(usize);

impl MapBudget {
    /// Half of what the host lets a process have: the other half is for RAM that is shared page by page, and for the
    /// process itself.
    pub fn of_host() -> Self {
        Self(max_map_count() / 2)
    }

    /// Takes what it takes to put another mapping into the midst of one; whether there was as much.
    pub fn take_one_inside(&mut self) -> bool {
        let left = self.0.checked_sub(2);
        self.0 = left.unwrap_or(self.0);
        left.is_some()
    }

    /// What is left beside disks that are mapped.
    #[must_use]
    pub fn beside(self, mapped: impl Iterator<Item = MappingFigures>) -> Self {
        let taken = mapped.map(|figures| figures.mappings).sum();
        Self(self.0.saturating_sub(taken))
    }

    #[cfg(test)]
    pub(crate) fn new(mappings: usize) -> Self {
        Self(mappings)
    }
}

/// A disk and the memory that shows it.
pub(super) struct MappedDisk {
    /// What is mapped, or a child of that.
    disk: Mutex<Arc<dyn Disk>>,
    window: Arc<Window>,
    /// What keeps the mapped space of the files as it is.
    requests: Mutex<Vec<RequestId>>,
    /// Which pages are files', from the first of the window on.
    table: Table,
    /// Which pages are those of another file, laid over the disk's.
    laid: Mutex<Table>,
    figures: MappingFigures,
}

impl MappedDisk {
    /// Maps all of a disk.
    #[cfg(test)]
    pub(super) fn new(disk: &Arc<dyn Disk>, budget: &mut MapBudget) -> Result<Self, MapError> {
        Self::of(disk, budget, &|_| true)
    }

    /// Maps what `admits` lets be shared of a disk, and copies the rest. Behind its end there are zeros, to a whole
    /// number of 2 MiB.
    pub(super) fn of(
        disk: &Arc<dyn Disk>,
        budget: &mut MapBudget,
        admits: &dyn Fn(&Arc<File>) -> bool,
    ) -> Result<Self, MapError> {
        let size = disk.geometry().size;
        let len = size.next_multiple_of(UNIT);
        let failed = |source| MapError::Host { len, source };
        let window = Arc::new(Window::reserve(len).map_err(failed)?);
        if let Err(error) = window.keep_small_pages(0, len) {
            // A kernel without huge pages has none to keep out.
            tracing::debug!(%error, "madvise(MADV_NOHUGEPAGE)");
        }
        // From here on dropped, with all requests that there are, where something fails.
        let mut mapped = Self {
            disk: Mutex::new(disk.clone()),
            window: window.clone(),
            requests: Mutex::default(),
            table: Table::default(),
            laid: Mutex::default(),
            figures: MappingFigures::default(),
        };
        let mut mapper = Mapper {
            disk: &**disk,
            window: &window,
            size,
            limit: budget.0,
            run: None,
            end: 0,
            copied_to: 0,
            admits,
            asked: None,
            files: FileRegistry::default(),
            table: Table::default(),
            figures: MappingFigures::default(),
        };
        let mut extents = Vec::new();
        for offset in (0..size).step_by(PIECE as usize) {
            let len = PIECE.min(size - offset);
            let range = ByteRange::new(offset, len).ok_or(DiskError::Range { offset, len })?;
            let request = disk.resolve_read(range, &mut extents)?;
            mapped.requests().push(request);
            for extent in extents.drain(..) {
                mapper.add(&extent)?;
            }
        }
        (mapped.table, mapped.figures) = mapper.finish()?;
        budget.0 -= mapped.figures.mappings;
        Ok(mapped)
    }

    fn requests(&self) -> MutexGuard<'_, Vec<RequestId>> {
        self.requests.lock()
    }

    pub(super) fn disk(&self) -> Arc<dyn Disk> {
        let disk = self.disk.lock();
        disk.clone()
    }

    /// Goes on with the disk that `change` makes of this one: a child, under which this one takes no more writes. So
    /// what is mapped stays as it is, and is what the child shows; the guest's writes alone go elsewhere. The disk has
    /// all of them, and nobody writes to it meanwhile.
    ///
    /// # Errors
    /// Those of `change`; then all is as before.
    pub(super) fn change_disk<E>(
        &self,
        change: impl FnOnce(&Arc<dyn Disk>) -> Result<Arc<dyn Disk>, E>,
    ) -> Result<(), E> {
        let mut disk = self.disk.lock();
        // A disk that nobody writes to any more needs none, and is not given a child before they are given back.
        self.give_back(&disk);
        match change(&disk) {
            Ok(child) => *disk = child,
            Err(error) => {
                if let Err(error) = self.take_again(&disk) {
                    // Nothing moves what is mapped but a discard, which these devices do not have.
                    tracing::error!(error = %host::report::chain(&error), "what is mapped of a disk is kept by no request any more");
                }
                return Err(error);
            }
        }
        Ok(())
    }

    fn take_again(&self, disk: &Arc<dyn Disk>) -> Result<(), DiskError> {
        let size = disk.geometry().size;
        let mut extents = Vec::new();
        for offset in (0..size).step_by(PIECE as usize) {
            let len = PIECE.min(size - offset);
            let range = ByteRange::new(offset, len).ok_or(DiskError::Range { offset, len })?;
            self.requests()
                .push(disk.resolve_read(range, &mut extents)?);
            extents.clear();
        }
        Ok(())
    }

    pub(super) fn window(&self) -> &Arc<Window> {
        &self.window
    }

    /// The first page that is a file's and cannot be read any more, with its offset in the window as its address.
    pub(super) fn lost_page(&self) -> Option<LostPage> {
        let laid = self.laid.lock();
        self.table.lost_page().or_else(|| laid.lost_page())
    }

    pub(super) fn laid(&self) -> &Mutex<Table> {
        &self.laid
    }

    /// The files that are mapped.
    pub(super) fn files(&self) -> Vec<Arc<SharedFile>> {
        let mut files: Vec<Arc<SharedFile>> = Vec::new();
        for run in self.table.runs() {
            if !files
                .iter()
                .any(|file| Arc::ptr_eq(file, &run.backing.file))
            {
                files.push(run.backing.file);
            }
        }
        files
    }

    pub(super) fn figures(&self) -> MappingFigures {
        self.figures
    }

    /// Lets go of the files and closes the disk. Nobody uses the memory any more.
    pub(super) fn close(&self) -> Result<(), DiskError> {
        let disk = self.disk();
        self.give_back(&disk);
        disk.close()
    }

    fn give_back(&self, disk: &Arc<dyn Disk>) {
        for request in std::mem::take(&mut *self.requests()) {
            disk.finish(request, true);
        }
    }
}

impl Drop for MappedDisk {
    fn drop(&mut self) {
        self.give_back(&self.disk());
    }
}

/// Pages of a file that follow each other, there and in the disk.
struct Run {
    at: u64,
    len: u64,
    file: Arc<File>,
    file_offset: u64,
}

struct Mapper<'a> {
    disk: &'a dyn Disk,
    window: &'a Window,
    /// Bytes of the disk.
    size: u64,
    /// Most mappings.
    limit: usize,
    /// What is mapped when it is known where it ends.
    run: Option<Run>,
    /// Where the last mapping ends.
    end: u64,
    /// What lies before this is not copied again.
    copied_to: u64,
    /// Whether a file that does not change may be shared, and the last answer.
    admits: &'a dyn Fn(&Arc<File>) -> bool,
    asked: Option<(Arc<File>, bool)>,
    files: FileRegistry,
    table: Table,
    figures: MappingFigures,
}

impl Mapper<'_> {
    /// Takes the next extent.
    fn add(&mut self, extent: &Extent) -> Result<(), MapError> {
        let ExtentKind::Data { file, file_offset } = &extent.kind else {
            return Ok(());
        };
        let (start, end) = (extent.offset, extent.offset + extent.len);
        let (first, last) = (start.next_multiple_of(PAGE_SIZE), end - end % PAGE_SIZE);
        let is_apart = start % PAGE_SIZE != file_offset % PAGE_SIZE || first >= last;
        if is_apart || !self.is_admitted(file) {
            return self.copy(start, end);
        }
        // The pages at its ends are others' as well.
        self.copy(start, first)?;
        self.map(Run {
            at: first,
            len: last - first,
            file: file.clone(),
            file_offset: file_offset + (first - start),
        })?;
        self.copy(last, end)
    }

    /// A file that this guest writes to is nobody else's anyway.
    fn is_admitted(&mut self, file: &Arc<File>) -> bool {
        if !self.disk.is_immutable(file) {
            return true;
        }
        match &self.asked {
            Some((last, answer)) if Arc::ptr_eq(last, file) => *answer,
            Some(_) | None => {
                let answer = (self.admits)(file);
                self.asked = Some((file.clone(), answer));
                answer
            }
        }
    }

    /// Copies the pages that a range touches, zeros after the end of the disk among them.
    fn copy(&mut self, start: u64, end: u64) -> Result<(), MapError> {
        let first = (start - start % PAGE_SIZE).max(self.copied_to);
        let mut page = [0; PAGE_SIZE as usize];
        for at in (first..end).step_by(PAGE_SIZE as usize) {
            let part = &mut page[..PAGE_SIZE.min(self.size - at) as usize];
            blocking::read_at(self.disk, part, at)?;
            self.window.write(at, part);
            self.copied_to = at + PAGE_SIZE;
            self.figures.copied += 1;
        }
        Ok(())
    }

    fn map(&mut self, next: Run) -> Result<(), MapError> {
        self.figures.mapped += next.len / PAGE_SIZE;
        if let Some(run) = &mut self.run
            && run.at + run.len == next.at
            && run.file_offset + run.len == next.file_offset
            && Arc::ptr_eq(&run.file, &next.file)
        {
            run.len += next.len;
            return Ok(());
        }
        let before = self.run.replace(next);
        before.map_or(Ok(()), |run| self.map_run(&run))
    }

    /// Maps a run whose end is known. Beyond the limit it is only counted.
    fn map_run(&mut self, run: &Run) -> Result<(), MapError> {
        let gap = run.at != self.end;
        self.figures.mappings += 1 + usize::from(gap);
        self.end = run.at + run.len;
        if self.figures.mappings > self.limit {
            return Ok(());
        }
        let failed = |source| MapError::Host {
            len: run.len,
            source,
        };
        // A page past the end of its file would raise SIGBUS, in the guest's hands or ours.
        let held = run.file.metadata().map_err(failed)?.len();
        if run.file_offset + run.len > held {
            return Err(MapError::Short {
                offset: run.file_offset,
                len: run.len,
            });
        }
        self.window
            .map_file(run.at, run.len, &run.file, run.file_offset)
            .map_err(failed)?;
        self.table.insert(memshare::Run {
            gfn: run.at / PAGE_SIZE,
            pages: run.len / PAGE_SIZE,
            backing: Backing {
                file: self
                    .files
                    .share(&run.file)
                    .map_err(|error| failed(error.into()))?,
                offset: run.file_offset,
                state: PageState::Mapped {
                    since: 0,
                    early_writes: 0,
                },
            },
        });
        Ok(())
    }

    fn finish(mut self) -> Result<(Table, MappingFigures), MapError> {
        if let Some(run) = self.run.take() {
            self.map_run(&run)?;
        }
        self.figures.mappings += usize::from(self.end != self.window.len());
        if self.figures.mappings > self.limit {
            return Err(MapError::Fragmented {
                needed: self.figures.mappings,
                left: self.limit,
            });
        }
        Ok((self.table, self.figures))
    }
}
