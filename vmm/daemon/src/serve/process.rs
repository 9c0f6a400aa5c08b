//! The process of a guest: started behind a gate, identified for certain, and watched.
//!
//! ```text
//! spawn ──> gated: waits on its standard input ── pid.json is written ── its LaunchSpec ──> runs
//!              └── the daemon dies: standard input ends, and so does the process
//! ```
//!
//! So no process of a guest runs that `pid.json` does not name. The process leads a session of its own, and outlives
//! the daemon; the next daemon finds it by its number (as the host sees it, outside of its namespaces), its start and
//! the host's boot, and refers to it by a pidfd, which never comes to mean another process.

use std::fs::File;
use std::io::{self, IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use parking_lot::Mutex;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, pidfd_open, pidfd_send_signal, waitid,
};
use rustix::time::{ClockId, clock_gettime};
use tokio::io::unix::AsyncFd;

use super::guest_log;
use super::record::PidFile;
use super::store;
use crate::zygote::{MANAGER, SpawnOptions, Zygote};
use control::launch_spec::{LaunchSpec, MOST_TAPS};
use host::procfs;
use host::report::chain;

/// How a process is started.
#[derive(Clone, Copy, Debug)]
pub struct Launch<'a> {
    /// The guest.
    pub id: &'a str,
    /// Its folder, which the process works in.
    pub folder: &'a Path,
    /// The launch specification that it gets when it is released.
    pub spec: &'a LaunchSpec,
}

/// How a process ended, as far as the daemon can see.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// By itself.
    Code(u8),
    /// Killed.
    Signal(i32),
    /// It was not a child of this daemon, so that its exit status went to another process.
    Unseen,
}

/// A process of a guest, as it was started or found.
#[derive(Debug)]
pub struct Handle {
    pid: u32,
    fd: OwnedFd,
    /// The pipe that has its log; absent where that cannot be opened again.
    log: Option<File>,
}

/// A process of a guest.
#[derive(Debug)]
pub struct Process {
    /// Its number.
    pub pid: u32,
    fd: AsyncFd<OwnedFd>,
    log: Mutex<Option<File>>,
}

/// A process that waits at its gate, and has done nothing yet.
pub struct GatedProcess {
    pid: u32,
    fd: OwnedFd,
    gate: UnixStream,
    /// The launch specification that it gets through its gate.
    line: Vec<u8>,
    start_us: u64,
    /// The pipe that has its log.
    log: File,
}

fn opened(pid: u32) -> io::Result<OwnedFd> {
    let number = i32::try_from(pid).ok().and_then(Pid::from_raw);
    let number = number.ok_or(io::ErrorKind::InvalidInput)?;
    Ok(pidfd_open(number, PidfdFlags::empty())?)
}

fn start_us(pid: u32) -> io::Result<u64> {
    let start = procfs::start_of(pid).map_err(io::Error::other)?;
    u64::try_from(start.as_micros()).map_err(io::Error::other)
}

/// For how long a process has run.
pub fn age(pid: u32) -> Duration {
    let now = clock_gettime(ClockId::Boottime);
    let now = Duration::new(now.tv_sec.unsigned_abs(), now.tv_nsec.unsigned_abs() as u32);
    procfs::start_of(pid).map_or(Duration::ZERO, |start| now.saturating_sub(start))
}

/// Undoes for a guest that the kernel is to spare the daemon when memory runs out, which children inherit: guests are
/// to be killed before the host's own services.
fn forgo_oom_score(pid: u32) -> io::Result<()> {
    let path = |process: &str| format!("/proc/{process}/oom_score_adj");
    let own = std::fs::read_to_string(path("self"))?;
    if own.starts_with('-') {
        std::fs::write(path(&pid.to_string()), "0")?;
    }
    Ok(())
}

/// Starts the process of a guest. Its command line is made nowhere else.
///
/// # Errors
/// The host's error; there is no process then.
pub fn spawn(launch: &Launch<'_>, zygote: Option<&Zygote>) -> io::Result<GatedProcess> {
    store::remove_unfinished(&launch.folder.join("end.json"));
    for left in ["end.json", "pid.json"] {
        match std::fs::remove_file(launch.folder.join(left)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            Ok(()) | Err(_) => {}
        }
    }
    let log = guest_log::make(launch.folder)?;
    let line = launch.spec.to_line().map_err(io::Error::other)?;
    let (stdin, gate) = UnixStream::pair()?;
    let folder = File::open(launch.folder).map_err(store::named(launch.folder))?;
    let options = SpawnOptions {
        args: arguments(launch.id),
        stdin: stdin.as_fd(),
        stderr: log.process.as_fd(),
        folder: folder.as_fd(),
        own_processes: launch.spec.jail.is_some(),
    };
    let pid = match zygote {
        Some(zygote) => zygote.spawn(&options)?,
        None => execute(launch, &options)?,
    };
    // No other process gets the number of a child before the child has been waited for.
    let known = forgo_oom_score(pid).and_then(|()| Ok((start_us(pid)?, opened(pid)?)));
    match known {
        Ok((start_us, fd)) => Ok(GatedProcess {
            pid,
            fd,
            gate,
            line,
            start_us,
            log: log.daemon,
        }),
        Err(error) => {
            drop(gate);
            // The process ends by itself, as its standard input has ended.
            if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
                let _ = waitid(WaitId::Pid(pid), WaitIdOptions::EXITED);
            }
            Err(error)
        }
    }
}

