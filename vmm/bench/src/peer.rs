//! The peer that Coppice is compared with: QEMU with its smallest machine, microvm.

use std::path::Path;
use std::process::Command;
use std::str::FromStr;

use super::inputs::Inputs;

/// The path of the program in Debian.
const PROGRAM: &str = "/usr/bin/qemu-system-x86_64-microvm";

/// How the peer is started: a program, and words before the arguments for a guest. On a host without the peer's
/// libraries, the program can be their loader.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    program: String,
    words: Vec<String>,
}

impl Default for Peer {
    fn default() -> Self {
        Self {
            program: PROGRAM.to_owned(),
            words: Vec::new(),
        }
    }
}

/// The text names no program.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("names no program")]
pub struct NoProgram;

impl FromStr for Peer {
    type Err = NoProgram;

    fn from_str(text: &str) -> Result<Self, NoProgram> {
        let mut words = text.split_whitespace().map(str::to_owned);
        Ok(Self {
            program: words.next().ok_or(NoProgram)?,
            words: words.collect(),
        })
    }
}

impl Peer {
    /// Whether this host has the program.
    pub(super) fn is_there(&self) -> bool {
        Path::new(&self.program).exists()
    }

    /// The command for a guest, without disk, kernel and command line.
    pub(super) fn command(&self, inputs: &Inputs, mebibytes: u32, merge: bool) -> Command {
        let merge = if merge { "on" } else { "off" };
        let mut command = Command::new(&self.program);
        command.args(&self.words);
        command
            .arg("-M")
            .arg(format!("microvm,accel=kvm,acpi=on,mem-merge={merge}"));
        command.args([
            "-cpu",
            "host",
            "-smp",
            "1",
            "-nodefaults",
            "-no-user-config",
            "-nographic",
        ]);
        command.args(["-name", "peer,debug-threads=on", "-serial", "stdio"]);
        command.arg("-m").arg(mebibytes.to_string());
        command.args(["-device", "virtio-blk-device,drive=base"]);
        command.arg("-initrd").arg(&inputs.initrd);
        command
    }
}
