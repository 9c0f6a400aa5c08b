//! The daemon's side.

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, PoisonError};

use rustix::net::{
    AddressFamily, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags,
    SocketType, recv, sendmsg, socketpair,
};

use super::{Answer, DESCRIPTORS, LONGEST, ROOM, Request};

/// The variable that names the daemon's service manager, which is not a guest's (`sd_notify(3)`).
pub const MANAGER: &str = "NOTIFY_SOCKET";

/// A process to be.
#[derive(Clone, Debug)]
pub struct Birth<'a> {
    /// The command line, from the name of the program on.
    pub args: Vec<String>,
    /// Its standard input and its standard error; its standard output is nowhere.
    pub stdin: BorrowedFd<'a>,
    /// See there.
    pub stderr: BorrowedFd<'a>,
    /// The folder that it works in.
    pub folder: BorrowedFd<'a>,
    /// Whether it is to be the first of a namespace of processes, where that can be had.
    pub own_processes: bool,
}

/// A zygote, started when it is first needed, and again where it has ended.
#[derive(Debug, Default)]
pub struct Zygote(Mutex<Option<Running>>);

#[derive(Debug)]
struct Running {
    process: Child,
    socket: OwnedFd,
}

impl Running {
    fn start() -> io::Result<Self> {
        let (socket, theirs) = socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )?;
        // The program that runs this, whatever has become of its file.
        let process = Command::new("/proc/self/exe")
            .arg0("coppice")
            .args(["zygote", "--room", &".".repeat(ROOM)])
            // Free chunks that each thread keeps for itself pin pages of the heap, and threads of a guest's process hardly allocate.
            .env_remove(MANAGER)
            .env("GLIBC_TUNABLES", "glibc.malloc.tcache_count=0")
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::null())
            .spawn()?;
        Ok(Self { process, socket })
    }

    fn ask(&self, birth: &Birth<'_>) -> io::Result<Answer> {
        let request = Request {
            args: birth.args.clone(),
            own_processes: birth.own_processes,
        };
        let request = serde_json::to_vec(&request)?;
        if request.len() > LONGEST {
            return Err(io::ErrorKind::ArgumentListTooLong.into());
        }
        let descriptors: [_; DESCRIPTORS] = [birth.stdin, birth.stderr, birth.folder];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !ancillary.push(SendAncillaryMessage::ScmRights(&descriptors)) {
            return Err(io::Error::other("no room for descriptors"));
        }
        sendmsg(
            &self.socket,
            &[IoSlice::new(&request)],
            &mut ancillary,
            SendFlags::NOSIGNAL,
        )?;
        let mut bytes = [0; 1024];
        let (len, _) = rustix::io::retry_on_intr(|| {
            recv(self.socket.as_fd(), &mut bytes, RecvFlags::empty())
        })?;
        match bytes.get(..len) {
            Some([]) | None => Err(io::ErrorKind::ConnectionReset.into()),
            Some(answer) => Ok(serde_json::from_slice(answer)?),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It holds nothing, and its copies go on.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Zygote {
    /// Starts a process, a child of this one; its number.
    ///
    /// # Errors
    /// What the host says; there is no process then.
    pub fn bear(&self, birth: &Birth<'_>) -> io::Result<u32> {
        let mut running = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut again = running.is_some();
        loop {
            let zygote = match &mut *running {
                Some(zygote) => zygote,
                none => none.insert(Running::start()?),
            };
            match zygote.ask(birth) {
                Ok(Answer::Born(pid)) => {
                    return u32::try_from(pid).map_err(io::Error::other);
                }
                Ok(Answer::Failed { number, why }) => {
                    let of_host = number.map(io::Error::from_raw_os_error);
                    return Err(of_host.unwrap_or_else(|| io::Error::other(why)));
                }
                Err(error) => {
                    // What may have been born waits for a word on a standard input that is closed now, and ends.
                    *running = None;
                    if !std::mem::take(&mut again) {
                        return Err(error);
                    }
                    tracing::warn!(%error, "the zygote has ended, and is started again");
                }
            }
        }
    }
}
