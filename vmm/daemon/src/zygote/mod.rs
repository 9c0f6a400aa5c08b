//! Processes that are copies of one that has begun already: the *zygote*, as Android and Chromium call it.
//!
//! ```text
//! coppice serve ── SOCK_SEQPACKET: arguments; stdin, stderr, folder ──> coppice zygote ── clone(CLONE_PARENT) ──> coppice run ...
//!       └──────────────────────────── its parent, as if it had started it itself ───────────────────────────────────┘
//! ```
//!
//! A program that can be loaded at any address has some 200 KiB of pointers that are put right when it is, in memory of its own: each guest's process had its
//! own copy, and put it right by itself. Copies of the zygote share what it has put right, copied when it is written to, and begin sooner. For that they are
//! all loaded at the address that the zygote was; heap, stack and mappings are where the zygote's are, too. Who wants layouts that differ has each process
//! executed (`coppice serve --own-layout`).
//!
//! The zygote has one thread, no descriptor but the socket and the log, and ends with the daemon.

mod client;
mod fork;
mod server;
mod title;

use serde::{Deserialize, Serialize};

pub use client::{Birth, MANAGER, Zygote};
pub use server::{Newborn, serve};

/// Longest request in bytes: it is one packet.
const LONGEST: usize = 64 << 10;
/// Descriptors of a request: standard input, standard error, the folder.
const DESCRIPTORS: usize = 3;
/// What the zygote is started with: its own name, and room for the command lines of its copies in the place of which they see theirs.
const ROOM: usize = 4 << 10;

/// What the zygote is asked for.
#[derive(Debug, Serialize, Deserialize)]
struct Request {
    /// The command line, from the name of the program on.
    args: Vec<String>,
    /// Whether the process is to be the first of a namespace of processes, where that can be had.
    own_processes: bool,
}

/// What it answers.
#[derive(Debug, Serialize, Deserialize)]
enum Answer {
    /// The process, by the number that the zygote and its parent know it by.
    Born(i32),
    /// There is no process.
    Failed {
        /// The host's error number, where it has said so.
        number: Option<i32>,
        /// Why.
        why: String,
    },
}
