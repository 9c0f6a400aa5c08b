//! A range of this process's memory whose pages come from files, and the calls that change where they come from.
//!
//! All of the crate's `unsafe` is here. A window is memory that a guest may write to at any time: it is only ever
//! accessed through raw, volatile accesses, and no Rust reference into it exists.

use std::any::Any;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::ptr;
use std::sync::Arc;

use rustix::mm::{
    Advice, MapFlags, MremapFlags, ProtFlags, madvise, mmap, mmap_anonymous, mremap_fixed, munmap,
};

/// Bytes of a page of the host and of a guest.
pub const PAGE_SIZE: u64 = 4096;

/// Inaccessible bytes before and behind reserved memory: an access that runs past its end faults, and the kernel merges
/// it with no other mapping.
const GUARD: usize = PAGE_SIZE as usize;

/// Where the memory of a page is, as the host's kernel has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageKind {
    /// Nothing was touched yet, or what was is not mapped any more.
    Absent,
    /// A page of a file, as the page cache of the host has it, shared by all who map it.
    File,
    /// Private to this process: written to, or never from a file.
    Private,
}

impl PageKind {
    /// Bit of an entry of `/proc/PID/pagemap` (Linux, Documentation/admin-guide/mm/pagemap.rst): the page is in RAM.
    pub const PRESENT: u64 = 1 << 63;
    /// Bit of an entry: the page is in swap, and private all the same.
    pub const SWAPPED: u64 = 1 << 62;
    /// Bit of an entry: the page is a file's.
    pub const FILE: u64 = 1 << 61;

    /// By an entry of `/proc/PID/pagemap`.
    pub fn of(entry: u64) -> Self {
        if entry & Self::PRESENT != 0 && entry & Self::FILE != 0 {
            Self::File
        } else if entry & (Self::PRESENT | Self::SWAPPED) != 0 {
            Self::Private
        } else {
            Self::Absent
        }
    }
}

/// Private memory that is unmapped when it goes.
struct Reservation {
    base: *mut u8,
    len: usize,
}

// SAFETY: the pointer names a mapping of the process, which belongs to no thread.
unsafe impl Send for Reservation {}
// SAFETY: as above; nothing is reached through a shared reference but by the raw accesses of `Window`.
unsafe impl Sync for Reservation {}

impl Drop for Reservation {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's own; it is only reached through a borrow or an owner of the value, and
        // none is left in `drop`.
        if let Err(error) = unsafe { munmap(self.base.cast(), self.len) } {
            tracing::warn!(error = %report::chain(&error), "munmap");
        }
    }
}

/// A range of memory that file pages can be mapped into, addressed by offsets in bytes from its start.
pub struct Window {
    base: *mut u8,
    len: u64,
    /// Keeps the range mapped.
    _owner: Arc<dyn Any + Send + Sync>,
}

// SAFETY: the pointer names mappings that `_owner` keeps, and that any thread may access.
unsafe impl Send for Window {}
// SAFETY: all accesses are volatile, and replacing mappings is atomic for whoever accesses them at the same time.
unsafe impl Sync for Window {}

impl std::fmt::Debug for Window {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Window")
            .field("base", &self.base)
            .field("len", &self.len)
            .finish_non_exhaustive()
    }
}

fn outside(offset: u64, len: u64) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidInput,
        format!("{offset:#x}+{len:#x} is outside the memory or not made of whole pages"),
    )
}

const READ_WRITE: ProtFlags = ProtFlags::READ.union(ProtFlags::WRITE);

impl Window {
    /// New memory of `len` bytes, which reads as zeros and takes nothing from the host until it is touched.
    ///
    /// # Errors
    /// The error of the host.
    pub fn reserve(len: u64) -> io::Result<Self> {
        Self::reserve_between(len, GUARD)
    }

    /// New memory between guards of so many bytes.
    fn reserve_between(len: u64, guard: usize) -> io::Result<Self> {
        let size = usize::try_from(len).map_err(io::Error::other)?;
        let guarded = size
            .checked_add(2 * guard)
            .ok_or(io::ErrorKind::OutOfMemory)?;
        // SAFETY: a new mapping, wherever the kernel has room for it, changes nothing that exists.
        let start = unsafe {
            mmap_anonymous(
                ptr::null_mut(),
                guarded,
                ProtFlags::empty(),
                MapFlags::PRIVATE | MapFlags::NORESERVE,
            )
        }?;
        let reservation = Reservation {
            base: start.cast(),
            len: guarded,
        };
        let window = Self {
            base: start.wrapping_byte_add(guard).cast(),
            len,
            _owner: Arc::new(reservation),
        };
        window.map_zeros(0, len)?;
        Ok(window)
    }

