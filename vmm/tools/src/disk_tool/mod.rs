//! `coppice disk`: virtual disks from the command line.
//!
//! Each module has one kind of operation. Each operation returns an `Outcome`, which is printed as text or, with
//! `--json`, as JSON; errors are one line on standard error either way. `Watch` shows the progress of long operations
//! on a terminal, and cancels them at a signal.

mod bench;
mod chain;
mod convert;
mod ending;
mod error;
mod examine;
mod format;
mod lost;
mod make;
mod outcome;
mod repair;
mod size;
mod watch;

use clap::Subcommand;

pub use error::ToolError;
pub use outcome::Output;
pub use size::Sector;

use watch::Watch;

/// Examples, which follow the help.
pub const EXAMPLES: &str = "Examples:
  coppice disk create --size 10G base.vhdx
  coppice disk convert debian.qcow2 base.vhdx
  coppice disk create --parent base.vhdx guest.vhdx
  coppice disk info --json guest.vhdx
  coppice disk commit guest.vhdx
Sizes are binary: 512, 4K, 32M, 1.5G, 10GiB. With --json the answer is JSON on standard output.
Exit codes: 0 done, 1 failed or (check, diff) something was found, 2 wrong usage, 3 (repair, convert --salvage) done, and a part of
the disk is lost, 130 interrupted.";

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

/// Executes a command, prints the outcome, and returns the exit code.
///
/// # Errors
/// See [`ToolError`]. Files are then unchanged, or as the documentation of the operation says.
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
    // This comes first, because threads inherit the mask of blocked signals.
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
        // The reader of the output has closed the pipe, which is no error.
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(outcome.code),
        Err(error) => Err(ToolError::io("write the outcome")(error)),
    }
}
