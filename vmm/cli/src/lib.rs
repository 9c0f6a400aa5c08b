//! The command line of `coppice`: its arguments, and the options that they stand for.
//!
//! The arguments of commands with [`ToolArguments`] are parsed by another program.

mod balloon;
mod disk;
mod firecracker;
mod jail;
mod net;
mod pmem;
mod rate;
mod restore;
mod run;
mod run_options;
mod serve;
mod serve_jail;
mod serve_network;
mod usage_error;
mod values;
mod vm;
mod vsock;

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use config::Mebibytes;
use control::console;
use host::exit;
use values::{domain, utf8_path, with_sources};

pub use balloon::{BalloonArgument, BalloonArgumentError};
pub use disk::{DiskArgument, DiskError};
pub use firecracker::{BAD_ARGUMENTS, FirecrackerArguments, FirecrackerError, FirecrackerRequest};
pub use jail::{JailArgument, JailArgumentError};
pub use net::{NetArgument, NetError};
pub use pmem::{PmemArgument, PmemError};
pub use restore::{RestoreArgument, RestoreError};
pub use run::RunArguments;
pub use run_options::RunOptions;
pub use serve::{SOCKET_VARIABLE, ServeArguments, ServeOptionsError, default_socket};
pub use serve_jail::{ServeJailArgument, ServeJailError};
pub use serve_network::{ServeNetworkArgument, ServeNetworkError};
pub use usage_error::UsageError;
pub use vm::{Connection, CreateArguments, VmArguments, VmCommand};
pub use vsock::{VsockArgument, VsockArgumentError};

/// A virtual machine monitor for many small guests.
#[derive(Debug, Parser)]
#[command(
    name = "coppice",
    version,
    propagate_version = true,
    arg_required_else_help = false
)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The end of the help of a tool, whose complete help another program prints.
const MORE: &str = "More: coppice COMMAND --help";

/// The commands of `coppice`.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run one guest, with its serial console on this terminal.
    #[command(after_help = examples(), after_long_help = long_help())]
    Run(Box<RunArguments>),
    /// Serve many guests by one socket: the host daemon.
    #[command(after_help = daemon::serve::ADMISSION)]
    Serve(Box<ServeArguments>),
    /// Make and use guests of the host daemon (coppice serve).
    Vm(Box<VmArguments>),
    /// The process that `coppice serve` starts for its guests' processes to be copies of. Requests arrive on standard
    /// input.
    #[command(hide = true)]
    Zygote {
        /// Room for their command lines.
        #[arg(long)]
        room: String,
    },
    /// The process that `coppice serve` has read which parent a disk names, as the disk is a guest's. The disk is
    /// standard input, and the answer is JSON.
    #[command(hide = true)]
    DiskParent {
        /// The folder that the disk lies in.
        #[arg(long)]
        folder: PathBuf,
        /// The user and group that the process becomes.
        #[arg(long)]
        uid: Option<u32>,
        /// The path that the disk is to name from now on.
        #[arg(long)]
        place: Option<PathBuf>,
    },
    /// Attach this terminal to the serial console of a guest of the host daemon.
    Console {
        /// The guest.
        id: String,
        /// The daemon.
        #[command(flatten)]
        connection: Connection,
    },
    /// Make what guests share: reference images of kernels.
    #[command(subcommand)]
    Image(ImageCommand),
    /// Make, examine and change virtual disks.
    #[command(disable_help_flag = true, disable_version_flag = true, after_help = MORE)]
    Disk(ToolArguments),
    /// Measure what guests cost on this host.
    #[command(disable_help_flag = true, disable_version_flag = true, after_help = MORE)]
    Bench(ToolArguments),
    /// Show all of this user's guests, with what each of them takes of the host.
    #[command(disable_help_flag = true, disable_version_flag = true, after_help = MORE)]
    Top(ToolArguments),
    /// Say whether this host can run guests, and what to do where it cannot.
    #[command(disable_help_flag = true, disable_version_flag = true, after_help = MORE)]
    Doctor(ToolArguments),
    /// Print the completions of a shell.
    #[command(disable_help_flag = true, disable_version_flag = true, after_help = MORE)]
    Completions(ToolArguments),
    /// Write the man pages into a folder.
    #[command(hide = true, disable_help_flag = true, disable_version_flag = true)]
    Man(ToolArguments),
}

/// The arguments of a tool. `coppice-tools` parses them, so that no code of a tool is part of a guest's process.
#[derive(Debug, Args)]
pub struct ToolArguments {
    /// The words after the name of the tool.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, hide = true)]
    pub words: Vec<OsString>,
}

/// The commands of `coppice image`.
#[derive(Debug, Subcommand)]
pub enum ImageCommand {
    /// Boot a kernel once in a guest that is thrown away, and keep what became of its memory, for guests to share
    /// (--share all).
    ///
    /// The image lies beside the unpacked kernel in the cache. A guest that finds none has it made in the background:
    /// this makes it before the first guest.
    Warm(Box<WarmArguments>),
    /// As `warm`, with the request on standard input. `coppice run` starts this process before it gives up the right to
    /// start any.
    #[command(hide = true)]
    WarmWhenTold,
    /// Boots the guest of an image, in its jail, and tells its memory on standard output. `warm` starts this process.
    #[command(hide = true)]
    WarmingGuest,
}

/// The arguments of `coppice image warm`.
#[derive(Debug, Args)]
pub struct WarmArguments {
    /// The kernel, as guests are given it.
    #[arg(long, value_name = "FILE", value_parser = utf8_path)]
    pub kernel: PathBuf,
    /// The command line of the guests: of its words, only those matter that change a kernel's text, such as
    /// mitigations=.
    #[arg(
        long,
        value_name = "TEXT",
        default_value = "",
        allow_hyphen_values = true
    )]
    pub cmdline: String,
    /// vCPUs of the guests: a kernel for one CPU differs from one for several.
    #[arg(long, value_name = "NUMBER", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=32))]
    pub cpus: u8,
    /// RAM of the guests, with a binary suffix: up to 1G, each size has an image of its own.
    #[arg(long, value_name = "SIZE", default_value = "128M")]
    pub mem: Mebibytes,
    /// The sharing domain of the guests, if they have one.
    #[arg(long, value_name = "NAME", value_parser = domain)]
    pub share_domain: Option<String>,
    /// The jail of the guest, with the options of `coppice run --jail`. It is in one in any case.
    #[arg(
        long,
        value_name = "OPTION[,OPTION...]",
        num_args = 0..=1,
        default_missing_value = "",
        value_parser = with_sources::<JailArgument>
    )]
    pub jail: Option<JailArgument>,
}

fn examples() -> String {
    "Examples:
  coppice run --kernel vmlinuz --initrd initrd.img --disk root.vhdx,root --mem 256M
  coppice run --kernel vmlinux --disk base.vhdx,ro --disk data.vhdx,serial=data
  coppice run --api-sock /run/guest.sock"
        .to_owned()
}

fn long_help() -> String {
    let keys = console::HELP.replace('\n', "\n  ");
    format!("Keys:\n  {keys}\n\n{}\n\n{}", exit::HELP, examples())
}

#[cfg(test)]
mod tests;
