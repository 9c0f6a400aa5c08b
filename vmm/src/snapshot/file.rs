//! The file of a snapshot's state: a header, and the state as JSON.
//!
//! | offset | bytes | |
//! |---|---|---|
//! | 0 | 8 | `COPPSNAP` |
//! | 8 | 4 | version, little-endian as all numbers here |
//! | 12 | 4 | CRC-32C of the state |
//! | 16 | 8 | bytes of the state, which follows |

use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;

use serde::Serialize;
use serde::de::DeserializeOwned;
use tempfile::NamedTempFile;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::SnapshotError;

/// Of the format. A change that an older reader would misunderstand gets a new one.
pub const VERSION: u32 = 1;
const MAGIC: [u8; 8] = *b"COPPSNAP";
/// Longest state that is read, in bytes: many times that of the largest guest.
const MAX_LEN: u64 = 64 << 20;

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Header {
    magic: [u8; 8],
    version: [u8; 4],
    checksum: [u8; 4],
    len: [u8; 8],
}

/// A new file that takes the name `path`, and the place of what has it, once it is complete, and goes otherwise.
pub(super) fn create(path: &Path) -> Result<NamedTempFile, SnapshotError> {
    let folder = path
        .parent()
        .filter(|folder| !folder.as_os_str().is_empty());
    NamedTempFile::new_in(folder.unwrap_or(Path::new(".")))
        .map_err(SnapshotError::file("create", path))
}

/// Makes a file durable under its name.
pub(super) fn complete(file: NamedTempFile, path: &Path) -> Result<(), SnapshotError> {
    file.as_file()
        .sync_data()
        .map_err(SnapshotError::file("write", path))?;
    file.persist(path)
        .map(drop)
        .map_err(|error| SnapshotError::file("name", path)(error.error))
}

/// Writes a state.
///
/// # Errors
/// `File`; then there is no new file, and an old one is as it was.
pub(super) fn write(path: &Path, state: &impl Serialize) -> Result<(), SnapshotError> {
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
    let mut file = create(path)?;
    file.write_all(header.as_bytes())
        .and_then(|()| file.write_all(&json))
        .map_err(failed)?;
    complete(file, path)
}

/// Reads a state.
///
/// # Errors
/// `File`, `NotAState`, `Version`, `Truncated`, `Damaged`, `Json`.
pub(super) fn read<T: DeserializeOwned>(path: &Path) -> Result<T, SnapshotError> {
    let mut file = File::open(path).map_err(SnapshotError::file("open", path))?;
    let mut bytes = Vec::new();
    (&mut file)
        .take(size_of::<Header>() as u64)
        .read_to_end(&mut bytes)
        .map_err(SnapshotError::file("read", path))?;
    let header = Header::read_from_bytes(&bytes).ok();
    let header = header.filter(|header| header.magic == MAGIC);
    let header = header.ok_or_else(|| SnapshotError::NotAState(path.to_owned()))?;
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

    #[test]
    fn a_state_comes_back_and_no_cut_or_flipped_file_is_taken_for_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state");
        let state = json!({"vcpus": [1, 2, 3], "name": "a"});
        write(&path, &state).unwrap();
        assert_eq!(read::<Value>(&path).unwrap(), state);
        let whole = std::fs::read(&path).unwrap();
        for len in 0..whole.len() {
            std::fs::write(&path, &whole[..len]).unwrap();
            let error = read::<Value>(&path).unwrap_err();
            let expected = matches!(error, SnapshotError::NotAState(_) if len < 24)
                || matches!(error, SnapshotError::Truncated { .. } if len >= 24);
            assert!(expected, "{len}: {error}");
        }
        for bit in 0..whole.len() * 8 {
            let mut flipped = whole.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            std::fs::write(&path, &flipped).unwrap();
            read::<Value>(&path).unwrap_err();
        }
    }

    #[test]
    fn a_state_of_another_version_is_named_as_such_and_a_file_is_replaced_as_a_whole() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state");
        write(&path, &json!(1)).unwrap();
        write(&path, &json!(2)).unwrap();
        assert_eq!(read::<Value>(&path).unwrap(), json!(2));
        assert_eq!(folder.path().read_dir().unwrap().count(), 1);
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[8] = 2;
        std::fs::write(&path, &bytes).unwrap();
        let error = read::<Value>(&path).unwrap_err();
        assert!(matches!(error, SnapshotError::Version { version: 2, .. }));
        let error = write(&folder.path().join("none/state"), &json!(1)).unwrap_err();
        assert!(error.to_string().contains("none/state"), "{error}");
    }
}
