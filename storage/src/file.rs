//! Opening a file that a disk is in.

use std::fs::{File, FileType};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;

use rustix::fs::OFlags;

use crate::lock::{self, OpenMode};
use crate::refusal::Refusal;

/// Opens a regular file and locks it. Never waits, neither for the other end of a FIFO nor for a lock.
pub(crate) fn open_locked(path: &Path, mode: OpenMode) -> Result<Arc<File>, Refusal> {
    let file = open_unlocked(path, mode)?;
    lock::lock(&file, mode).map_err(Refusal::Locked)?;
    Ok(Arc::new(file))
}

/// Opens a regular file. Never waits for the other end of a FIFO.
pub(crate) fn open_unlocked(path: &Path, mode: OpenMode) -> Result<File, Refusal> {
    let cannot = |error| Refusal::io("open the file", error);
    // Looked at before it is opened, because opening a device can have effects of its own, and after, because the
    // name may have come to mean another file.
    check_kind(std::fs::metadata(path).map_err(cannot)?.file_type())?;
    let file = File::options()
        .read(true)
        .write(!mode.is_read_only())
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(path)
        .map_err(cannot)?;
    check_kind(file.metadata().map_err(cannot)?.file_type())?;
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