    /// A window over memory that exists.
    ///
    /// # Safety
    /// The `len` bytes from `base`, both multiples of the page size, are private memory, readable and writable, mapped
    /// as long as `owner` lives. Nobody holds a Rust reference into it, and nobody minds that its mappings are
    /// replaced.
    pub unsafe fn over(base: *mut u8, len: u64, owner: Arc<dyn Any + Send + Sync>) -> Self {
        Self {
            base,
            len,
            _owner: owner,
        }
    }

    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there is no byte in it.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The host's address of the first byte.
    pub fn as_ptr(&self) -> *mut u8 {
        self.base
    }

    /// The host's address and length of a range of whole pages.
    fn pages(&self, offset: u64, len: u64) -> io::Result<(*mut libc::c_void, usize)> {
        let is_inside = offset.checked_add(len).is_some_and(|end| end <= self.len);
        if !is_inside || !offset.is_multiple_of(PAGE_SIZE) || !len.is_multiple_of(PAGE_SIZE) {
            return Err(outside(offset, len));
        }
        // Inside the window, whose length is one of an address space.
        Ok((self.base.wrapping_add(offset as usize).cast(), len as usize))
    }

    /// Puts the pages of `file` from `file_offset` in place of those at `offset`: shared with all who map them, and
    /// copied when they are written to. The file stays open, and locked as it is, until its last page here is replaced.
    ///
    /// The part of the file has to exist: a page past its end raises `SIGBUS` when it is touched.
    ///
    /// # Errors
    /// `InvalidInput` where the range is outside the window or not made of whole pages; else the error of the host,
    /// `ENOMEM` where the process has too many mappings (`vm.max_map_count`). Then the pages are as they were.
    pub fn map_file(&self, offset: u64, len: u64, file: &File, file_offset: u64) -> io::Result<()> {
        let (address, size) = self.pages(offset, len)?;
        if size == 0 {
            return Ok(());
        }
        // SAFETY: the range lies in the window, which is memory that nobody holds references into and whose mappings
        // may be replaced, by the contract of `over` or because it is reserved.
        let mapped = unsafe {
            mmap(
                address,
                size,
                READ_WRITE,
                MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::NORESERVE,
                file,
                file_offset,
            )
        };
        mapped?;
        Ok(())
    }

    /// Puts fresh memory in place of the pages at `offset`: it reads as zeros, and takes nothing from the host until it
    /// is touched.
    ///
    /// # Errors
    /// As [`Window::map_file`].
    pub fn map_zeros(&self, offset: u64, len: u64) -> io::Result<()> {
        let (address, size) = self.pages(offset, len)?;
        if size == 0 {
            return Ok(());
        }
        // SAFETY: as in `map_file`.
        let mapped = unsafe {
            mmap_anonymous(
                address,
                size,
                READ_WRITE,
                MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::NORESERVE,
            )
        };
        mapped?;
        Ok(())
    }

    /// Puts a private copy of the pages at `offset` in their place, so that no file is behind them any more. A reader
    /// sees the same bytes meanwhile; what is written meanwhile may be lost.
    ///
    /// # Errors
    /// As [`Window::map_file`].
    pub fn make_private(&self, offset: u64, len: u64) -> io::Result<()> {
        let (address, size) = self.pages(offset, len)?;
        if size == 0 {
            return Ok(());
        }
        let copy = Self::reserve_between(len, 0)?;
        let mut page = vec![0; PAGE_SIZE as usize];
        for at in (0..len).step_by(PAGE_SIZE as usize) {
            self.read(offset + at, &mut page);
            copy.write(at, &page);
        }
        // SAFETY: `copy` is a mapping of this function's own, to which no reference exists; where it goes is as in
        // `map_file`.
        let moved =
            unsafe { mremap_fixed(copy.base.cast(), size, size, MremapFlags::MAYMOVE, address) };
        moved?;
        // What was moved away is not there to be unmapped, and others may have been given the addresses since.
        std::mem::forget(copy);
        Ok(())
    }

