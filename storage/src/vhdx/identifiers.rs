//! What tells one state of a file, or of a disk, from another.
//!
//! Three levels, taken lazily: an open that writes nothing leaves all as it was; what changes the file but not what a
//! reader of the disk sees (log replay, compaction, the dropping of anchors, a new parent locator) gives a new
//! FileWriteGuid; what a reader can see gives a new DataWriteGuid too. The new one is durable before the first write
//! that it announces.

use super::disk::Vhdx;
use super::format::Guid;

/// The identifiers of a file ([MS-VHDX] 2.2.2, 2.6.2.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identifiers {
    /// Changes when the file changes.
    pub file_write_guid: Guid,
    /// Changes when what a reader of the disk sees may change. A child records that of its parent.
    pub data_write_guid: Guid,
    /// Stays with the disk, as the SCSI identifier that a guest sees would.
    pub virtual_disk_id: Guid,
}

impl Vhdx {
    /// The identifiers as they are now.
    pub fn identifiers(&self) -> Identifiers {
        let commit = self.commit.lock();
        let header = commit.headers.current();
        Identifiers {
            file_write_guid: header.file_write_guid,
            data_write_guid: header.data_write_guid,
            virtual_disk_id: self.id,
        }
    }
}
