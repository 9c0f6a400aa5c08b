//! What is to be measured.

use std::path::PathBuf;
use std::time::Duration;

use super::configuration::Configuration;
use super::error::BenchError;
use super::inputs::Inputs;
use super::ksm;
use super::peer::Peer;
use super::workload::Workload;
use clap::ValueEnum;

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
            .filter(|configuration| self.can_have(*configuration))
            .collect()
    }

    /// Whether a configuration is measured where nobody says what is to be: what is there, and each only under one
    /// name.
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
