//! The mapping of a disk: memory that shows its contents.
//!
//! Whole pages of the disk's files are mapped, from whichever layer has them. Ranges that read as zeros stay untouched
//! memory, for which the host has one page of zeros. Bytes that are no whole page of a file are copied: sectors of two
//! layers in one page, or the end of a file.
//!
//! A mapping is valid as long as nobody uses that space of the file for anything else. [`Disk::resolve_read`] promises
//! just that until the request ends, so the requests are kept until the guest has stopped. A disk that is open for
//! reading does not change anyway, nor does any parent: locks keep other processes from writing. In a disk that is open
//! for writing, only the flushes of this guest write to mapped pages, and they write what the guest's copy of the page
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
/// Bytes of the disk that are resolved at once. It bounds the memory that the extents take.
const PIECE: u64 = 64 << 20;

/// Why a disk cannot be mapped.
#[derive(Debug, thiserror::Error)]
pub enum MapError {
    /// The disk is in too many pieces.
    #[error(
        "is in too many pieces: it takes {needed} mappings, and {left} are left (half of vm.max_map_count, for all pmem devices together); bring them together by `coppice disk convert` or `coppice disk compact`, use it as a drive, or raise vm.max_map_count"
    )]
    Fragmented {
        /// How many mappings it takes.
        needed: usize,
        /// How many there may be.
        left: usize,
    },
    /// A file ends before the bytes that the disk's metadata places in it.
    #[error("has {len} bytes at offset {offset:#x} of a file that ends before them")]
    Short {
        /// Where the bytes should be.
        offset: u64,
        /// How many.
        len: u64,
    },
    /// The disk cannot resolve where its bytes are.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// The host refuses the mapping.
    #[error("cannot map {len:#x} bytes")]
    Host {
        /// How many bytes.
        len: u64,
        /// The host's error.
        source: io::Error,
    },
}

/// How many mappings the pmem devices of a guest may still take.
#[derive(Clone, Copy, Debug)]
pub struct MapBudget(usize);

impl MapBudget {
    /// Half of the mappings that the host allows a process: the other half is for RAM that is shared page by page, and
    /// for the process itself.
    pub fn of_host() -> Self {
        Self(max_map_count() / 2)
    }

    /// Takes the mappings that are added when a new one is put into the middle of another: two. Returns whether they
    /// were left.
    pub fn take_one_inside(&mut self) -> bool {
        let left = self.0.checked_sub(2);
        self.0 = left.unwrap_or(self.0);
        left.is_some()
    }

    /// The budget that is left beside disks that are mapped already.
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
    /// The disk that is mapped, or a child of it.
    disk: Mutex<Arc<dyn Disk>>,
    window: Arc<Window>,
    /// The requests that keep the mapped space of the files from being used for anything else.
    requests: Mutex<Vec<RequestId>>,
    /// Which pages are pages of the disk's files, by their number in the window.
    table: Table,
    /// Which pages are those of another file, mapped over the disk's.
    overlay: Mutex<Table>,
    figures: MappingFigures,
}

impl MappedDisk {
    /// Maps all of a disk.
    #[cfg(test)]
    pub(super) fn new(disk: &Arc<dyn Disk>, budget: &mut MapBudget) -> Result<Self, MapError> {
        Self::of(disk, budget, &|_| true)
    }

