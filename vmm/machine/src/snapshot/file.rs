//! The file of a snapshot's state: a header, and the state as JSON.
//!
//! | offset | bytes | |
//! |---|---|---|
//! | 0 | 8 | `COPPSNAP` |
//! | 8 | 4 | version, little-endian as all numbers here |
//! | 12 | 4 | CRC-32C of the state |
//! | 16 | 8 | bytes of the state, which follows |

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Mode, OFlags, linkat, open};
use rustix::io::Errno;
use serde::Serialize;
use serde::de::DeserializeOwned;
use sha2::{Digest, Sha256};
use tempfile::{NamedTempFile, TempPath};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::error::SnapshotError;
use super::version::VERSION;
use config::Sha256Digest;

const MAGIC: [u8; 8] = *b"COPPSNAP";
/// The longest state that is read, in bytes: many times that of the largest guest.
const MAX_LEN: u64 = 64 << 20;

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Header {
    magic: [u8; 8],
    version: [u8; 4],
    checksum: [u8; 4],
    len: [u8; 8],
}

/// A file that takes the name `path` when it is complete, and replaces the file that has it. If it is dropped before,
/// it is removed. Until then it has no name, where the host's file system supports that (`O_TMPFILE`): so nothing is
/// left of it when the process is killed.
#[derive(Debug)]
pub(crate) struct NewFile {
    file: File,
    /// The temporary name, where it needs one.
    other: Option<TempPath>,
    path: PathBuf,
}

fn folder_of(path: &Path) -> &Path {
    let folder = path.parent();
    let folder = folder.filter(|folder| !folder.as_os_str().is_empty());
    folder.unwrap_or(Path::new("."))
}

impl NewFile {
    /// Creates the file in the folder of `path`.
    ///
    /// # Errors
    /// `File`.
    pub(super) fn create(path: &Path) -> Result<Self, SnapshotError> {
        let failed = SnapshotError::file("create", path);
        let made = || -> io::Result<Self> {
            let folder = folder_of(path).canonicalize()?;
            let name = path.file_name().ok_or(io::ErrorKind::IsADirectory)?;
            let path = folder.join(name);
            let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
            match open(&folder, flags, Mode::RUSR | Mode::WUSR) {
                // The file is given its name by way of this folder, so it has to be there.
                Ok(file) if Path::new(DESCRIPTORS).exists() => Ok(Self {
                    file: file.into(),
                    other: None,
                    path,
                }),
                // Other causes keep a file with a name from being created, too, and its error describes them better.
                Ok(_) | Err(_) => {
                    let (file, other) = NamedTempFile::new_in(&folder)?.into_parts();
                    Ok(Self {
                        file,
                        other: Some(other),
                        path,
                    })
                }
            }
        };
        made().map_err(failed)
    }

    /// The file that is written to.
    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// The absolute path that it is to have.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Makes durable what was written. An error of a full disk is found here at the latest.
    ///
    /// # Errors
    /// `File`.
    pub(super) fn sync(&self) -> Result<(), SnapshotError> {
        let failed = SnapshotError::file("write", &self.path);
        self.file.sync_data().map_err(failed)
    }

    /// Sets the length of the file, which may end in a hole, and makes durable what was written.
    ///
    /// # Errors
    /// `File`.
    pub(super) fn finish(&self, len: u64) -> Result<(), SnapshotError> {
        let failed = SnapshotError::file("write", &self.path);
        self.file.set_len(len).map_err(failed)?;
        self.sync()
    }

    /// Gives the file its name, and returns whether the name was free.
    ///
    /// # Errors
    /// `File`; then the file that had the name still has it.
    pub(super) fn name(self) -> Result<bool, SnapshotError> {
        let failed = SnapshotError::file("name", &self.path);
        let named = || -> io::Result<bool> {
            if let Some(other) = self.other {
                let is_new = !self.path.try_exists()?;
                other.persist(&self.path)?;
                return Ok(is_new);
            }
            match link(&self.file, &self.path) {
                Err(Errno::EXIST) => {}
                linked => return Ok(linked.map(|()| true)?),
            }
            // linkat(2) replaces no file, so the file gets a temporary name, which then replaces the other by
            // rename(2).
            let mut random = [0; 8];
            rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())?;
            let name = format!(".coppice-{:016x}", u64::from_ne_bytes(random));
            let other = folder_of(&self.path).join(name);
            link(&self.file, &other)?;
            TempPath::try_from_path(other)?.persist(&self.path)?;
            Ok(false)
        };
        named().map_err(failed)
    }
}

