//! A process that reads what a guest may have written, in place of one that has rights to lose.
//!
//! A guest's disk names its parents, and a guest's process decides what is on that disk. Which files a guest's jail is
//! to have has to be known before the jail is entered, so while the process may still open anything. So the disk is
//! parsed by a child of it, which has this one file, and can make no other system calls than to read it and to answer:
//!
//! ```text
//! process ── opens the disk, forks ──> child: no rights, one file ── reads the parent locator
//!    <── ParentLink: paths, identifiers ──┘
//! process ── opens a path, compares the identifier in the file's header ──> parent
//! ```
//!
//! Nothing that the child answers is believed but this: that a disk which names the parent's DataWriteGuid was made by
//! somebody who had the parent. It is a random number of 122 bits, so a guest can name that of no file that it was not
//! given.

use std::fs::File;
use std::hash::RandomState;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{fcntl_dupfd_cloexec, retry_on_intr};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{
    Pid, Resource, Rlimit, Signal, WaitOptions, kill_process, setrlimit, waitpid,
};
use serde::{Deserialize, Serialize};
use storage::vhdx::{self, Guid, ParentLocator};

use super::{credentials, seccomp};

/// The longest answer in bytes: that of a locator with three paths is a few kilobytes long.
const LONGEST: usize = 64 << 10;
/// Bytes of address space that a child may have, with what it inherits.
const MEMORY: u64 = 1 << 30;
/// Seconds of CPU time that a child may use.
const CPU: u64 = 10;
/// Descriptors from here on are the child's own: 0 to 2 stay free.
const LOWEST: i32 = 3;
/// For how long an answer is waited for.
const PATIENCE: Duration = Duration::from_secs(20);

/// The user that a child becomes, with the group of the same guest.
pub type User = (Option<u32>, Option<u32>);

/// What a disk names as its parent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ParentLink {
    /// The files that it can be, in the order in which they are to be tried.
    pub paths: Vec<PathBuf>,
    /// The identifiers that it may have (DataWriteGuid, [MS-VHDX] 2.2.2).
    pub identifiers: Vec<String>,
}

impl ParentLink {
    /// What a child in `folder` names.
    fn new(locator: &ParentLocator, folder: &Path) -> Self {
        let identifiers = [Some(locator.linkage), locator.linkage2];
        Self {
            paths: locator.candidates(folder),
            identifiers: identifiers.iter().flatten().map(Guid::to_string).collect(),
        }
    }

    /// Whether the disk in a file, which is read at fixed places alone, has one of the identifiers.
    pub fn is_of(&self, file: File) -> bool {
        let found = vhdx::data_write_guid(file).map(|guid| guid.to_string());
        found.is_ok_and(|guid| self.identifiers.contains(&guid))
    }
}

/// Has this process do nothing any more but read and write the files that it has open.
///
/// # Errors
/// Where the host refuses.
pub fn confine((uid, gid): User) -> io::Result<()> {
    for (resource, most) in [
        (Resource::As, MEMORY),
        (Resource::Cpu, CPU),
        (Resource::Core, 0),
    ] {
        let limit = Some(most);
        setrlimit(
            resource,
            Rlimit {
                current: limit,
                maximum: limit,
            },
        )?;
    }
    // A static program may open `/dev/urandom` for the keys of its first hash table, instead of calling getrandom(2).
    let _ = RandomState::new();
    credentials::close_ways_to_capabilities();
    credentials::become_user(uid, gid)?;
    credentials::drop_capabilities()?;
    credentials::no_new_privs()?;
    seccomp::reader()
}

