//! `coppice disk`: virtual disks from the command line.
//!
//! A module a kind of work. Each operation gives an `Outcome`, which is shown to people or, with `--json`, to programs;
//! errors are one line on standard error either way. What takes long is watched by `Watch`: a bar on a terminal, and an
//! end in good order when a signal asks for it.

mod bench;
mod chain;
mod convert;
mod ending;
mod examine;
mod make;
mod repair;
mod watch;

use std::fmt::Write as _;
use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};
use serde_json::Value;
use storage::SectorSize;

use config::Bytes;
use watch::Watch;

/// Shown behind the help.
pub const EXAMPLES: &str = "Examples:
  coppice disk create --size 10G base.vhdx
  coppice disk convert debian.qcow2 base.vhdx
  coppice disk create --parent base.vhdx guest.vhdx
  coppice disk info --json guest.vhdx
  coppice disk commit guest.vhdx
Sizes are binary: 512, 4K, 32M, 1.5G, 10GiB. With --json the answer is JSON on standard output.
Exit codes: 0 done, 1 failed or (check, diff) something was found, 2 wrong usage, 3 (repair, convert --salvage) done, and a part of
the disk is lost, 130 interrupted.";

/// The exit code of what is done, but for a part of the disk that is lost.
const LOST: u8 = 3;

/// How the outcome is written.
#[derive(Clone, Copy, Debug, Args)]
pub struct Output {
    /// Write JSON.
    #[arg(long)]
    json: bool,
}

/// A sector size of the command line.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Sector {
    /// 512 bytes.
    #[value(name = "512")]
    B512,
    /// 4096 bytes.
    #[value(name = "4096")]
    B4096,
}

impl From<Sector> for SectorSize {
    fn from(sector: Sector) -> Self {
        match sector {
            Sector::B512 => Self::B512,
            Sector::B4096 => Self::B4096,
        }
    }
}

/// What can be done with disks.
#[derive(Debug, Subcommand)]
pub enum DiskCommand {
    /// Make a new VHDX.
    Create(make::Create),
    /// Say what a disk is: size, kind, identifiers, chain.
    Info(examine::Info),
    /// Check every structure of a file, and whether guests can share its pages. Exits 1 if something is wrong.
    Check(examine::Check),
    /// Put right what a check found. Blocks whose entries lead nowhere are given up and named; exits 3 then.
    Repair(repair::Repair),
    /// Copy a disk (raw, qcow2, VHD, VMDK, VHDX) into a VHDX or a raw file, keeping holes.
    Convert(convert::Convert),
    /// Give a disk another size.
    Resize(make::Resize),
    /// Give free space back: move blocks down, and cut the file.
    Compact(make::Compact),
    /// Merge a child into its parent.
    Commit(chain::Commit),
    /// Record another parent, or another place of it.
    Rebase(chain::Rebase),
    /// Go on in a new child, and keep the disk as it is.
    Snapshot(chain::Snapshot),
    /// Print the extents of a disk: state, layer, place in the file.
    Map(examine::Map),
    /// Print where two disks differ, or what changed since a snapshot. Exits 1 if anything does.
    Diff(examine::Diff),
    /// Measure reads, writes and trims of a VHDX beside a raw file.
    Bench(bench::Bench),
}

