//! Opening a file that a disk is in, or a block device that is one.

use std::fs::{File, FileType};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;

use rustix::fs::OFlags;

use crate::lock::{self, OpenMode};
use crate::options::FileKinds;
use crate::refusal::Refusal;

/// Opens a regular file and locks it. Never waits, neither for the other end of a FIFO nor for a lock.
pub(crate) fn open_locked(path: &Path, mode: OpenMode) -> Result<Arc<File>, Refusal> {
    open_locked_of(path, mode, FileKinds::Regular)
}

/// As [`open_locked`], of other kinds as well. A block device that is opened for writing is the caller's alone: the
/// host mounts it nowhere, and gives it to no other program that asks for the same (`O_EXCL`).
pub(crate) fn open_locked_of(
    path: &Path,
    mode: OpenMode,
    kinds: FileKinds,
) -> Result<Arc<File>, Refusal> {
    let file = open(path, mode, kinds)?;
    lock::lock(&file, mode).map_err(Refusal::Locked)?;
    Ok(Arc::new(file))
}

/// Opens a regular file. Never waits for the other end of a FIFO.
pub(crate) fn open_unlocked(path: &Path, mode: OpenMode) -> Result<File, Refusal> {
    open(path, mode, FileKinds::Regular)
}

fn open(path: &Path, mode: OpenMode, kinds: FileKinds) -> Result<File, Refusal> {
    let cannot = |error| Refusal::io("open the file", error);
    // Looked at before it is opened, because opening a device can have effects of its own, and after, because the
    // name may have come to mean another file.
    let kind = std::fs::metadata(path).map_err(cannot)?.file_type();
    let check = |kind: FileType| match kinds {
        FileKinds::RegularAndBlock if kind.is_block_device() => Ok(()),
        FileKinds::Regular | FileKinds::RegularAndBlock => check_kind(kind),
    };
    check(kind)?;
    let claim = match mode {
        OpenMode::ReadWrite if kind.is_block_device() => libc::O_EXCL,
        OpenMode::ReadWrite | OpenMode::ReadOnly => 0,
    };
    let file = File::options()
        .read(true)
        .write(!mode.is_read_only())
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY | claim)
        .open(path)
        .map_err(cannot)?;
    let opened = file.metadata().map_err(cannot)?.file_type();
    check(opened)?;
    if opened.is_block_device() != kind.is_block_device() {
        return Err(Refusal::FileKind {
            found: "another file than a moment ago",
        });
    }
    // io_uring answers `EAGAIN` instead of waiting where the file is non-blocking.
    let flags = rustix::fs::fcntl_getfl(&file).map_err(|e| cannot(e.into()))?;
    rustix::fs::fcntl_setfl(&file, flags - OFlags::NONBLOCK).map_err(|e| cannot(e.into()))?;
    Ok(file)
}

/// Refuses what is no regular file.
pub(crate) fn check_kind(kind: FileType) -> Result<(), Refusal> {
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
