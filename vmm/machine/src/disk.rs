//! Opens the disk of a drive, for a guest that starts and for one that is loaded.

use std::sync::Arc;

use config::{DriveConfig, DriveFormat};

/// Opens the disk of a drive with the options of its configuration.
pub(crate) fn open_disk(drive: &DriveConfig) -> Result<Arc<dyn storage::Disk>, storage::OpenError> {
    let options = storage::OpenOptions {
        read_only: drive.is_read_only,
        format: drive.format.map(Into::into),
        parents: if !DriveFormat::may_have_parents(drive.format, &drive.path_on_host) {
            storage::Parents::Nowhere
        } else if let Some(folder) = &drive.parents {
            storage::Parents::Within(folder.clone())
        } else {
            storage::Parents::Anywhere
        },
        punch_holes: !drive.keep_space,
        kinds: storage::FileKinds::RegularAndBlock,
        ..storage::OpenOptions::default()
    };
    storage::open(&drive.path_on_host, &options)
}