/// What is the same for all guests, and the name of this one. All else is in its `LaunchSpec`.
fn arguments(id: &str) -> Vec<String> {
    let mut args = vec!["coppice", "run", "--held", "--id", id];
    args.extend(["--api-sock", "api.sock", "--console-sock", "console.sock"]);
    args.extend(["--end-file", "end.json"]);
    args.into_iter().map(str::to_owned).collect()
}

/// Starts a process by executing the program, where there is no zygote; gives its number.
fn execute(launch: &Launch<'_>, options: &SpawnOptions<'_>) -> io::Result<u32> {
    // The program of this daemon, even where its file has been replaced by another version.
    let mut command = Command::new("/proc/self/exe");
    command
        .arg0("coppice")
        .args(options.args.iter().skip(1))
        .current_dir(launch.folder)
        .env_remove(MANAGER)
        .stdin(Stdio::from(options.stdin.try_clone_to_owned()?))
        .stdout(Stdio::null())
        .stderr(Stdio::from(options.stderr.try_clone_to_owned()?));
    let child = if options.own_processes {
        jail::spawn(command)?.child
    } else {
        command.spawn()?
    };
    Ok(child.id())
}

/// Sends a line through a gate, and descriptors with its first byte.
fn tell(gate: &mut UnixStream, line: &[u8], taps: &[OwnedFd]) -> io::Result<()> {
    let taps: Vec<_> = taps.iter().map(AsFd::as_fd).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_TAPS))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !taps.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(&taps)) {
        return Err(io::Error::other("a guest has too many taps"));
    }
    let parts = [IoSlice::new(line)];
    let sent =
        rustix::io::retry_on_intr(|| sendmsg(&*gate, &parts, &mut ancillary, SendFlags::NOSIGNAL))?;
    gate.write_all(line.get(sent..).unwrap_or_default())
}

impl GatedProcess {
    /// Writes `pid.json`, and tells the process how to begin, with the taps that its specification names. Where that
    /// cannot be written, the process is ended.
    ///
    /// # Errors
    /// The host's error.
    pub fn release(mut self, folder: &Path, taps: &[OwnedFd]) -> io::Result<Handle> {
        let file = PidFile {
            pid: self.pid,
            start_us: self.start_us,
            boot_id: store::boot_id()?,
        };
        // The process reads the line in any case, so this does not wait for long where the socket takes less at once.
        let written = store::write(&folder.join("pid.json"), &file, false);
        if let Err(error) = written.and_then(|()| tell(&mut self.gate, &self.line, taps)) {
            drop(self.gate);
            let _ = pidfd_send_signal(&self.fd, Signal::KILL);
            let _ = waitid(WaitId::PidFd(self.fd.as_fd()), WaitIdOptions::EXITED);
            return Err(error);
        }
        Ok(Handle {
            pid: self.pid,
            fd: self.fd,
            log: Some(self.log),
        })
    }
}

/// Whether a process has ended. One that has can still be opened as long as its parent has not waited for it.
fn has_ended(process: &OwnedFd) -> io::Result<bool> {
    let mut polled = [PollFd::new(process, PollFlags::IN)];
    let at_once = Timespec::default();
    Ok(rustix::io::retry_on_intr(|| poll(&mut polled, Some(&at_once)))? > 0)
}

/// The process that `pid.json` in a guest's folder names, if it still runs.
///
/// # Errors
/// The host's error.
pub fn find(folder: &Path) -> io::Result<Option<Handle>> {
    let Some(file) = store::read::<PidFile>(&folder.join("pid.json"))? else {
        return Ok(None);
    };
    if file.boot_id != store::boot_id()? {
        return Ok(None);
    }
    // Opened before its start is read: either that is the start of the process that was opened, or that process has
    // ended.
    let Ok(fd) = opened(file.pid) else {
        return Ok(None);
    };
    match start_us(file.pid) {
        Ok(start) if start == file.start_us && !has_ended(&fd)? => {
            Ok(Some(Handle::found(file.pid, fd, folder)))
        }
        Ok(_) | Err(_) => Ok(None),
    }
}

