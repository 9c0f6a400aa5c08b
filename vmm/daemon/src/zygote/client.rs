//! The daemon's side: starts the zygote, and has it spawn processes.

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

use parking_lot::Mutex;
use rustix::net::{
    AddressFamily, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags,
    SocketType, recv, sendmsg, socketpair,
};

use super::wire::{DESCRIPTORS, LONGEST, ROOM, Reply, Request};
use host::report::chain;

/// The environment variable that names the daemon's service manager (`sd_notify(3)`). Guests' processes do not get it.
pub const MANAGER: &str = "NOTIFY_SOCKET";

/// How a process is spawned.
#[derive(Clone, Debug)]
pub struct SpawnOptions<'a> {
    /// The command line, from the name of the program on.
    pub args: Vec<String>,
    /// Its standard input. Its standard output is `/dev/null`.
    pub stdin: BorrowedFd<'a>,
    /// Its standard error.
    pub stderr: BorrowedFd<'a>,
    /// Its working folder.
    pub folder: BorrowedFd<'a>,
    /// Whether it is to be the first of a PID namespace, where the host allows that.
    pub own_processes: bool,
}

/// A zygote, started when it is first needed, and again where it has ended.
#[derive(Debug, Default)]
pub struct Zygote(Mutex<Option<ZygoteProcess>>);

#[derive(Debug)]
struct ZygoteProcess {
    process: Child,
    socket: OwnedFd,
}

impl ZygoteProcess {
    fn start() -> io::Result<Self> {
        let (socket, theirs) = socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )?;
        // The program of this daemon, even where its file has been replaced by another version.
        let process = Command::new("/proc/self/exe")
            .arg0("coppice")
            .args(["zygote", "--room", &".".repeat(ROOM)])
            .env_remove(MANAGER)
            // Free chunks that a thread caches keep pages of the heap in use, and threads of a guest's process allocate
            // too seldom to gain by a cache.
            .env("GLIBC_TUNABLES", "glibc.malloc.tcache_count=0")
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::null())
            .spawn()?;
        Ok(Self { process, socket })
    }

    fn request(&self, options: &SpawnOptions<'_>) -> io::Result<Reply> {
        let request = Request {
            args: options.args.clone(),
            own_processes: options.own_processes,
        };
        let request = serde_json::to_vec(&request)?;
        if request.len() > LONGEST {
            return Err(io::ErrorKind::ArgumentListTooLong.into());
        }
        let descriptors: [_; DESCRIPTORS] = [options.stdin, options.stderr, options.folder];
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
            Some(reply) => Ok(serde_json::from_slice(reply)?),
        }
    }
}

impl Drop for ZygoteProcess {
    fn drop(&mut self) {
        // The zygote has no state that could be lost, and its copies run on.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Zygote {
    /// Starts a process, which is a child of this one, and gives its number.
    ///
    /// # Errors
    /// The host's error; there is no process then.
    pub fn spawn(&self, options: &SpawnOptions<'_>) -> io::Result<u32> {
        let mut running = self.0.lock();
        let mut again = running.is_some();
        loop {
            let zygote = match &mut *running {
                Some(zygote) => zygote,
                none => none.insert(ZygoteProcess::start()?),
            };
            match zygote.request(options) {
                Ok(Reply::Spawned(pid)) => {
                    return u32::try_from(pid).map_err(io::Error::other);
                }
                Ok(Reply::Failed { number, why }) => {
                    let of_host = number.map(io::Error::from_raw_os_error);
                    return Err(of_host.unwrap_or_else(|| io::Error::other(why)));
                }
                Err(error) => {
                    // Where the process was spawned all the same, it ends: it waits on its standard input, which is
                    // closed now.
                    *running = None;
                    if !std::mem::take(&mut again) {
                        return Err(error);
                    }
                    tracing::warn!(error = %chain(&error), "the zygote has ended, and is started again");
                }
            }
        }
    }
}
