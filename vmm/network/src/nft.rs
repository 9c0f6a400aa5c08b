//! Changes of the rules, by nft(8): it reads the text, and the kernel takes all of it or nothing.
//!
//! With a thousand guests present, a change costs the start of the program, which is 5 ms.

use std::io::{self, Seek, Write};
use std::process::{Command, Stdio};

use rustix::fs::{MemfdFlags, memfd_create};

/// Why the rules cannot be changed.
#[derive(Debug, thiserror::Error)]
pub enum NftError {
    /// The program is not installed.
    #[error("there is no program nft: install the package nftables")]
    Missing,
    /// The program cannot be started or given its input.
    #[error("cannot run nft")]
    Run(#[source] io::Error),
    /// The program or the kernel refuses the change.
    #[error("nft refuses the rules: {}", text.trim())]
    Refused {
        /// What it printed.
        text: String,
    },
}

/// Where the program is; the environment of the daemon has no say in what root starts.
const PATH: &str = "/usr/sbin:/usr/bin:/sbin:/bin:/usr/local/sbin:/usr/local/bin";
/// How much of what nft prints is of use in a message: it repeats the lines at fault.
const MESSAGE_MAX: usize = 1000;

/// Runs commands, all or none of them. Returns what nft prints.
pub(crate) fn run(commands: &str) -> Result<String, NftError> {
    // A file, as both ends of a pipe could wait for each other.
    let input =
        memfd_create("nft", MemfdFlags::CLOEXEC).map_err(|error| NftError::Run(error.into()))?;
    let mut input = std::fs::File::from(input);
    input
        .write_all(commands.as_bytes())
        .and_then(|()| input.rewind())
        .map_err(NftError::Run)?;
    let mut nft = Command::new("nft");
    nft.args(["-f", "-"])
        .env_clear()
        .env("PATH", PATH)
        .stdin(Stdio::from(input));
    let output = nft.output().map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => NftError::Missing,
        _ => NftError::Run(error),
    })?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let text = String::from_utf8_lossy(&output.stderr)
        .chars()
        .take(MESSAGE_MAX)
        .collect();
    Err(NftError::Refused { text })
}
