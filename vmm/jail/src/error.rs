//! Why a process is not jailed as requested.

use std::io;
use std::path::PathBuf;

use super::report::Layer;
use host::report::chain;

/// Why a process is not jailed as requested. The process is in an undefined state then, and has to end.
#[derive(Debug, thiserror::Error)]
pub enum JailError {
    /// A layer that was requested cannot be entered.
    #[error("--jail: {layer}: {why}")]
    Missing {
        /// The layer.
        layer: Layer,
        /// Why it cannot be entered.
        why: String,
    },
    /// The filters of system calls.
    #[error("--seccomp")]
    Seccomp(#[source] io::Error),
    /// A file of the guest is closed to the user that the process has become.
    #[error(
        "--jail: user {uid} may not {access} {}, which is user {owner}'s, with mode {mode:o}: the guest's files have to be open to the user of its jail (chown or chmod; or no jail: for guests of a daemon, coppice serve --jail off)",
        path.display()
    )]
    Closed {
        /// The file.
        path: PathBuf,
        /// The user of the process.
        uid: u32,
        /// The access that it needs.
        access: &'static str,
        /// The user that the file belongs to.
        owner: u32,
        /// The mode of the file.
        mode: u32,
    },
    /// What the guest needs cannot be found or made.
    #[error("--jail: {}", path.display())]
    Path {
        /// The path.
        path: PathBuf,
        /// The host's error.
        source: io::Error,
    },
}

/// The error for a layer that was requested by name.
pub(super) fn required(layer: Layer) -> impl FnOnce(io::Error) -> JailError {
    move |error| JailError::Missing {
        layer,
        why: chain(&error).to_string(),
    }
}
