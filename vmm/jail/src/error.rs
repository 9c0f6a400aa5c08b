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
    /// What a disk names as its parent is another file than the one that it was made on.
    #[error(
        "{} names {} as its parent, which has changed since, or is another disk: the identifier in it (DataWriteGuid) is not the one that the child records; if it is the right file, and its content as it was, record that by `coppice disk rebase --force --parent`",
        disk.display(),
        parent.display()
    )]
    OtherParent {
        /// The child.
        disk: PathBuf,
        /// What it names.
        parent: PathBuf,
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

/// What was being done, or with what, when the host refused.
#[derive(Debug, thiserror::Error)]
#[error("{what}")]
struct Refused {
    what: String,
    source: io::Error,
}

/// Has an error of the host say what was being done; its kind stays.
pub(super) fn doing(what: String) -> impl FnOnce(io::Error) -> io::Error {
    move |source| io::Error::new(source.kind(), Refused { what, source })
}

/// The error for a layer that was requested by name.
pub(super) fn required(layer: Layer) -> impl FnOnce(io::Error) -> JailError {
    move |error| JailError::Missing {
        layer,
        why: chain(&error).to_string(),
    }
}

#[cfg(test)]
mod tests {
    use std::error::Error;

    use super::*;

    #[test]
    fn error_that_says_what_was_being_done_keeps_its_kind_and_its_source() {
        let host = io::Error::from_raw_os_error(libc::EACCES);
        let expected = format!("make /group: {host}");
        let error = doing("make /group".to_owned())(host);
        assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
        assert_eq!(error.to_string(), "make /group");
        let host = error.source().unwrap().downcast_ref::<io::Error>();
        assert_eq!(host.unwrap().raw_os_error(), Some(libc::EACCES));
        assert_eq!(chain(&error).to_string(), expected);
    }
}