/// The process of a guest whose `pid.json` cannot be read, if it has one: the command line is that of a guest of this
/// name, and it works in the guest's folder.
///
/// # Errors
/// The host's error.
pub fn search(folder: &Path, id: &str) -> io::Result<Option<Handle>> {
    let mut line: Vec<u8> = Vec::new();
    for word in arguments(id) {
        line.extend(word.as_bytes());
        line.push(0);
    }
    let own = std::fs::symlink_metadata(folder)?;
    let is_wanted = |pid: u32| -> io::Result<bool> {
        let mut found = Vec::new();
        let of = |name| format!("/proc/{pid}/{name}");
        File::open(of("cmdline"))?
            .take(line.len() as u64)
            .read_to_end(&mut found)?;
        let cwd = std::fs::metadata(of("cwd"))?;
        Ok(found == line && (cwd.dev(), cwd.ino()) == (own.dev(), own.ino()))
    };
    for entry in std::fs::read_dir("/proc")? {
        let name = entry?.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        // Opened before it is looked at, as in `find`. Processes end at any time: one that cannot be looked at is none.
        if let Ok(fd) = opened(pid)
            && is_wanted(pid).unwrap_or(false)
            && !has_ended(&fd)?
        {
            return Ok(Some(Handle::found(pid, fd, folder)));
        }
    }
    Ok(None)
}

impl Handle {
    /// A process that an earlier daemon has started. It runs on where its log cannot be read.
    fn found(pid: u32, fd: OwnedFd, folder: &Path) -> Self {
        let log = guest_log::open(folder).unwrap_or_else(|error| {
            tracing::warn!(pid, error = %chain(&error), "the log of a process cannot be read");
            None
        });
        Self { pid, fd, log }
    }
}

impl Process {
    /// Watches a process; to be called in the runtime.
    ///
    /// # Errors
    /// The host's error.
    pub fn new(Handle { pid, fd, log }: Handle) -> io::Result<Self> {
        // SAFETY: an `OwnedFd` is open, and the same, as long as it lives; it is never taken out again.
        let fd = unsafe { AsyncFd::register_with_interest(fd, tokio::io::Interest::READABLE)? };
        let log = Mutex::new(log);
        Ok(Self { pid, fd, log })
    }

    /// Waits until it ends, with all of its log in the log of its folder, and reaps it where it is a child.
    pub async fn watched(&self, folder: &Path) -> Exit {
        let log = self.log.lock().take();
        match log {
            Some(log) => guest_log::drain(log, folder, self.ended()).await,
            None => self.ended().await,
        }
    }

    /// Waits until it ends, and reaps it where it is a child.
    pub async fn ended(&self) -> Exit {
        if let Err(error) = self.fd.readable().await {
            tracing::error!(pid = self.pid, error = %chain(&error), "a process cannot be watched");
        }
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
        match waitid(WaitId::PidFd(self.fd.get_ref().as_fd()), options) {
            Ok(Some(status)) => match (status.exit_status(), status.terminating_signal()) {
                (Some(code), _) => Exit::Code(u8::try_from(code).unwrap_or(u8::MAX)),
                (None, Some(signal)) => Exit::Signal(signal),
                (None, None) => Exit::Unseen,
            },
            Ok(None) | Err(_) => Exit::Unseen,
        }
    }

    /// Sends a signal, unless it has ended.
    pub fn signal(&self, signal: Signal) {
        if let Err(error) = pidfd_send_signal(self.fd.get_ref(), signal)
            && error != Errno::SRCH
        {
            tracing::error!(pid = self.pid, error = %chain(&error), "a process cannot be signalled");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_that_has_ended_is_not_found_though_nobody_has_looked_at_its_end() {
        let folder = tempfile::tempdir().unwrap();
        let mut child = Command::new("cat").stdin(Stdio::piped()).spawn().unwrap();
        let file = PidFile {
            pid: child.id(),
            start_us: start_us(child.id()).unwrap(),
            boot_id: store::boot_id().unwrap(),
        };
        store::write(&folder.path().join("pid.json"), &file, false).unwrap();
        let found = find(folder.path()).unwrap().unwrap();
        assert_eq!(found.pid, child.id());
        drop(child.stdin.take());
        poll(&mut [PollFd::new(&found.fd, PollFlags::IN)], None).unwrap();
        assert!(find(folder.path()).unwrap().is_none());
        assert!(child.wait().unwrap().success());
    }
}
