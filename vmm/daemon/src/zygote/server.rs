//! The process that is copied.

use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendFlags, recvmsg, send};
use rustix::stdio::{dup2_stderr, dup2_stdin, dup2_stdout};

use super::fork::fork;
use super::{Answer, DESCRIPTORS, LONGEST, Request, title};
use host::heap;

/// What a copy begins with: its descriptors and its folder are in place.
#[derive(Debug)]
pub struct Newborn {
    /// Its command line, from the name of the program on.
    pub args: Vec<String>,
}

/// Serves on standard input until that is closed: `None`. In each copy it returns, too.
///
/// # Errors
/// What the host says.
pub fn serve() -> io::Result<Option<Newborn>> {
    // Signals from a terminal are for the daemon.
    let _ = rustix::process::setsid();
    heap::give_back();
    loop {
        let socket = io::stdin();
        let Some((request, descriptors)) = receive(socket.as_fd())? else {
            return Ok(None);
        };
        match copy(request.own_processes) {
            Ok(None) => {
                begin(&request, descriptors)?;
                return Ok(Some(Newborn { args: request.args }));
            }
            Ok(Some(pid)) => answer(socket.as_fd(), &Answer::Born(pid.as_raw_nonzero().get()))?,
            Err(error) => {
                let failed = Answer::Failed {
                    number: error.raw_os_error(),
                    why: error.to_string(),
                };
                answer(socket.as_fd(), &failed)?;
            }
        }
    }
}

fn copy(own_processes: bool) -> io::Result<Option<rustix::process::Pid>> {
    match fork(own_processes) {
        // Whoever is not root may not have one.
        Err(error) if own_processes && error.kind() == io::ErrorKind::PermissionDenied => {
            fork(false)
        }
        forked => forked,
    }
}

fn answer(socket: BorrowedFd<'_>, answer: &Answer) -> io::Result<()> {
    send(socket, &serde_json::to_vec(answer)?, SendFlags::NOSIGNAL)?;
    Ok(())
}

fn receive(socket: BorrowedFd<'_>) -> io::Result<Option<(Request, [OwnedFd; DESCRIPTORS])>> {
    let mut bytes = vec![0; LONGEST];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let parts = &mut [IoSliceMut::new(&mut bytes)];
    let received = rustix::io::retry_on_intr(|| {
        recvmsg(socket, parts, &mut ancillary, RecvFlags::CMSG_CLOEXEC)
    })?;
    if received.bytes == 0 {
        return Ok(None);
    }
    let descriptors: Vec<OwnedFd> = ancillary
        .drain()
        .filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
            _ => None,
        })
        .flatten()
        .collect();
    let request = serde_json::from_slice(bytes.get(..received.bytes).unwrap_or_default())?;
    let descriptors = descriptors
        .try_into()
        .map_err(|_| io::Error::other("a request without its descriptors"))?;
    Ok(Some((request, descriptors)))
}

/// Makes the copy what a new program would be.
fn begin(request: &Request, descriptors: [OwnedFd; DESCRIPTORS]) -> io::Result<()> {
    let [stdin, stderr, folder] = descriptors;
    rustix::process::fchdir(folder)?;
    let null = std::fs::File::options().write(true).open("/dev/null")?;
    dup2_stdin(stdin)?;
    dup2_stdout(null)?;
    dup2_stderr(stderr)?;
    title::set(&request.args)
}