    /// Maps the files of a disk that `admits` lets be shared, and copies the rest. Zeros follow the end of the disk, up
    /// to a whole number of 2 MiB.
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
            // A kernel without huge pages refuses this, and has none to avoid.
            tracing::debug!(error = %host::report::chain(&error), "madvise(MADV_NOHUGEPAGE)");
        }
        // If something fails from here on, this value is dropped, and finishes the requests that there are.
        let mut mapped = Self {
            disk: Mutex::new(disk.clone()),
            window: window.clone(),
            requests: Mutex::default(),
            table: Table::default(),
            overlay: Mutex::default(),
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
            last_admission: None,
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

    /// Replaces the disk by the child that `change` makes of it, under which it takes no more writes. So the mappings
    /// stay valid, and show what the child shows; only the guest's later writes go elsewhere. All of its earlier writes
    /// are on the disk, and nobody writes to it during the call.
    ///
    /// # Errors
    /// Those of `change`; then the disk stays.
    pub(super) fn change_disk<E>(
        &self,
        change: impl FnOnce(&Arc<dyn Disk>) -> Result<Arc<dyn Disk>, E>,
    ) -> Result<(), E> {
        let mut disk = self.disk.lock();
        // A disk that nobody writes to any more needs no requests to keep its space, and cannot be given a child while
        // it has any.
        self.finish_requests(&disk);
        match change(&disk) {
            Ok(child) => *disk = child,
            Err(error) => {
                if let Err(error) = self.resolve_again(&disk) {
                    // Only a discard would free mapped space, and these devices have none.
                    tracing::error!(error = %host::report::chain(&error), "what is mapped of a disk is kept by no request any more");
                }
                return Err(error);
            }
        }
        Ok(())
    }

    fn resolve_again(&self, disk: &Arc<dyn Disk>) -> Result<(), DiskError> {
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

    /// The first page of a file that is lost. Its address is its offset in the window.
    pub(super) fn lost_page(&self) -> Option<LostPage> {
        let overlay = self.overlay.lock();
        self.table.lost_page().or_else(|| overlay.lost_page())
    }

    pub(super) fn overlay(&self) -> &Mutex<Table> {
        &self.overlay
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

    /// Finishes the requests and closes the disk. The caller ensures that nobody uses the memory any more.
    pub(super) fn close(&self) -> Result<(), DiskError> {
        let disk = self.disk();
        self.finish_requests(&disk);
        disk.close()
    }

    fn finish_requests(&self, disk: &Arc<dyn Disk>) {
        for request in std::mem::take(&mut *self.requests()) {
            disk.finish(request, true);
        }
    }
}

impl Drop for MappedDisk {
    fn drop(&mut self) {
        self.finish_requests(&self.disk());
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
    /// The most mappings that the disk may take.
    limit: usize,
    /// The run that is mapped as soon as it is known where it ends.
    run: Option<Run>,
    /// Where the last mapping ends.
    end: u64,
    /// Up to where the disk is copied, so that no page is copied twice.
    copied_to: u64,
    /// Whether an immutable file may be shared, and the file that was asked about last, with the answer.
    admits: &'a dyn Fn(&Arc<File>) -> bool,
    last_admission: Option<(Arc<File>, bool)>,
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
        let is_unaligned = start % PAGE_SIZE != file_offset % PAGE_SIZE || first >= last;
        if is_unaligned || !self.is_admitted(file) {
            return self.copy(start, end);
        }
        // The pages at the ends of the extent are part of its neighbours, too.
        self.copy(start, first)?;
        self.map(Run {
            at: first,
            len: last - first,
            file: file.clone(),
            file_offset: file_offset + (first - start),
        })?;
        self.copy(last, end)
    }

    /// A file that this guest writes to is shared with nobody anyway, so that it needs no admission.
    fn is_admitted(&mut self, file: &Arc<File>) -> bool {
        if !self.disk.is_immutable(file) {
            return true;
        }
        match &self.last_admission {
            Some((last, answer)) if Arc::ptr_eq(last, file) => *answer,
            Some(_) | None => {
                let answer = (self.admits)(file);
                self.last_admission = Some((file.clone(), answer));
                answer
            }
        }
    }

    /// Copies the pages that a range touches, with zeros after the end of the disk.
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

    /// Maps a run whose end is known. Runs beyond the limit are only counted, for the error.
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
        // Access to a page past the end of its file would raise SIGBUS, in this process or for the guest.
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
