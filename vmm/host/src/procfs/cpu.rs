//! CPU time of processes and threads, by `/proc/PID/stat`.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use procfs::process::{Process, Stat};

use super::ProcError;

/// The name of the merger's thread, which makes guests share what they have read.
const MERGER: &str = "share";

fn duration(ticks: u64) -> Duration {
    let second = rustix::param::clock_ticks_per_second().max(1);
    Duration::from_micros(ticks.saturating_mul(1_000_000) / second)
}

/// User and system time together.
fn used(stat: &Stat) -> Duration {
    duration(stat.utime.saturating_add(stat.stime))
}

/// Reads something of a process. The name that a process gives itself need not be UTF-8, and nothing here depends on
/// it.
fn read<T>(pid: u32, read: impl FnOnce(&Process) -> procfs::ProcResult<T>) -> Result<T, ProcError> {
    let path = PathBuf::from(format!("/proc/{pid}"));
    Process::new_with_root(path.clone())
        .and_then(|process| read(&process))
        .map_err(|error| failure(path.join("stat"), error))
}

fn failure(path: PathBuf, error: procfs::ProcError) -> ProcError {
    use procfs::ProcError::{Incomplete, InternalError, Io, NotFound, Other, PermissionDenied};
    let source = match error {
        Io(source, _) => source,
        PermissionDenied(_) => io::ErrorKind::PermissionDenied.into(),
        NotFound(_) => io::ErrorKind::NotFound.into(),
        Incomplete(_) | Other(_) | InternalError(_) => {
            return ProcError::Malformed {
                path,
                expected: "the fields of proc(5)",
            };
        }
    };
    ProcError::Read { path, source }
}

/// When a process started, since boot. Its start and its number together identify a process.
///
/// # Errors
/// `Read`, `Malformed`.
pub fn start_of(pid: u32) -> Result<Duration, ProcError> {
    Ok(duration(read(pid, Process::stat)?.starttime))
}

/// CPU time so far of a process, with all its threads.
///
/// # Errors
/// `Read`, `Malformed`.
pub fn of_process(pid: u32) -> Result<Duration, ProcError> {
    Ok(used(&read(pid, Process::stat)?))
}

/// CPU time so far of the merger of a guest; zero where it has none.
///
/// # Errors
/// `Read`, `Malformed`.
pub fn of_merger(pid: u32) -> Result<Duration, ProcError> {
    read(pid, |process| {
        // A thread may end at any time, so one that cannot be read is left out.
        let threads = process.tasks()?.filter_map(|task| task.ok()?.stat().ok());
        Ok(threads
            .filter(|stat| stat.comm == MERGER)
            .map(|stat| used(&stat))
            .sum())
    })
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;
    use std::process::Command;
    use std::time::Instant;

    use procfs::FromRead;

    use super::*;

    #[test]
    fn names_may_hold_spaces_and_parentheses() {
        let stat = "42 (a) b (c) S 1 42 42 0 -1 4194304 10 0 0 0 170 30 5 6 20 0 1 0 100 1000 1 \
            0 0 0 0 0 0 0 0 0 0 0 0 0 17 0 0 0 0 0 0 0 0 0 0 0 0 0 0";
        let stat = Stat::from_read(stat.as_bytes()).unwrap();
        assert_eq!((used(&stat), stat.starttime), (duration(200), 100));
        assert!(Stat::from_read("42 (sh) S 1".as_bytes()).is_err());
        assert!(Stat::from_read("".as_bytes()).is_err());
    }

    #[test]
    fn a_process_whose_name_is_no_text_has_a_start_and_a_time() {
        let folder = tempfile::tempdir().unwrap();
        let sleep = folder.path().join(OsStr::from_bytes(b"a) (\xff"));
        std::os::unix::fs::symlink("/bin/sleep", &sleep).unwrap();
        let mut child = Command::new(sleep).arg("60").spawn().unwrap();
        let found = (
            start_of(child.id()),
            of_process(child.id()),
            of_merger(child.id()),
        );
        child.kill().unwrap();
        child.wait().unwrap();
        let own = start_of(std::process::id()).unwrap();
        assert!(found.0.unwrap() >= own && found.1.is_ok() && found.2.unwrap().is_zero());
        assert!(matches!(start_of(child.id()), Err(ProcError::Read { .. })));
        assert!(matches!(start_of(u32::MAX), Err(ProcError::Read { .. })));
    }

    #[test]
    fn only_the_merger_is_counted_as_one() {
        let pid = std::process::id();
        let busy = |name: &str| {
            std::thread::Builder::new()
                .name(name.to_owned())
                .spawn(move || {
                    let end = Instant::now() + Duration::from_millis(400);
                    let mut sums = [Duration::ZERO; 2];
                    // On a busy machine it may take longer until the thread has used any CPU time.
                    while Instant::now() < end || sums[1].is_zero() {
                        sums = [of_merger(pid).unwrap(), of_process(pid).unwrap()];
                    }
                    sums
                })
        };
        let [merger, process] = busy("shared").unwrap().join().unwrap();
        assert!(merger.is_zero() && process > Duration::ZERO);
        let [merger, process] = busy(MERGER).unwrap().join().unwrap();
        assert!(merger > Duration::ZERO && merger <= process);
    }
}
