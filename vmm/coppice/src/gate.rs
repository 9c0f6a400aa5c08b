//! The gate of a process that the host daemon has started (`coppice run --held`): it does nothing before the daemon has
//! written down its number, and said how it is to begin.

use std::io::{self, IoSliceMut, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

use control::launch_spec::{LaunchSpec, LaunchSpecError, MOST_TAPS};

/// Standard input, with the descriptors that came with what was read.
struct Gate {
    input: OwnedFd,
    taps: Vec<OwnedFd>,
}

impl Read for Gate {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_TAPS))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let parts = &mut [IoSliceMut::new(buffer)];
        let received = recvmsg(&self.input, parts, &mut ancillary, RecvFlags::CMSG_CLOEXEC);
        let count = match received {
            Ok(received) => received.bytes,
            // Somebody else than the daemon has started it, and passes no taps.
            Err(Errno::NOTSOCK) => return Ok(rustix::io::read(&self.input, buffer)?),
            Err(error) => return Err(error.into()),
        };
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(taps) = message {
                self.taps.extend(taps);
            }
        }
        Ok(count)
    }
}

/// Leaves the session of whoever started the process, and waits for the launch specification. Gives the taps that came
/// with it, too.
///
/// # Errors
/// [`LaunchSpecError`].
pub fn wait() -> Result<(LaunchSpec, Vec<OwnedFd>), LaunchSpecError> {
    // A process that leads its group already is in a session of its own making.
    let _ = rustix::process::setsid();
    // The kernel calls it after the file by which it was started, which is /proc/self/exe.
    let _ = rustix::thread::set_name(c"coppice");
    // Without the buffer of `io::stdin`, which would stay with the process for ever.
    let input = io::stdin().as_fd().try_clone_to_owned();
    let mut gate = Gate {
        input: input.map_err(LaunchSpecError::Read)?,
        taps: Vec::new(),
    };
    Ok((LaunchSpec::read(&mut gate)?, gate.taps))
}