const DESCRIPTORS: &str = "/proc/self/fd";

fn link(file: &File, path: &Path) -> rustix::io::Result<()> {
    let own = format!("{DESCRIPTORS}/{}", file.as_raw_fd());
    linkat(CWD, own, CWD, path, AtFlags::SYMLINK_FOLLOW)
}

/// Writes a state to a new file, which does not have its name yet.
///
/// # Errors
/// `File`.
pub(super) fn write(path: &Path, state: &impl Serialize) -> Result<NewFile, SnapshotError> {
    let failed = SnapshotError::file("write", path);
    let json = serde_json::to_vec(state).map_err(|error| SnapshotError::Json {
        path: path.to_owned(),
        source: error,
    })?;
    let header = Header {
        magic: MAGIC,
        version: VERSION.to_le_bytes(),
        checksum: crc32c::crc32c(&json).to_le_bytes(),
        len: (json.len() as u64).to_le_bytes(),
    };
    let new = NewFile::create(path)?;
    let mut file = new.file();
    file.write_all(header.as_bytes())
        .and_then(|()| file.write_all(&json))
        .map_err(failed)?;
    new.sync()?;
    Ok(new)
}

fn header_of(bytes: &[u8], path: &Path) -> Result<Header, SnapshotError> {
    let header = Header::read_from_bytes(bytes).ok();
    let header = header.filter(|header| header.magic == MAGIC);
    header.ok_or_else(|| SnapshotError::NotAState(path.to_owned()))
}

/// The version of the state at `path`, which this version of Coppice may be unable to read.
///
/// # Errors
/// `File`, `NotAState`.
pub fn version_of(path: &Path) -> Result<u32, SnapshotError> {
    let file = File::open(path).map_err(SnapshotError::file("open", path))?;
    let mut bytes = Vec::new();
    file.take(size_of::<Header>() as u64)
        .read_to_end(&mut bytes)
        .map_err(SnapshotError::file("read", path))?;
    Ok(u32::from_le_bytes(header_of(&bytes, path)?.version))
}

