//! Why a configuration cannot be used.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;

use crate::limits::{MAX_FILE_SIZE, MAX_VIRTIO_DEVICES};

/// Why a configuration cannot be used. The one-line `Display` names the field.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The configuration file cannot be read.
    #[error("configuration file {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The host's error.
        source: io::Error,
    },
    /// The configuration file is too long.
    #[error("configuration file {}: longer than {} bytes", path.display(), MAX_FILE_SIZE)]
    TooLong {
        /// The file.
        path: PathBuf,
    },
    /// The configuration file is not JSON of the expected shape.
    #[error("configuration file {}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// What was expected, with line and column.
        source: serde_json::Error,
    },
    /// A request body, or a part of one, is not of the expected shape.
    #[error(transparent)]
    Shape(serde_json::Error),
    /// A field has a value that Coppice does not support.
    #[error("{field}: not supported")]
    Unsupported {
        /// The field.
        field: &'static str,
    },
    /// A field has an invalid value.
    #[error("{field}: {value} is not {expected}")]
    Invalid {
        /// The field.
        field: &'static str,
        /// Its value.
        value: String,
        /// The values that it may have.
        expected: String,
    },
    /// A file cannot be opened.
    #[error("{field}: cannot open {}", path.display())]
    File {
        /// The field that names it.
        field: &'static str,
        /// The file.
        path: PathBuf,
        /// The host's error.
        source: io::Error,
    },
    /// A path names something other than a regular file.
    #[error("{field}: {} is not a regular file", path.display())]
    NotAFile {
        /// The field that names it.
        field: &'static str,
        /// The file.
        path: PathBuf,
    },
    /// Two drives have the same id.
    #[error("drives: two drives have the drive_id {0}")]
    DuplicateDrive(String),
    /// Two drives are root devices.
    #[error("drives: {drive} is_root_device, but {first} is already")]
    SecondRoot {
        /// The second one.
        drive: String,
        /// The first one.
        first: String,
    },
    /// Two pmem devices have the same id.
    #[error("pmem: two devices have the id {0}")]
    DuplicatePmem(String),
    /// A pmem device is a root device, and another device is as well.
    #[error("pmem: {pmem} is root_device, but {first} is the root already")]
    SecondPmemRoot {
        /// The device.
        pmem: String,
        /// The other root device.
        first: String,
    },
    /// The guest has more devices than interrupt lines.
    #[error("a guest has at most {MAX_VIRTIO_DEVICES} virtio devices, not {found}")]
    TooManyDevices {
        /// Drives, pmem devices, the entropy device, the balloon and vsock together.
        found: usize,
    },
    /// An update sets no field.
    #[error("the update is empty")]
    EmptyUpdate,
}

impl ConfigError {
    pub(super) fn invalid(
        field: &'static str,
        value: &dyn fmt::Display,
        expected: impl Into<String>,
    ) -> Self {
        Self::Invalid {
            field,
            value: value.to_string(),
            expected: expected.into(),
        }
    }
}

/// The longest id of a drive or a pmem device, in bytes.
const ID_MAX: usize = 64;

/// Checks an id, which is used in paths of the REST API, and in names of counters.
pub(super) fn check_id(field: &'static str, id: &str) -> Result<(), ConfigError> {
    let word = |c: char| c == '_' || c.is_ascii_alphanumeric();
    if id.is_empty() || id.len() > ID_MAX || !id.chars().all(word) {
        return Err(ConfigError::invalid(
            field,
            &format_args!("{id:.80?}"),
            format!("1 to {ID_MAX} letters, digits and underscores"),
        ));
    }
    Ok(())
}

/// Checks that a regular file can be opened as it will be. Does not block if the path names a FIFO.
pub(super) fn check_file(field: &'static str, path: &Path, write: bool) -> Result<(), ConfigError> {
    let failed = |source| ConfigError::File {
        field,
        path: path.to_owned(),
        source,
    };
    let open = |write| -> io::Result<File> {
        OpenOptions::new()
            .read(true)
            .write(write)
            .custom_flags(OFlags::NONBLOCK.bits().cast_signed())
            .open(path)
    };
    let file = match open(write) {
        // A directory cannot be opened for writing. It is opened for reading, so that the error says what it is.
        Err(error) if error.kind() == io::ErrorKind::IsADirectory => open(false),
        opened => opened,
    };
    if file
        .and_then(|file| file.metadata())
        .map_err(failed)?
        .is_file()
    {
        Ok(())
    } else {
        Err(ConfigError::NotAFile {
            field,
            path: path.to_owned(),
        })
    }
}

/// Checks a path, which is passed to system calls: it must not be empty, have zero bytes or be too long for the host.
pub(super) fn check_path(field: &'static str, path: &Path) -> Result<(), ConfigError> {
    let bytes = path.as_os_str().as_encoded_bytes();
    let limit = libc::PATH_MAX.cast_unsigned() as usize;
    if bytes.is_empty() || bytes.len() >= limit || bytes.contains(&0) {
        let expected = format!(
            "the name of a file, of 1 to {} bytes other than 0",
            limit - 1
        );
        return Err(ConfigError::invalid(
            field,
            &format_args!("{:.80?}", path.to_string_lossy()),
            expected,
        ));
    }
    Ok(())
}
