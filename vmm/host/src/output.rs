//! Files that a process appends to: the log, the metrics, what a serial console writes.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rustix::fs::OFlags;

/// Opens a file or named pipe to append to, and makes it, for its owner alone, if it is not there. A named pipe is
/// opened for reading as well, since it could not be opened, or would end, where nobody reads it.
///
/// # Errors
/// The host's error.
pub fn open_output(path: &Path) -> io::Result<File> {
    let flags = OFlags::NONBLOCK | OFlags::NOCTTY;
    let mut options = OpenOptions::new();
    options
        .append(true)
        .create(true)
        .mode(0o600)
        .custom_flags(flags.bits().cast_signed());
    match std::fs::metadata(path) {
        Ok(metadata) if std::os::unix::fs::FileTypeExt::is_fifo(&metadata.file_type()) => {
            options.read(true).open(path)
        }
        Ok(_) | Err(_) => options.open(path),
    }
}
