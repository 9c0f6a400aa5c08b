//! Files of the cache that are not complete yet.

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use tempfile::NamedTempFile;

/// What their names begin with.
const PREFIX: &str = ".warming-";

/// Makes one, with a mode.
///
/// # Errors
/// The host's error.
pub(super) fn make(cache: &Path, mode: u32) -> io::Result<NamedTempFile> {
    tempfile::Builder::new()
        .prefix(PREFIX)
        .permissions(Permissions::from_mode(mode))
        .tempfile_in(cache)
}

/// Removes those of processes that were killed. The caller holds the lock, so nobody else is making one.
///
/// # Errors
/// The host's error.
pub(super) fn remove_left_over(cache: &Path) -> io::Result<()> {
    for entry in fs::read_dir(cache)? {
        let entry = entry?;
        if entry
            .file_name()
            .as_encoded_bytes()
            .starts_with(PREFIX.as_bytes())
        {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}
