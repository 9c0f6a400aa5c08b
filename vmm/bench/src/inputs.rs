//! The files that a guest boots from and reads.

use std::path::{Path, PathBuf};

use super::workload::Workload;

/// The files that a guest boots from and reads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Inputs {
    /// The kernel.
    pub kernel: PathBuf,
    /// The initrd, whose `/init` runs the script on the command line.
    pub initrd: PathBuf,
    /// The disk of all workloads but Python's.
    pub disk: PathBuf,
    /// A disk with Python on it.
    pub python_disk: PathBuf,
}

impl Default for Inputs {
    /// The files that `make guest` builds.
    fn default() -> Self {
        let folder = Path::new("target/guest");
        Self {
            kernel: folder.join("vmlinuz"),
            initrd: folder.join("initrd.cpio.gz"),
            disk: folder.join("bench.vhdx"),
            python_disk: folder.join("full.vhdx"),
        }
    }
}

impl Inputs {
    /// The disk of a workload.
    pub(super) fn disk(&self, workload: Workload) -> &Path {
        match workload {
            Workload::Idle | Workload::Read | Workload::Write => &self.disk,
            Workload::Python => &self.python_disk,
        }
    }
}
