//! `coppice bench density`: how many guests a host holds, and what each of them costs.
//!
//! ```text
//! Options ── run ──┬─ command, peer           how a guest is started
//!                  ├─ workload                what it does, and the checksum that it has to print
//!                  ├─ guest                   its process, and its console
//!                  ├─ host, process, ksm      readings of /proc and /sys
//!                  └─ report ── extrapolate, table, plot
//! explain: where the RAM of one guest is, by what lies there (kernel_map) and by what the guest uses it for
//!          (page_use)
//! ```
//!
//! Guests are child processes, started as a user starts them. Of the VMM, only the console is used: all figures are the
//! host kernel's. One thread controls the benchmark; for each guest, a thread reads its console, and another its log.

mod arguments;
mod command;
mod configuration;
mod error;
mod explain;
mod extrapolate;
mod guest;
mod host;
mod inputs;
mod interrupt;
mod kernel_map;
mod ksm;
mod number;
mod options;
mod page_use;
mod pagemap;
mod peer;
mod plot;
mod process;
mod report;
mod run;
mod table;
mod workload;

pub use arguments::{BenchCommand, DensityArguments, DensityTask};
pub use configuration::Configuration;
pub use error::BenchError;
pub use explain::{Area, Explanation};
pub use extrapolate::{Extrapolation, Line};
pub use host::{Host, HostMemory};
pub use inputs::Inputs;
pub use ksm::KsmFigures;
pub use options::Options;
pub use page_use::Use;
pub use peer::Peer;
pub use report::{GuestFigures, Point, Report, Run, Second};
pub use run::{density, explanations, plot};
pub use workload::Workload;
