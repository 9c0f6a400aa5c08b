//! Why a configuration cannot be used.

use std::fmt;
use std::fs::{File, FileType, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;

use super::id::{DEVICE_ID_MAX, DeviceId};
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
    /// Two devices of one name.
    #[error("{field}: two devices have the id {id}")]
    DuplicateId {
        /// The field that has both.
        field: &'static str,
        /// Their name.
        id: String,
    },
    /// Two root devices.
    #[error("{field}: {id} is to be the root device, but {first} is the root already")]
    SecondRoot {
        /// The field of the second one.
        field: &'static str,
        /// The second one.
        id: String,
        /// The first one.
        first: String,
    },
    /// The guest has more devices than interrupt lines.
    #[error("a guest has at most {MAX_VIRTIO_DEVICES} virtio devices, not {found}")]
    TooManyDevices {
        /// All of them together.
        found: usize,
    },
    /// Two fields that exclude each other.
    #[error("{} and {} are both given: leave out one", fields[0], fields[1])]
    Together {
        /// The fields.
        fields: [&'static str; 2],
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

/// Checks an id, which is used in paths of the REST API, and in names of counters.
pub(super) fn check_id(field: &'static str, id: &str) -> Result<(), ConfigError> {
    match DeviceId::new(id) {
        Ok(_) => Ok(()),
        Err(_) => Err(ConfigError::invalid(
            field,
            &format_args!("{id:.80?}"),
            format!("1 to {DEVICE_ID_MAX} letters, digits and underscores"),
        )),
    }
}

/// Checks that a regular file can be opened as it will be. Does not block if the path names a FIFO.
pub(super) fn check_file(field: &'static str, path: &Path, write: bool) -> Result<(), ConfigError> {
    check_kind(field, path, write, FileType::is_file)
}

/// As [`check_file`], of a file or a block device.
pub(super) fn check_disk(field: &'static str, path: &Path, write: bool) -> Result<(), ConfigError> {
    check_kind(field, path, write, |kind| {
        kind.is_file() || kind.is_block_device()
    })
}

fn check_kind(
    field: &'static str,
    path: &Path,
    write: bool,
    is_right: impl FnOnce(&FileType) -> bool,
) -> Result<(), ConfigError> {
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
    let metadata = file.and_then(|file| file.metadata()).map_err(failed)?;
    if is_right(&metadata.file_type()) {
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
