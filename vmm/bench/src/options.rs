//! The options of a benchmark.

use std::path::PathBuf;
use std::time::Duration;

use super::configuration::Configuration;
use super::error::BenchError;
use super::inputs::Inputs;
use super::ksm;
use super::peer::Peer;
use super::workload::Workload;
use clap::ValueEnum;

/// The options of a benchmark.
#[derive(Clone, Debug)]
pub struct Options {
    /// How guests are started; where it is empty, in each way that this host and this build of Coppice support.
    pub configurations: Vec<Configuration>,
    /// What guests do.
    pub workloads: Vec<Workload>,
    /// The number of guests.
    pub guests: usize,
    /// RAM of each in MiB.
    pub memory: u32,
    /// The files that they boot from and read.
    pub inputs: Inputs,
    /// How the peer is started.
    pub peer: Peer,
    /// More arguments of `coppice run`.
    pub run_arguments: Vec<String>,
    /// Start all at once.
    pub parallel: bool,
    /// How long guests idle before each reading.
    pub settle: Duration,
    /// For how long CPU time is measured, in whole seconds.
    pub window: Duration,
    /// How long a guest may work until it idles.
    pub patience: Duration,
    /// The folder for the results.
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
    /// The requested configurations, or all that apply.
    pub(super) fn chosen(&self) -> Vec<Configuration> {
        if !self.configurations.is_empty() {
            return self.configurations.clone();
        }
        Configuration::value_variants()
            .iter()
            .copied()
            .filter(|configuration| self.can_have(*configuration))
            .collect()
    }

    /// Whether a configuration is measured where none is requested: it has to be supported, and no two that are the
    /// same are measured.
    fn can_have(&self, configuration: Configuration) -> bool {
        match configuration {
            Configuration::ShareOff
            | Configuration::ShareBoot
            | Configuration::ShareRead
            | Configuration::ShareAll
            | Configuration::ShareAllTracefs
            | Configuration::Pmem => true,
            Configuration::QemuMicrovm => self.peer.is_there(),
            Configuration::QemuMicrovmKsm => self.peer.is_there() && ksm::can_be_set(),
        }
    }

    /// Refuses options that would fail only after a part was measured.
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