/// Reads the state in a file that is open, at `path`, and has the digest `expected`, if one is given.
///
/// # Errors
/// `File`, `OtherState`, `NotAState`, `Version`, `Truncated`, `Damaged`, `Json`.
pub(super) fn read<T: DeserializeOwned>(
    file: File,
    path: &Path,
    expected: Option<Sha256Digest>,
) -> Result<T, SnapshotError> {
    let mut whole = Vec::new();
    file.take(size_of::<Header>() as u64 + MAX_LEN)
        .read_to_end(&mut whole)
        .map_err(SnapshotError::file("read", path))?;
    // Before anything is parsed: the checksum below finds accidents, and no deceit.
    if let Some(expected) = expected {
        let found = Sha256Digest::from(<[u8; 32]>::from(Sha256::digest(&whole)));
        if found != expected {
            return Err(SnapshotError::OtherState {
                path: path.to_owned(),
                expected,
                found,
            });
        }
    }
    let mut file = whole.as_slice();
    let mut bytes = Vec::new();
    (&mut file)
        .take(size_of::<Header>() as u64)
        .read_to_end(&mut bytes)
        .map_err(SnapshotError::file("read", path))?;
    let header = header_of(&bytes, path)?;
    let version = u32::from_le_bytes(header.version);
    if version != VERSION {
        return Err(SnapshotError::Version {
            path: path.to_owned(),
            version,
        });
    }
    let len = u64::from_le_bytes(header.len);
    if len > MAX_LEN {
        return Err(SnapshotError::Damaged {
            path: path.to_owned(),
            offset: 0,
        });
    }
    let mut json = Vec::new();
    file.take(len)
        .read_to_end(&mut json)
        .map_err(SnapshotError::file("read", path))?;
    let header_len = size_of::<Header>() as u64;
    if json.len() as u64 != len {
        return Err(SnapshotError::Truncated {
            path: path.to_owned(),
            found: header_len + json.len() as u64,
            expected: header_len + len,
        });
    }
    if crc32c::crc32c(&json) != u32::from_le_bytes(header.checksum) {
        return Err(SnapshotError::Damaged {
            path: path.to_owned(),
            offset: header_len,
        });
    }
    serde_json::from_slice(&json).map_err(|source| SnapshotError::Json {
        path: path.to_owned(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn read<T: DeserializeOwned>(
        path: &Path,
        expected: Option<Sha256Digest>,
    ) -> Result<T, SnapshotError> {
        super::read(File::open(path).unwrap(), path, expected)
    }

    #[test]
    fn a_state_comes_back_and_no_cut_or_flipped_file_is_taken_for_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state");
        let state = json!({"vcpus": [1, 2, 3], "name": "a"});
        write(&path, &state).unwrap().name().unwrap();
        assert_eq!(read::<Value>(&path, None).unwrap(), state);
        let whole = std::fs::read(&path).unwrap();
        for len in 0..whole.len() {
            std::fs::write(&path, &whole[..len]).unwrap();
            let error = read::<Value>(&path, None).unwrap_err();
            let expected = matches!(error, SnapshotError::NotAState(_) if len < 24)
                || matches!(error, SnapshotError::Truncated { .. } if len >= 24);
            assert!(expected, "{len}: {error}");
        }
        for bit in 0..whole.len() * 8 {
            let mut flipped = whole.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            std::fs::write(&path, &flipped).unwrap();
            read::<Value>(&path, None).unwrap_err();
        }
    }

    #[test]
    fn a_state_of_another_version_is_named_as_such_and_a_file_is_replaced_as_a_whole() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state");
        assert!(write(&path, &json!(1)).unwrap().name().unwrap());
        let second = write(&path, &json!(2)).unwrap();
        assert_eq!(read::<Value>(&path, None).unwrap(), json!(1));
        assert!(!second.name().unwrap());
        assert_eq!(read::<Value>(&path, None).unwrap(), json!(2));
        assert_eq!(folder.path().read_dir().unwrap().count(), 1);
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[8] = 2;
        std::fs::write(&path, &bytes).unwrap();
        let error = read::<Value>(&path, None).unwrap_err();
        assert!(matches!(error, SnapshotError::Version { version: 2, .. }));
        assert_eq!(version_of(&path).unwrap(), 2);
        std::fs::write(&path, &bytes[..23]).unwrap();
        let error = version_of(&path).unwrap_err();
        assert!(matches!(error, SnapshotError::NotAState(_)), "{error}");
        let error = write(&folder.path().join("none/state"), &json!(1)).unwrap_err();
        assert!(error.to_string().contains("none/state"), "{error}");
    }

    #[test]
    fn a_state_of_another_digest_is_refused_before_anything_of_it_is_believed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state");
        write(&path, &json!(1)).unwrap().name().unwrap();
        let digest = |bytes: &[u8]| Sha256Digest::from(<[u8; 32]>::from(Sha256::digest(bytes)));
        let own = digest(&std::fs::read(&path).unwrap());
        assert_eq!(read::<Value>(&path, Some(own)).unwrap(), json!(1));
        // A whole state with a right checksum, and what is no state at all.
        write(&path, &json!(2)).unwrap().name().unwrap();
        for other in [std::fs::read(&path).unwrap(), b"no state".to_vec()] {
            std::fs::write(&path, &other).unwrap();
            let error = read::<Value>(&path, Some(own)).unwrap_err();
            let is_refused = matches!(&error, SnapshotError::OtherState { expected, found, .. }
                if *expected == own && *found == digest(&other));
            assert!(is_refused, "{error}");
            assert!(
                error.to_string().contains("/state has the SHA-256"),
                "{error}"
            );
        }
    }

    #[test]
    fn a_file_that_is_not_complete_has_no_name() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state");
        let new = write(&path, &json!(1)).unwrap();
        // There is no name even while the file is not dropped, as when the process is killed.
        assert!(new.other.is_some() || folder.path().read_dir().unwrap().count() == 0);
        drop(new);
        assert_eq!(folder.path().read_dir().unwrap().count(), 0);
        // A name that cannot be given leaves no file either.
        std::fs::create_dir(&path).unwrap();
        write(&path, &json!(1)).unwrap().name().unwrap_err();
        assert_eq!(folder.path().read_dir().unwrap().count(), 1);
    }
}
