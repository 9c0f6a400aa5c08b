//! The lab: whole guests on real KVM, on machines whose own KVM cannot run a stock kernel.
//!
//! ```text
//! this machine ── QEMU (TCG, emulates AMD-V) ── L1: Debian's kernel, kvm_amd, `lab agent` ── coppice ── L2 guests
//!      │                                            │
//!      └── boots L1, checks the disks afterwards    └── runs the scenarios, writes results and logs to the lab disk
//! ```
//!
//! Times under emulation have a meaning only as ratios within one run.

mod agent;
mod api;
mod guest;
mod host;
mod output;
#[allow(
    clippy::unwrap_used,
    reason = "it is one of tests, which may end where they fail"
)]
#[path = "../../vmm/machine/tests/page_server/mod.rs"]
mod page_server;
mod peer;
mod programs;
mod result;
mod scenarios;
mod socket;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(about = "Runs Coppice with real guests inside an emulated host")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Lists the scenarios.
    List,
    /// Runs scenarios, by default all tests.
    Run {
        /// Names, or beginnings of names; `bench`, `density` and `demo` are run only when named.
        scenarios: Vec<String>,
        /// Writes the results as JSON.
        #[arg(long)]
        json: Option<PathBuf>,
        /// The folder for the lab's disk, its host's log and the results; by default target/lab.
        #[arg(long)]
        folder: Option<PathBuf>,
        /// Shows each scenario's output, even if it has passed.
        #[arg(long)]
        verbose: bool,
    },
    /// Runs the scenarios named in `plan.json`; the lab's host calls this.
    #[command(hide = true)]
    Agent,
    /// Uses a guest's vsock device; a guest calls this.
    #[command(hide = true, subcommand)]
    Socket(socket::Task),
}

fn main() -> ExitCode {
    let ran = match Cli::parse().command {
        Command::List => {
            for scenario in scenarios::ALL {
                println!("{}", scenario.name);
            }
            Ok(true)
        }
        Command::Run {
            scenarios,
            json,
            folder,
            verbose,
        } => host::run(&scenarios, json.as_deref(), folder, verbose),
        Command::Agent => agent::run().map(|()| true),
        Command::Socket(task) => socket::run(task).map(|()| true),
    };
    match ran {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("lab: {}", report::chain(&error));
            ExitCode::FAILURE
        }
    }
}
