//! The formats of disks that a guest can have.

use std::path::Path;

use serde::{Deserialize, Serialize};
use storage::Format;
use storage::foreign::SourceFormat;

/// The format of a disk's file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum DriveFormat {
    /// The file is the disk.
    Raw,
    /// VHDX ([MS-VHDX]).
    Vhdx,
}

impl DriveFormat {
    /// The format of a file by what it begins with, of which nothing else is read; `None` where it cannot be read, or
    /// is of no format that a guest's disk can have. Whoever opens the disk reports that.
    pub fn of_file(path: &Path) -> Option<Self> {
        match storage::detect(path).ok()? {
            SourceFormat::Raw => Some(Self::Raw),
            SourceFormat::Vhdx => Some(Self::Vhdx),
            SourceFormat::Qcow2 | SourceFormat::Vhd | SourceFormat::Vmdk => None,
        }
    }

    /// Whether the disk in a file may stand on parents: where its operator has named the format, in the configuration
    /// or by how the file is called. A format that was guessed follows nothing, because whoever wrote the file decides
    /// what it looks like.
    pub fn may_have_parents(named: Option<Self>, path: &Path) -> bool {
        match named {
            Some(Self::Vhdx) => true,
            Some(Self::Raw) => false,
            None => path
                .extension()
                .is_some_and(|end| end == "vhdx" || end == "avhdx"),
        }
    }
}

impl From<DriveFormat> for Format {
    fn from(format: DriveFormat) -> Self {
        match format {
            DriveFormat::Raw => Self::Raw,
            DriveFormat::Vhdx => Self::Vhdx,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_has_parents_only_where_its_operator_calls_it_a_vhdx() {
        let may = |named, path: &str| DriveFormat::may_have_parents(named, Path::new(path));
        let (raw, vhdx) = (Some(DriveFormat::Raw), Some(DriveFormat::Vhdx));
        assert!(may(vhdx, "/d/a.raw") && may(None, "/d/a.vhdx") && may(None, "a.avhdx"));
        for (named, path) in [
            (raw, "/d/a.vhdx"),
            (None, "/d/a"),
            (None, "/d/vhdx"),
            (None, ".vhdx"),
        ] {
            assert!(!may(named, path), "{path}");
        }
    }
}
