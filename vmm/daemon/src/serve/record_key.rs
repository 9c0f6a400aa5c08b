//! The daemon's key, by which it knows its own records again: HMAC-SHA256 (RFC 2104).
//!
//! A record of a template decides what root reads and maps for every clone. A checksum finds an accident in it; only
//! who has the key can make one, or change one.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use hmac::{Hmac, KeyInit, Mac};
use rustix::process::geteuid;
use rustix::rand::{GetRandomFlags, getrandom};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use sha2::Sha256;

use super::store::{self, named};
use config::Sha256Digest;

/// Bytes of a key.
const LEN: usize = 32;
/// The only mode that its file may have.
const MODE: u32 = 0o600;

/// What is wrong with a key, or with what it was to authenticate.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// The file of the key belongs to another user.
    #[error(
        "the key belongs to user {found}, and not to the daemon's: chown it, or remove it and check all templates"
    )]
    Owner {
        /// The user.
        found: u32,
    },
    /// The file of the key may be open to others.
    #[error(
        "the key has mode {found:o}, and not 600: others may know it, so remove it and check all templates"
    )]
    Mode {
        /// The mode.
        found: u32,
    },
    /// The file of the key is no key.
    #[error("the key has not {LEN} bytes: restore it, or remove it and check all templates")]
    Length,
    /// A record has another authentication code.
    #[error(
        "the record was not written by this daemon, or changed since: its HMAC is wrong (another key?)"
    )]
    Forged,
}

/// The key.
pub struct RecordKey([u8; LEN]);

/// A record with its authentication code, as it lies on disk.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SealedRecord {
    /// The HMAC of the record's bytes, in hexadecimal digits.
    hmac_sha256: Sha256Digest,
    record: Box<RawValue>,
}

impl SealedRecord {
    /// The record, whoever wrote it.
    ///
    /// # Errors
    /// Where it is no `T`.
    pub fn unchecked<T: DeserializeOwned>(&self) -> io::Result<T> {
        Ok(serde_json::from_str(self.record.get())?)
    }
}

/// The key that a daemon begins with.
pub enum FoundKey {
    /// That of an earlier daemon.
    Kept(RecordKey),
    /// A new one, which is not saved yet: no record has a code of it.
    New(RecordKey, PathBuf),
}

impl FoundKey {
    /// Reads the key, or makes one where there is no file.
    ///
    /// # Errors
    /// The host's error, or a [`RecordError`].
    pub fn read(path: &Path) -> io::Result<Self> {
        match store::open_without_waiting(path, OpenOptions::new().read(true)) {
            Ok(file) => RecordKey::read(&file).map(Self::Kept).map_err(named(path)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Ok(Self::New(RecordKey::random()?, path.to_owned()))
            }
            Err(error) => Err(named(path)(error)),
        }
    }
}

impl RecordKey {
    fn random() -> io::Result<Self> {
        let mut key = [0; LEN];
        // The kernel's generator gives up to 256 bytes at once (getrandom(2)).
        let found = getrandom(&mut key, GetRandomFlags::empty())?;
        if found != LEN {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(Self(key))
    }

    fn read(file: &File) -> io::Result<Self> {
        let metadata = file.metadata()?;
        let (owner, mode) = (metadata.uid(), metadata.mode() & 0o7777);
        if owner != geteuid().as_raw() {
            return Err(io::Error::other(RecordError::Owner { found: owner }));
        }
        if mode != MODE {
            return Err(io::Error::other(RecordError::Mode { found: mode }));
        }
        let mut bytes = Vec::new();
        file.take(LEN as u64 + 1).read_to_end(&mut bytes)?;
        let key = <[u8; LEN]>::try_from(bytes);
        key.map(Self)
            .map_err(|_| io::Error::other(RecordError::Length))
    }

    /// Writes a new key, for the daemons to come.
    ///
    /// # Errors
    /// The host's error.
    pub fn save(&self, path: &Path) -> io::Result<()> {
        store::replace_durably(path, &self.0)
    }

    fn mac(&self, text: &str) -> io::Result<Hmac<Sha256>> {
        let mac = Hmac::<Sha256>::new_from_slice(&self.0).map_err(io::Error::other)?;
        Ok(mac.chain_update(text))
    }

    /// A record with its authentication code.
    ///
    /// # Errors
    /// Where it cannot be written as JSON.
    pub fn seal(&self, record: &impl Serialize) -> io::Result<SealedRecord> {
        let record = serde_json::value::to_raw_value(record)?;
        let code = self.mac(record.get())?.finalize().into_bytes();
        Ok(SealedRecord {
            hmac_sha256: Sha256Digest::from(<[u8; 32]>::from(code)),
            record,
        })
    }

    /// The record, where it has the authentication code of this key.
    ///
    /// # Errors
    /// [`RecordError::Forged`]; where it is no `T`.
    pub fn open<T: DeserializeOwned>(&self, sealed: &SealedRecord) -> io::Result<T> {
        let code = sealed.hmac_sha256.bytes();
        // In a time that does not depend on where the two differ.
        let checked = self.mac(sealed.record.get())?.verify_slice(code);
        checked.map_err(|_| io::Error::other(RecordError::Forged))?;
        sealed.unchecked()
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, Permissions};
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use host::report::chain;

    #[test]
    fn a_record_is_known_again_by_its_key_and_neither_by_another_nor_after_a_change() {
        let (key, other) = (RecordKey::random().unwrap(), RecordKey::random().unwrap());
        let text = serde_json::to_string(&key.seal(&vec!["a", "b"]).unwrap()).unwrap();
        let read = |text: &str| serde_json::from_str::<SealedRecord>(text).unwrap();
        assert_eq!(key.open::<Vec<String>>(&read(&text)).unwrap(), ["a", "b"]);
        let changed = text.replace("\"b\"", "\"c\"");
        assert_ne!(text, changed);
        for refused in [
            other.open::<Vec<String>>(&read(&text)),
            key.open(&read(&changed)),
        ] {
            let error = refused.unwrap_err();
            assert!(chain(&error).to_string().contains("HMAC is wrong"));
        }
    }

    #[test]
    fn a_code_is_that_of_rfc_4231() {
        // Test case 2 has a shorter key, which HMAC fills up with zeros (RFC 2104, 2).
        let mut key = [0; LEN];
        key[..4].copy_from_slice(b"Jefe");
        let mac = RecordKey(key).mac("what do ya want for nothing?").unwrap();
        let code = <[u8; 32]>::from(mac.finalize().into_bytes());
        assert_eq!(
            Sha256Digest::from(code).to_string(),
            "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843"
        );
    }

    #[test]
    fn a_key_is_kept_and_is_refused_where_it_may_be_anothers() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("key");
        let FoundKey::New(key, at) = FoundKey::read(&path).unwrap() else {
            panic!("there is none yet");
        };
        key.save(&at).unwrap();
        let kept = || FoundKey::read(&path);
        assert!(matches!(kept().unwrap(), FoundKey::Kept(found) if found.0 == key.0));
        let refused = |expected: &str| {
            let Err(error) = kept() else {
                panic!("{expected}");
            };
            let text = chain(&error).to_string();
            assert!(text.contains("/key: ") && text.contains(expected), "{text}");
        };
        fs::set_permissions(&path, Permissions::from_mode(0o640)).unwrap();
        refused("mode 640");
        fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
        for wrong in [&[1; 31][..], &[1; 33]] {
            fs::write(&path, wrong).unwrap();
            refused("not 32 bytes");
        }
        if skip::unless_root() {
            std::os::unix::fs::chown(&path, Some(1234), None).unwrap();
            refused("user 1234");
        }
    }
}
