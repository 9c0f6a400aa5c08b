//! `coppice bench`.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand};

use crate::{Configuration, Inputs, Options, Peer, Workload};
use config::Mebibytes;

/// Examples, which follow the help.
pub const EXAMPLES: &str = "Examples:
  coppice bench density --out target/density
  coppice bench density --config share-off,share-all --workload read,python --guests 20
  coppice bench density --config share-all --explain
  coppice bench density --plot target/density/result.json --out target/density
As root, the page cache is dropped before readings, and KSM can be measured.";

/// The benchmarks.
#[derive(Debug, Subcommand)]
pub enum BenchCommand {
    /// Measure the memory, boot time and CPU time that each guest costs, and how many a host holds.
    #[command(after_help = EXAMPLES)]
    Density(Box<DensityArguments>),
}

/// The arguments of `coppice bench density`.
#[derive(Debug, Args)]
pub struct DensityArguments {
    /// How guests are started; more behind commas. All that this host and this Coppice have if not given.
    #[arg(long, value_name = "NAME", value_enum, value_delimiter = ',')]
    config: Vec<Configuration>,
    /// What each guest does before it idles; more behind commas.
    #[arg(
        long,
        value_name = "NAME",
        value_enum,
        value_delimiter = ',',
        default_value = "read"
    )]
    workload: Vec<Workload>,
    /// Guests.
    #[arg(long, value_name = "NUMBER", default_value = "6", value_parser = clap::value_parser!(u16).range(1..))]
    guests: u16,
    /// RAM of a guest, with a binary suffix.
    #[arg(long, value_name = "SIZE", default_value = "128M")]
    mem: Mebibytes,
    /// The kernel [default: target/guest/vmlinuz].
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,
    /// The initrd: its /init has to run the script in coppice.sh= [default: target/guest/initrd.cpio.gz].
    #[arg(long, value_name = "FILE")]
    initrd: Option<PathBuf>,
    /// The disk, with the file of 40 MiB that guests read [default: target/guest/bench.vhdx].
    #[arg(long, value_name = "FILE")]
    disk: Option<PathBuf>,
    /// The disk of the workload python [default: target/guest/full.vhdx].
    #[arg(long, value_name = "FILE")]
    python_disk: Option<PathBuf>,
    /// QEMU with its microvm machine, and words before its arguments: where its libraries are not installed, their
    /// loader with --library-path comes first [default: /usr/bin/qemu-system-x86_64-microvm].
    #[arg(long, value_name = "COMMAND", allow_hyphen_values = true)]
    peer: Option<Peer>,
    /// More arguments of every `coppice run`.
    #[arg(long, value_name = "WORDS", allow_hyphen_values = true)]
    run_arguments: Option<String>,
    /// Start all guests at once, instead of each when the one before idles.
    #[arg(long)]
    parallel: bool,
    /// How long guests come to rest before each reading.
    #[arg(long, value_name = "SECONDS", default_value = "2")]
    settle: u64,
    /// How long CPU time is watched when all are at rest.
    #[arg(long, value_name = "SECONDS", default_value = "10")]
    window: u64,
    /// Make result.json, table.txt, density.svg and density.png in this folder.
    #[arg(long, value_name = "FOLDER")]
    out: Option<PathBuf>,
    /// Write JSON.
    #[arg(long)]
    json: bool,
    /// Say instead for one guest of each of Coppice's configurations where its RAM is, by what lies there and by what
    /// the guest uses it for.
    #[arg(long, conflicts_with_all = ["parallel", "guests"])]
    explain: bool,
    /// Join results of earlier benchmarks, and make table and pictures of them; measures nothing. Can be repeated.
    #[arg(long, value_name = "FILE", requires = "out", conflicts_with_all = ["explain", "config"])]
    plot: Vec<PathBuf>,
}

/// What `coppice bench density` does.
#[derive(Debug)]
pub enum DensityTask {
    /// Measures.
    Measure(Options),
    /// Reports where guest RAM is.
    Explain(Options),
    /// Draws earlier results.
    Plot {
        /// The results.
        results: Vec<PathBuf>,
        /// The folder for the pictures.
        out: PathBuf,
    },
}

impl DensityArguments {
    /// Whether the result is to be JSON.
    pub fn json(&self) -> bool {
        self.json
    }

    /// The task that the arguments stand for.
    pub fn into_task(self) -> DensityTask {
        if let (false, Some(out)) = (self.plot.is_empty(), &self.out) {
            return DensityTask::Plot {
                results: self.plot,
                out: out.clone(),
            };
        }
        let (inputs, Mebibytes(memory)) = (Inputs::default(), self.mem);
        let words = self.run_arguments.unwrap_or_default();
        let options = Options {
            configurations: self.config,
            workloads: self.workload,
            guests: self.guests.into(),
            memory,
            inputs: Inputs {
                kernel: self.kernel.unwrap_or(inputs.kernel),
                initrd: self.initrd.unwrap_or(inputs.initrd),
                disk: self.disk.unwrap_or(inputs.disk),
                python_disk: self.python_disk.unwrap_or(inputs.python_disk),
            },
            peer: self.peer.unwrap_or_default(),
            run_arguments: words.split_whitespace().map(str::to_owned).collect(),
            parallel: self.parallel,
            settle: Duration::from_secs(self.settle),
            window: Duration::from_secs(self.window),
            out: self.out,
            ..Options::default()
        };
        if self.explain {
            DensityTask::Explain(options)
        } else {
            DensityTask::Measure(options)
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    #[command(propagate_version = true, version)]
    struct Bench {
        #[command(subcommand)]
        command: BenchCommand,
    }

    fn task(arguments: &[&str]) -> Result<DensityTask, String> {
        let words = ["bench", "density"].iter().chain(arguments);
        let bench = Bench::try_parse_from(words).map_err(|error| error.to_string())?;
        let BenchCommand::Density(arguments) = bench.command;
        Ok(arguments.into_task())
    }

    #[test]
    fn lists_stand_behind_commas() {
        let words = [
            "--config",
            "share-off,qemu-microvm-ksm",
            "--workload",
            "read,idle",
            "--mem",
            "256M",
        ];
        let DensityTask::Measure(options) = task(&words).unwrap() else {
            panic!("not a measurement");
        };
        assert_eq!(
            options.configurations,
            [Configuration::ShareOff, Configuration::QemuMicrovmKsm]
        );
        assert_eq!(options.workloads, [Workload::Read, Workload::Idle]);
        assert_eq!((options.memory, options.guests), (256, 6));
        assert_eq!(options.inputs, Inputs::default());
    }

    #[test]
    fn earlier_results_are_plotted_into_a_folder_and_nothing_is_measured() {
        let plotted = task(&["--plot", "a", "--plot", "b", "--out", "c"]).unwrap();
        assert!(matches!(plotted, DensityTask::Plot { results, .. } if results.len() == 2));
        assert!(task(&["--plot", "a"]).unwrap_err().contains("--out"));
        assert!(matches!(
            task(&["--explain"]).unwrap(),
            DensityTask::Explain(_)
        ));
    }

    #[test]
    fn what_cannot_be_measured_is_a_usage_error() {
        for words in [
            ["--config", "xen"],
            ["--workload", "sort"],
            ["--guests", "0"],
            ["--peer", " "],
        ] {
            task(&words).expect_err(&format!("{words:?}"));
        }
    }
}
