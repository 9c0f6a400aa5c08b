//! What is to be measured.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::{BenchError, Configuration, Peer, Workload};
use clap::ValueEnum;

/// The files a guest is made of.
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
    /// What `make guest` makes.
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

/// What is to be measured.
#[derive(Clone, Debug)]
pub struct Options {
    /// How guests are started; where there is none, in each way that this host and this Coppice have.
    pub configurations: Vec<Configuration>,
    /// What guests do.
    pub workloads: Vec<Workload>,
    /// Guests of a run.
    pub guests: usize,
    /// RAM of each in MiB.
    pub memory: u32,
    /// The files they are made of.
    pub inputs: Inputs,
    /// How the peer is called.
    pub peer: Peer,
    /// More arguments of `coppice run`.
    pub run_arguments: Vec<String>,
    /// Start all at once.
    pub parallel: bool,
    /// For guests to come to rest, before each reading.
    pub settle: Duration,
    /// For how long CPU time is watched, in whole seconds.
    pub window: Duration,
    /// For how long a guest may work until it idles.
    pub patience: Duration,
    /// Where the results go.
    pub out: Option<PathBuf>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            configurations: Vec::new(),
            workloads: vec![Workload::Read],
            guests: 6,
            memory: 128,
            inputs: Inputs::default(),
            peer: Peer::default(),
            run_arguments: Vec::new(),
            parallel: false,
            settle: Duration::from_secs(2),
            window: Duration::from_secs(10),
            patience: Duration::from_mins(3),
            out: None,
        }
    }
}

impl Options {
    /// The configurations that were asked for, or all that apply.
    pub(super) fn chosen(&self) -> Vec<Configuration> {
        if !self.configurations.is_empty() {
            return self.configurations.clone();
        }
        Configuration::value_variants()
            .iter()
            .copied()
            .filter(|configuration| configuration.applies(self))
            .collect()
    }

    /// Refuses what would fail only when much was measured.
    pub(super) fn check(&self) -> Result<(), BenchError> {
        for workload in &self.workloads {
            let disk = self.inputs.disk(*workload);
            for file in [&*self.inputs.kernel, &*self.inputs.initrd, disk] {
                if !file.is_file() {
                    return Err(BenchError::Refused(format!(
                        "{} is not there; `make guest` makes it, and --kernel, --initrd, --disk and --python-disk name others",
                        file.display()
                    )));
                }
            }
        }
        Ok(())
    }
}
