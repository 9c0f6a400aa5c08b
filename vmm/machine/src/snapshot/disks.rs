//! The identities of the disks that a guest had when it was saved: its memory fits the disk as it was at that moment,
//! and no other.

use std::fmt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use storage::Disk;
use storage::vhdx::Vhdx;

use super::error::SnapshotError;

/// The identity of a disk at one moment: it differs from that of other disks, and of the same disk after a write.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "snake_case")]
pub enum DiskIdentity {
    /// A VHDX, by the identifiers in its file. A copy of the file has them, too.
    Vhdx {
        /// Virtual disk ID ([MS-VHDX] 2.6.2.3).
        virtual_disk_id: String,
        /// `DataWriteGuid` ([MS-VHDX] 2.2.2), which the first write after the snapshot changes.
        data_write_guid: String,
    },
    /// A raw disk, by its file's metadata.
    Raw {
        /// Length in bytes.
        len: u64,
        /// When the file was last written to, in nanoseconds since 1970.
        modified: i64,
    },
    /// A block device, by its size: the host does not say when it was last written to.
    BlockDevice {
        /// Size in bytes.
        len: u64,
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
            Self::BlockDevice { len } => write!(f, "a block device of {len} bytes"),
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
    /// The identity of a disk that has no requests in flight. `None` where the host does not return the file's
    /// metadata.
    pub fn of(disk: &Arc<dyn Disk>) -> Option<Self> {
        if let Some(vhdx) = Vhdx::of(disk.clone()) {
            let identifiers = vhdx.identifiers();
            return Some(Self::Vhdx {
                virtual_disk_id: identifiers.virtual_disk_id.to_string(),
                data_write_guid: identifiers.data_write_guid.to_string(),
            });
        }
        let metadata = disk.files().first()?.metadata().ok()?;
        if metadata.file_type().is_block_device() {
            return Some(Self::BlockDevice {
                len: disk.geometry().size,
            });
        }
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
    /// The identity of the disk, which has no requests in flight. A later write to the disk changes its identity.
    ///
    /// # Errors
    /// `Disk`, and `Unsupported` where the disk's identity is not known.
    pub(crate) fn identify(self, disk: &Arc<dyn Disk>) -> Result<DiskIdentity, SnapshotError> {
        // After a close, the next write sets a new DataWriteGuid.
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
            // Times of a file system are only as fine as the kernel's clock tick.
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