    /// Gives the private memory of the pages back to the host. They read as they would have if nobody had ever written
    /// to them: as zeros, or as the file that is mapped there.
    ///
    /// # Errors
    /// As [`Window::map_file`].
    pub fn forget(&self, offset: u64, len: u64) -> io::Result<()> {
        self.advise(offset, len, Advice::LinuxDontNeed)
    }

    /// Keeps transparent huge pages out of the range.
    ///
    /// # Errors
    /// As [`Window::map_file`]; a kernel without huge pages refuses too, and needs none of it.
    pub fn keep_small_pages(&self, offset: u64, len: u64) -> io::Result<()> {
        self.advise(offset, len, Advice::LinuxNoHugepage)
    }

    /// Gives each page of the range that is a file's a private copy now, as a write to it would. Nothing that is read
    /// there changes.
    ///
    /// # Errors
    /// As [`Window::map_file`]; `InvalidInput` also before Linux 5.14 (`MADV_POPULATE_WRITE`).
    pub fn copy_ahead(&self, offset: u64, len: u64) -> io::Result<()> {
        self.advise(offset, len, Advice::LinuxPopulateWrite)
    }

    fn advise(&self, offset: u64, len: u64, advice: Advice) -> io::Result<()> {
        let (address, size) = self.pages(offset, len)?;
        // SAFETY: the range lies in the window; none of the pieces of advice that are given here unmaps anything, and
        // that the content may change is in the window's contract.
        unsafe { madvise(address, size, advice) }?;
        Ok(())
    }

    /// Whether the memory at `offset` holds `bytes`, now. A page that was never touched is read as zeros.
    ///
    /// # Panics
    /// Where the range is outside the window.
    pub fn holds(&self, offset: u64, bytes: &[u8]) -> bool {
        let start = self.checked(offset, bytes.len());
        let (words, rest) = bytes.as_chunks::<8>();
        let same = |(index, word): (usize, &[u8; 8])| {
            let at = start.wrapping_add(index * 8).cast::<[u8; 8]>();
            // SAFETY: the 8 bytes lie in the window; an array of bytes has no alignment, and any bits are a value of
            // it.
            unsafe { at.read_volatile() == *word }
        };
        let tail = start.wrapping_add(words.len() * 8);
        words.iter().enumerate().all(same)
            && rest.iter().enumerate().all(|(index, byte)| {
                // SAFETY: as above.
                unsafe { tail.wrapping_add(index).read_volatile() == *byte }
            })
    }

    /// Copies the memory at `offset` out. What is written there at the same time may be seen or not.
    ///
    /// # Panics
    /// Where the range is outside the window.
    pub fn read(&self, offset: u64, bytes: &mut [u8]) {
        let start = self.checked(offset, bytes.len());
        let (words, rest) = bytes.as_chunks_mut::<8>();
        let tail = start.wrapping_add(words.len() * 8);
        for (index, word) in words.iter_mut().enumerate() {
            let at = start.wrapping_add(index * 8).cast::<[u8; 8]>();
            // SAFETY: as in `holds`.
            *word = unsafe { at.read_volatile() };
        }
        for (index, byte) in rest.iter_mut().enumerate() {
            // SAFETY: as in `holds`.
            *byte = unsafe { tail.wrapping_add(index).read_volatile() };
        }
    }

    /// Copies `bytes` to `offset`.
    ///
    /// # Panics
    /// Where the range is outside the window.
    pub fn write(&self, offset: u64, bytes: &[u8]) {
        let start = self.checked(offset, bytes.len());
        for (index, byte) in bytes.iter().enumerate() {
            // SAFETY: the byte lies in the window, which is writable; nobody holds a reference into it.
            unsafe { start.wrapping_add(index).write_volatile(*byte) };
        }
    }

    fn checked(&self, offset: u64, len: usize) -> *mut u8 {
        let end = offset.checked_add(len as u64);
        assert!(
            end.is_some_and(|end| end <= self.len),
            "{offset:#x}+{len:#x} is outside a window of {:#x} bytes",
            self.len
        );
        self.base.wrapping_add(offset as usize)
    }

