//! The formats of disks that a guest can have.

use serde::{Deserialize, Serialize};
use storage::Format;

/// The format of a disk's file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum DriveFormat {
    /// The file is the disk.
    Raw,
    /// VHDX ([MS-VHDX]).
    Vhdx,
}

impl From<DriveFormat> for Format {
    fn from(format: DriveFormat) -> Self {
        match format {
            DriveFormat::Raw => Self::Raw,
            DriveFormat::Vhdx => Self::Vhdx,
        }
    }
}