/// Why a tool failed.
#[derive(Debug, thiserror::Error)]
pub enum ToolError {
    /// A disk cannot be opened.
    #[error(transparent)]
    Open(#[from] storage::OpenError),
    /// A disk cannot be made.
    #[error(transparent)]
    Create(#[from] storage::vhdx::CreateError),
    /// A conversion failed.
    #[error(transparent)]
    Convert(storage::convert::ConvertError),
    /// Something of a disk.
    #[error("{}: {}", path.display(), with_cause(error))]
    Disk {
        /// The disk.
        path: PathBuf,
        /// Its error.
        error: storage::DiskError,
    },
    /// Something of a chain.
    #[error("{}: {error}", path.display())]
    Chain {
        /// The disk.
        path: PathBuf,
        /// Its error.
        error: storage::vhdx::ChainError,
    },
    /// What was asked for cannot be done.
    #[error("{0}")]
    Refused(String),
    /// The host refused.
    #[error("cannot {operation}: {error}")]
    Io {
        /// What was tried.
        operation: String,
        /// The error of the host.
        error: std::io::Error,
    },
    /// The outcome could not be written as JSON.
    #[error("cannot write JSON: {0}")]
    Json(#[from] serde_json::Error),
    /// A signal, by its number.
    #[error("interrupted by signal {0}")]
    Cancelled(u8),
}

fn with_cause(error: &storage::DiskError) -> String {
    match std::error::Error::source(error) {
        Some(cause) => format!("{error}: {cause}"),
        None => error.to_string(),
    }
}

impl ToolError {
    fn io(operation: impl Into<String>) -> impl FnOnce(std::io::Error) -> Self {
        let operation = operation.into();
        move |error| Self::Io { operation, error }
    }

    /// An error of the disk at `path`; a cancellation is told by what the watch saw.
    fn disk(path: &std::path::Path, watch: &Watch) -> impl FnOnce(storage::DiskError) -> Self {
        let (path, signal) = (path.to_owned(), watch.signal());
        move |error| match error {
            storage::DiskError::Cancelled => Self::Cancelled(signal),
            error => Self::Disk { path, error },
        }
    }

    fn chain(
        path: &std::path::Path,
        watch: &Watch,
    ) -> impl FnOnce(storage::vhdx::ChainError) -> Self {
        use storage::vhdx::ChainError;
        let (path, signal) = (path.to_owned(), watch.signal());
        move |error| match error {
            ChainError::Disk(storage::DiskError::Cancelled) => Self::Cancelled(signal),
            ChainError::Disk(error) => Self::Disk { path, error },
            // They name their files themselves.
            ChainError::Create(error) => error.into(),
            ChainError::Open(error) => error.into(),
            error @ ChainError::Refused(_) => Self::Chain { path, error },
        }
    }
}

/// What an operation found or did.
struct Outcome {
    json: Value,
    text: String,
    /// The exit code.
    code: u8,
}

impl Outcome {
    fn new(json: Value, text: impl Into<String>) -> Self {
        Self {
            json,
            text: text.into(),
            code: 0,
        }
    }
}

/// Does what a command says, and writes the outcome; gives the exit code.
///
/// # Errors
/// See [`ToolError`]. Files are then as they were, or as the operation's own documentation says.
pub fn run(command: &DiskCommand) -> Result<u8, ToolError> {
    let output = match command {
        DiskCommand::Create(command) => command.output,
        DiskCommand::Info(command) => command.output,
        DiskCommand::Check(command) => command.output,
        DiskCommand::Repair(command) => command.output,
        DiskCommand::Convert(command) => command.output,
        DiskCommand::Resize(command) => command.output,
        DiskCommand::Compact(command) => command.output,
        DiskCommand::Commit(command) => command.output,
        DiskCommand::Rebase(command) => command.output,
        DiskCommand::Snapshot(command) => command.output,
        DiskCommand::Map(command) => command.output,
        DiskCommand::Diff(command) => command.output,
        DiskCommand::Bench(command) => command.output,
    };
    // First of all: signals are blocked in the threads that are started later.
    let watch = Watch::new(!output.json).map_err(ToolError::io("watch for signals"))?;
    let outcome = match command {
        DiskCommand::Create(command) => command.run(&watch),
        DiskCommand::Info(command) => command.run(),
        DiskCommand::Check(command) => command.run(&watch),
        DiskCommand::Repair(command) => command.run(&watch),
        DiskCommand::Convert(command) => command.run(&watch),
        DiskCommand::Resize(command) => command.run(&watch),
        DiskCommand::Compact(command) => command.run(&watch),
        DiskCommand::Commit(command) => command.run(&watch),
        DiskCommand::Rebase(command) => command.run(&watch),
        DiskCommand::Snapshot(command) => command.run(),
        DiskCommand::Map(command) => command.run(&watch),
        DiskCommand::Diff(command) => command.run(&watch),
        DiskCommand::Bench(command) => command.run(&watch),
    };
    watch.finish();
    let outcome = outcome?;
    let text = if output.json {
        serde_json::to_string_pretty(&outcome.json)?
    } else {
        outcome.text
    };
    let mut stdout = std::io::stdout().lock();
    match std::io::Write::write_all(&mut stdout, format!("{}\n", text.trim_end()).as_bytes()) {
        Ok(()) => Ok(outcome.code),
        // Whoever read it has seen enough.
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(outcome.code),
        Err(error) => Err(ToolError::io("write the outcome")(error)),
    }
}

/// A size for people, with the exact number where that is another.
fn human(bytes: u64) -> String {
    for (unit, shift) in [("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)] {
        if bytes >= 1 << shift {
            let whole = bytes >> shift;
            if bytes.is_multiple_of(1 << shift) {
                return format!("{whole} {unit}");
            }
            #[allow(
                clippy::cast_precision_loss,
                reason = "one digit behind the point is shown"
            )]
            let part = bytes as f64 / (1_u64 << shift) as f64;
            return format!("{part:.1} {unit}");
        }
    }
    format!("{bytes} B")
}

/// Lines of names and values.
fn lines<'a>(pairs: impl IntoIterator<Item = (&'a str, String)>) -> String {
    let mut text = String::new();
    for (name, value) in pairs {
        // Writing to a string does not fail.
        let _ = writeln!(text, "{name:<20} {value}");
    }
    text
}

/// The block size of the command line as the format takes it.
fn block_size(size: Bytes) -> Result<u32, ToolError> {
    u32::try_from(size.0).map_err(|_| {
        ToolError::Refused(format!(
            "block size {}: expected a power of two from 1M to 256M",
            human(size.0)
        ))
    })
}

#[cfg(test)]
mod tests {
    use super::human;

    #[test]
    fn sizes_are_shown_in_the_largest_unit_they_fill() {
        for (bytes, text) in [
            (0, "0 B"),
            (512, "512 B"),
            (4096, "4 KiB"),
            (10 << 30, "10 GiB"),
            ((10 << 30) + (512 << 20), "10.5 GiB"),
            (64 << 40, "64 TiB"),
        ] {
            assert_eq!(human(bytes), text);
        }
    }
}