/// The parent that the disk in `file` names, which lies in `folder`. `None` where it names none, or is no VHDX that can
/// be read: whoever opens the disk reports that. The disk is read by a child of this process, as `user`. To be called
/// by the only thread of the process.
///
/// # Errors
/// Where the host starts no process, or the answer is none.
pub fn parent_of(file: &File, folder: &Path, user: User) -> io::Result<Option<ParentLink>> {
    let answer = ask(file, user, |file| {
        let locator = vhdx::parent_locator(file).ok().flatten();
        let link = locator.map(|locator| ParentLink::new(&locator, folder));
        serde_json::to_vec(&link).unwrap_or_default()
    })?;
    Ok(serde_json::from_slice(&answer)?)
}

/// What a process that was started for it alone answers to one of many threads, which cannot be copied: the parent that
/// the disk in `file`, which lies in `folder`, names, as JSON. Where there is a `place`, the disk names that path from
/// then on, and the answer is what it named before. This process gives up its rights first.
///
/// # Errors
/// The host's error; where the disk cannot be changed.
pub fn answer(file: File, folder: &Path, user: User, place: Option<&Path>) -> io::Result<Vec<u8>> {
    // A static program opens `/dev/urandom` for its first identifier, and reads on from it for all others.
    let _ = Guid::random();
    confine(user)?;
    let locator = match place {
        Some(place) => vhdx::move_parent(file, folder, place).map_err(io::Error::other)?,
        None => vhdx::parent_locator(file).ok().flatten(),
    };
    let link = locator.map(|locator| ParentLink::new(&locator, folder));
    Ok(serde_json::to_vec(&link)?)
}

/// Has a child process work with `file` as `user`, and gives its answer.
fn ask(file: &File, user: User, work: impl FnOnce(File) -> Vec<u8>) -> io::Result<Vec<u8>> {
    let (answers, answer) = pipe_with(PipeFlags::CLOEXEC)?;
    // SAFETY: the copy of this process runs `child` alone, which does not return. By the contract of the callers there
    // is no other thread, whose locks would stay taken in the copy.
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        child(file, &answer, user, work);
    }
    drop(answer);
    let pid = u32::try_from(pid).ok().and_then(|_| Pid::from_raw(pid));
    let pid = pid.ok_or_else(io::Error::last_os_error)?;
    let read = read_answer(answers);
    // It has answered, or is not going to.
    let _ = kill_process(pid, Signal::KILL);
    let _ = retry_on_intr(|| waitpid(Some(pid), WaitOptions::empty()));
    read
}

