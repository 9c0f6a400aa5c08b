//! The protocol between the daemon and its zygote: JSON in packets. Both are always the same program, so it may change
//! from one version to the next.

use serde::{Deserialize, Serialize};

/// Longest request in bytes: it is one packet.
pub(super) const LONGEST: usize = 64 << 10;
/// Descriptors of a request: standard input, standard error, the folder.
pub(super) const DESCRIPTORS: usize = 3;
/// Bytes of an argument that the zygote is started with and does not use: its copies write their own command lines
/// there.
pub(super) const ROOM: usize = 4 << 10;

/// A request to the zygote: to spawn a process.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Request {
    /// The command line, from the name of the program on.
    pub(super) args: Vec<String>,
    /// Whether the process is to be the first of a PID namespace, where the host allows that.
    pub(super) own_processes: bool,
}

/// The reply of the zygote.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Reply {
    /// The number of the process, in the PID namespace of the zygote and its parent.
    Spawned(i32),
    /// There is no process.
    Failed {
        /// The host's error number, where it is the host's error.
        number: Option<i32>,
        /// The error as text.
        why: String,
    },
}
