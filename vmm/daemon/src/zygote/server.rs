//! The zygote's side: the process that is copied.

use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendFlags, recvmsg, send};
use rustix::stdio::{dup2_stderr, dup2_stdin, dup2_stdout};

use super::canary;
use super::fork::fork;
use super::title;
use super::wire::{DESCRIPTORS, LONGEST, Reply, Request};
use host::heap;
use host::report::chain;

/// A spawned process, with its descriptors and its folder in place.
#[derive(Debug)]
pub struct Spawned {
    /// Its command line, from the name of the program on.
    pub args: Vec<String>,
}

/// Serves requests from standard input, and returns `None` when that is closed. In each copy it returns `Some`, and the
/// copy is to do what its command line says.
///
/// # Errors
/// The host's error.
pub fn serve() -> io::Result<Option<Spawned>> {
    // In a session of its own, so that the terminal's signals go to the daemon alone.
    let _ = rustix::process::setsid();
    heap::give_back();
    loop {
        let socket = io::stdin();
        let Some((request, descriptors)) = receive(socket.as_fd())? else {
            return Ok(None);
        };
        match copy(request.own_processes) {
            Ok(None) => {
                canary::renew()?;
                begin(&request, descriptors)?;
                return Ok(Some(Spawned { args: request.args }));
            }
            Ok(Some(pid)) => reply(socket.as_fd(), &Reply::Spawned(pid.as_raw_nonzero().get()))?,
            Err(error) => {
                let failed = Reply::Failed {
                    number: error.raw_os_error(),
                    why: chain(&error).to_string(),
                };
                reply(socket.as_fd(), &failed)?;
            }
        }
    }
}

fn copy(own_processes: bool) -> io::Result<Option<rustix::process::Pid>> {
    match fork(own_processes) {
        // Only root may make a PID namespace, and other users' guests do without.
        Err(error) if own_processes && error.kind() == io::ErrorKind::PermissionDenied => {
            fork(false)
        }
        forked => forked,
    }
}

fn reply(socket: BorrowedFd<'_>, reply: &Reply) -> io::Result<()> {
    send(socket, &serde_json::to_vec(reply)?, SendFlags::NOSIGNAL)?;
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

/// Gives the copy the descriptors, the folder and the command line that an executed program would have.
fn begin(request: &Request, descriptors: [OwnedFd; DESCRIPTORS]) -> io::Result<()> {
    let [stdin, stderr, folder] = descriptors;
    rustix::process::fchdir(folder)?;
    let null = std::fs::File::options().write(true).open("/dev/null")?;
    dup2_stdin(stdin)?;
    dup2_stdout(null)?;
    dup2_stderr(stderr)?;
    title::set(&request.args)
}
