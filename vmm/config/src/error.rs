//! What is wrong with a configuration.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;

use crate::limits::{MAX_FILE_SIZE, MAX_VIRTIO_DEVICES};

/// A configuration that cannot be used. Its one-line `Display` names the field.
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
    /// A value that Coppice cannot honour.
    #[error("{field}: not supported")]
    Unsupported {
        /// The field.
        field: &'static str,
    },
    /// A value that cannot be.
    #[error("{field}: {value} is not {expected}")]
    Invalid {
        /// The field.
        field: &'static str,
        /// What it was set to.
        value: String,
        /// What it may be.
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
    /// Something else than a regular file.
    #[error("{field}: {} is not a regular file", path.display())]
    NotAFile {
        /// The field that names it.
        field: &'static str,
        /// The file.
        path: PathBuf,
    },
    /// Two drives of one name.
    #[error("drives: two drives have the drive_id {0}")]
    DuplicateDrive(String),
    /// Two root devices.
    #[error("drives: {drive} is_root_device, but {first} is already")]
    SecondRoot {
        /// The second one.
        drive: String,
        /// The first one.
        first: String,
    },
    /// Two pmem devices of one name.
    #[error("pmem: two devices have the id {0}")]
    DuplicatePmem(String),
    /// A pmem device as root, where there is one.
    #[error("pmem: {pmem} is root_device, but {first} is the root already")]
    SecondPmemRoot {
        /// The device.
        pmem: String,
        /// The drive or pmem device that is.
        first: String,
    },
    /// More devices than interrupt lines.
    #[error("a guest has at most {MAX_VIRTIO_DEVICES} virtio devices, not {found}")]
    TooManyDevices {
        /// Drives, pmem devices, the entropy device, the balloon and vsock together.
        found: usize,
    },
    /// An update that changes nothing.
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

/// Longest name of a drive or a pmem device, in bytes.
const ID_MAX: usize = 64;

/// Names go into paths of the REST API, and into names of counters.
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

/// Opens a regular file as it will be opened, and closes it again. Never waits for the other end of a pipe.
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
        // A directory cannot be opened for writing, but is better called one.
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

/// Paths go through JSON and to system calls: no empty ones, no zero bytes, none too long for the host.
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