/// Reads until the child closes its end. A child that was taken over may answer anything, or nothing for ever.
///
/// # Errors
/// `TimedOut`, `UnexpectedEof` where there is no answer, `FileTooLarge`, and the host's.
pub fn read_answer(answers: OwnedFd) -> io::Result<Vec<u8>> {
    let end = Instant::now() + PATIENCE;
    let mut answers = File::from(answers);
    let (mut answer, mut buffer) = (Vec::new(), [0; 4 << 10]);
    loop {
        let left = end.saturating_duration_since(Instant::now());
        let left = Timespec::try_from(left).map_err(io::Error::other)?;
        let mut polled = [PollFd::new(&answers, PollFlags::IN)];
        if retry_on_intr(|| poll(&mut polled, Some(&left)))? == 0 {
            return Err(io::ErrorKind::TimedOut.into());
        }
        match answers.read(&mut buffer)? {
            0 if answer.is_empty() => return Err(io::ErrorKind::UnexpectedEof.into()),
            0 => return Ok(answer),
            count => answer.extend(buffer.iter().take(count)),
        }
        if answer.len() > LONGEST {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
    }
}

/// The life of the child: its descriptors are closed but for the file and the pipe, it gives up its rights, works,
/// answers and ends.
fn child(file: &File, answer: &OwnedFd, user: User, work: impl FnOnce(File) -> Vec<u8>) -> ! {
    let worked = catch_unwind(AssertUnwindSafe(|| -> io::Result<()> {
        let (file, mut answer) = alone_with(file, answer)?;
        confine(user)?;
        answer.write_all(&work(file))
    }));
    let code = i32::from(!matches!(worked, Ok(Ok(()))));
    // SAFETY: _exit(2) ends the process at once, without anything that was registered by the process that it is a copy
    // of.
    unsafe { libc::_exit(code) }
}

/// Closes all descriptors but two, and gives these.
fn alone_with(file: &File, answer: &OwnedFd) -> io::Result<(File, File)> {
    // Above all others first, so that neither takes the place of the other.
    let first = fcntl_dupfd_cloexec(file, LOWEST)?;
    let second = fcntl_dupfd_cloexec(answer, LOWEST)?;
    let (low, high) = if first.as_raw_fd() < second.as_raw_fd() {
        (first.as_raw_fd(), second.as_raw_fd())
    } else {
        (second.as_raw_fd(), first.as_raw_fd())
    };
    let ends = [(0, low - 1), (low + 1, high - 1), (high + 1, i32::MAX)];
    for (from, to) in ends {
        if from <= to {
            // SAFETY: close_range(2) reads no memory. What owns the descriptors that it closes is never dropped, as
            // this process ends by _exit(2).
            let closed = unsafe { libc::syscall(libc::SYS_close_range, from, to, 0) };
            if closed != 0 {
                return Err(io::Error::last_os_error());
            }
        }
    }
    Ok((first.into(), second.into()))
}

#[cfg(test)]
mod tests {
    use storage::vhdx::{ChildOptions, CreateOptions, Vhdx};

    use super::*;

    fn own() -> User {
        (None, None)
    }

    #[test]
    fn a_child_reads_which_parent_a_disk_names_and_a_file_shows_whether_it_is_that() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        Vhdx::create(at("base"), &CreateOptions::new(64 << 20)).unwrap();
        Vhdx::create(at("other"), &CreateOptions::new(64 << 20)).unwrap();
        Vhdx::create_child(at("top"), at("base"), &ChildOptions::default()).unwrap();
        std::fs::write(at("raw"), [0; 4096]).unwrap();
        let open = |name: &str| File::open(at(name)).unwrap();
        let link = parent_of(&open("top"), folder.path(), own())
            .unwrap()
            .unwrap();
        assert_eq!(link.paths.first(), Some(&at("base")));
        assert!(link.is_of(open("base")));
        for other in ["other", "top", "raw"] {
            assert!(!link.is_of(open(other)), "{other}");
            assert_eq!(
                parent_of(&open(other), folder.path(), own())
                    .unwrap()
                    .is_some(),
                other == "top"
            );
        }
    }

    #[test]
    fn a_child_has_one_file_and_reaches_no_other() {
        let file = tempfile::tempfile().unwrap();
        let _other = tempfile::tempfile().unwrap();
        let count = |_| {
            // SAFETY: fcntl(2) with F_GETFD reads no memory.
            let is_open = |fd: &i32| unsafe { libc::fcntl(*fd, libc::F_GETFD) } >= 0;
            let open = (0..4096).filter(is_open).count();
            open.to_string().into_bytes()
        };
        assert_eq!(ask(&file, own(), count).unwrap(), b"2");
        let opens = |_| match File::open("/dev/null") {
            Ok(_) => b"open".to_vec(),
            Err(_) => b"refused".to_vec(),
        };
        assert!(ask(&file, own(), opens).is_err());
        let forks = |_| {
            // SAFETY: the system call is refused before it has an effect.
            let forked = unsafe { libc::fork() };
            forked.to_string().into_bytes()
        };
        assert!(ask(&file, own(), forks).is_err());
    }

    #[test]
    fn an_answer_that_is_too_long_or_none_is_an_error() {
        let file = tempfile::tempfile().unwrap();
        let error = ask(&file, own(), |_| vec![b' '; LONGEST + 1]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::FileTooLarge);
        let error = ask(&file, own(), |_| panic!("a defect")).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        let longest = ask(&file, own(), |_| vec![b' '; LONGEST]).unwrap();
        assert_eq!(longest.len(), LONGEST);
    }
}
