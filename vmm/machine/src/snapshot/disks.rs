//! Which disk a guest had when it was saved: memory goes with the disk as it was at that moment, and with no other.

use std::fmt;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use storage::Disk;
use storage::vhdx::Vhdx;

use super::error::SnapshotError;

/// A disk at one moment, as far as it can be told from others and from itself at another.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "snake_case")]
pub enum DiskIdentity {
    /// By the identifiers in the file, which a copy has too.
    Vhdx {
        /// Virtual disk ID ([MS-VHDX] 2.6.2.3).
        virtual_disk_id: String,
        /// `DataWriteGuid` ([MS-VHDX] 2.2.2): another one with the first write after this one was noted.
        data_write_guid: String,
    },
    /// By what the file system says of the file.
    Raw {
        /// Length in bytes.
        len: u64,
        /// When it was written to, in nanoseconds since 1970.
        modified: i64,
    },
}

impl fmt::Display for DiskIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Vhdx {
                virtual_disk_id,
                data_write_guid,
            } => write!(
                f,
                "the VHDX {virtual_disk_id} of data write {data_write_guid}"
            ),
            Self::Raw { len, modified } => {
                let (seconds, nanoseconds) = (modified / NANOSECONDS, modified % NANOSECONDS);
                write!(
                    f,
                    "a raw disk of {len} bytes, written to at {seconds}.{nanoseconds:09}"
                )
            }
        }
    }
}

const NANOSECONDS: i64 = 1_000_000_000;

impl DiskIdentity {
    /// Of a disk on which nothing is under way. `None` where the host does not tell.
    pub fn of(disk: &Arc<dyn Disk>) -> Option<Self> {
        if let Some(vhdx) = Vhdx::of(disk.clone()) {
            let identifiers = vhdx.identifiers();
            return Some(Self::Vhdx {
                virtual_disk_id: identifiers.virtual_disk_id.to_string(),
                data_write_guid: identifiers.data_write_guid.to_string(),
            });
        }
        let metadata = disk.files().first()?.metadata().ok()?;
        Some(Self::Raw {
            len: metadata.len(),
            modified: metadata
                .mtime()
                .saturating_mul(NANOSECONDS)
                .saturating_add(metadata.mtime_nsec()),
        })
    }
}

/// The disk of a drive.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct DriveState {
    pub drive_id: String,
    pub disk: DiskIdentity,
}

/// A device with a disk, by its id.
#[derive(Clone, Copy, Debug)]
pub(crate) enum DiskOf<'a> {
    Drive(&'a str),
    Pmem(&'a str),
}

impl fmt::Display for DiskOf<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Drive(id) => write!(f, "drive {id}"),
            Self::Pmem(id) => write!(f, "pmem {id}"),
        }
    }
}

impl DiskOf<'_> {
    /// Notes the disk, on which nothing is under way; what is written to it from now on makes it another.
    ///
    /// # Errors
    /// `Disk`, and `Unsupported` where the host does not tell it from others.
    pub(crate) fn identify(self, disk: &Arc<dyn Disk>) -> Result<DiskIdentity, SnapshotError> {
        // The next write announces itself, by a new DataWriteGuid.
        disk.close().map_err(|source| SnapshotError::Disk {
            device: self.to_string(),
            source,
        })?;
        let identity = DiskIdentity::of(disk);
        identity.ok_or_else(|| {
            SnapshotError::Unsupported(format!("{self}: its disk cannot be told from others"))
        })
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use storage::vhdx::{CreateOptions, Vhdx};
    use storage::{OpenOptions, blocking};

    use super::*;

    fn identity(path: &Path, change: impl FnOnce(&Arc<dyn Disk>)) -> DiskIdentity {
        let disk = storage::open(path, &OpenOptions::default()).unwrap();
        change(&disk);
        disk.close().unwrap();
        DiskIdentity::of(&disk).unwrap()
    }

    #[test]
    fn a_disk_is_the_same_until_it_is_written_to_also_while_it_stays_open() {
        let folder = tempfile::tempdir().unwrap();
        let vhdx = folder.path().join("disk.vhdx");
        Vhdx::create(&vhdx, &CreateOptions::new(8 << 20)).unwrap();
        let raw = folder.path().join("disk.raw");
        std::fs::write(&raw, vec![0; 1 << 20]).unwrap();
        for path in [vhdx, raw] {
            let disk = storage::open(&path, &OpenOptions::default()).unwrap();
            blocking::write_at(&*disk, &[1; 512], 0).unwrap();
            disk.close().unwrap();
            let saved = DiskIdentity::of(&disk).unwrap();
            blocking::read_at(&*disk, &mut [0; 512], 0).unwrap();
            assert_eq!(DiskIdentity::of(&disk).unwrap(), saved);
            // The clock of a file system may tick only so often.
            std::thread::sleep(std::time::Duration::from_millis(20));
            blocking::write_at(&*disk, &[2; 512], 512).unwrap();
            assert_ne!(DiskIdentity::of(&disk).unwrap(), saved);
            drop(disk);
            let now = identity(&path, |_| ());
            assert_ne!(now, saved);
            assert_eq!(identity(&path, |_| ()), now);
            let json = serde_json::to_string(&now).unwrap();
            assert_eq!(serde_json::from_str::<DiskIdentity>(&json).unwrap(), now);
        }
    }
}
