//! Files that a process appends to: the log, the metrics, the output of a serial console.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rustix::fs::OFlags;

/// Opens a file or named pipe to append to. A file that does not exist is made for its owner alone. A named pipe is
/// opened for reading as well, because otherwise it could not be opened while it has no reader, and writes would fail
/// when its reader ends.
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