    /// Where the memory of each page of the range is (`/proc/self/pagemap`).
    ///
    /// # Errors
    /// As [`Window::map_file`], and where `/proc` is not to be had.
    pub fn page_kinds(&self, offset: u64, len: u64) -> io::Result<Vec<PageKind>> {
        /// Bytes of the entries of pages that are asked for at once.
        const PIECE: usize = 512 * 8;
        let (address, size) = self.pages(offset, len)?;
        let pagemap = File::open("/proc/self/pagemap")?;
        let pages = size / PAGE_SIZE as usize;
        let (mut left, mut at) = (pages * 8, address as u64 / PAGE_SIZE * 8);
        let mut kinds = Vec::with_capacity(pages);
        let mut entries = [0; PIECE];
        while left > 0 {
            let len = left.min(PIECE);
            let entries = &mut entries[..len];
            pagemap.read_exact_at(entries, at)?;
            let (entries, _) = entries.as_chunks::<8>();
            let of = entries.iter().map(|entry| u64::from_ne_bytes(*entry));
            kinds.extend(of.map(PageKind::of));
            left -= len;
            at += len as u64;
        }
        Ok(kinds)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn file(pages: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        for byte in pages {
            file.write_all(&[*byte; PAGE_SIZE as usize]).unwrap();
        }
        file
    }

    #[test]
    fn a_page_is_the_files_until_it_is_written_to_and_the_file_never_changes() {
        let (window, file) = (Window::reserve(4 * PAGE_SIZE).unwrap(), file(&[1, 2, 3]));
        window
            .map_file(PAGE_SIZE, 2 * PAGE_SIZE, &file, PAGE_SIZE)
            .unwrap();
        assert!(window.holds(0, &[0; 4096]) && window.holds(PAGE_SIZE, &[2; 4096]));
        window.write(2 * PAGE_SIZE + 5, &[9]);
        let kinds = window.page_kinds(PAGE_SIZE, 2 * PAGE_SIZE).unwrap();
        assert_eq!(kinds, [PageKind::File, PageKind::Private]);
        let mut bytes = [0; 7];
        window.read(2 * PAGE_SIZE + 1, &mut bytes);
        assert_eq!(bytes, [3, 3, 3, 3, 9, 3, 3]);
        let mut page = [0; 4096];
        file.read_exact_at(&mut page, 2 * PAGE_SIZE).unwrap();
        assert_eq!(page, [3; 4096]);
        window.forget(2 * PAGE_SIZE, PAGE_SIZE).unwrap();
        assert!(window.holds(2 * PAGE_SIZE, &[3; 4096]));
        window.make_private(PAGE_SIZE, 2 * PAGE_SIZE).unwrap();
        let kinds = window.page_kinds(PAGE_SIZE, 2 * PAGE_SIZE).unwrap();
        assert_eq!(kinds, [PageKind::Private; 2]);
        window.map_file(0, PAGE_SIZE, &file, 0).unwrap();
        window.copy_ahead(0, PAGE_SIZE).unwrap();
        assert_eq!(
            window.page_kinds(0, PAGE_SIZE).unwrap(),
            [PageKind::Private]
        );
        assert!(window.holds(0, &[1; 4096]));
        assert!(window.holds(PAGE_SIZE, &[2; 4096]) && window.holds(2 * PAGE_SIZE, &[3; 4096]));
        window.map_zeros(PAGE_SIZE, 2 * PAGE_SIZE).unwrap();
        assert!(window.holds(PAGE_SIZE, &[0; 8192]));
    }

    #[test]
    fn ranges_outside_or_off_the_pages_are_refused() {
        let (window, file) = (Window::reserve(4 * PAGE_SIZE).unwrap(), file(&[1]));
        for (offset, len) in [
            (0, 5 * PAGE_SIZE),
            (1, PAGE_SIZE),
            (0, 1),
            (!4095, 2 * PAGE_SIZE),
        ] {
            let error = window.map_file(offset, len, &file, 0).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
            assert!(window.map_zeros(offset, len).is_err());
            assert!(window.forget(offset, len).is_err());
        }
        assert!(window.holds(0, &[0; 4096]));
        window.map_file(0, 0, &file, 0).unwrap();
    }

    #[test]
    #[should_panic(expected = "outside a window")]
    fn a_read_past_the_end_is_a_defect() {
        Window::reserve(PAGE_SIZE)
            .unwrap()
            .read(PAGE_SIZE - 1, &mut [0; 2]);
    }
}
