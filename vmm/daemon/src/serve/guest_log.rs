//! The log of a guest's process: a named pipe, which the daemon drains into a file.
//!
//! ```text
//! process ── standard error ──> log.pipe ── at a rate, escaped, line by line ──> log
//!                                                    (the older half goes when it is too long)
//! ```
//!
//! A guest may have taken over its process, and a file that a process can write to it can make as long as the disk. So
//! the process has no file: it has a pipe, of which the daemon takes so many bytes a second and no more. What the
//! process writes beyond that fills the pipe, and stays in the process: its logger leaves lines out and says how many
//! (`control::logging`). A process that floods the pipe costs the daemon neither its disk nor its memory, and no more
//! than a few wake-ups a second.
//!
//! Guests outlive the daemon, so the pipe has to as well. It has a name in the guest's folder, by which the next daemon
//! opens it again, and which is the daemon's alone (`jail` gives the guest no file of that name). The process has it
//! open for reading, too, and without waiting: a write neither ends the process by `SIGPIPE` nor stops the guest while
//! no daemon runs, and what is written then stays in the pipe (64 KiB; pipe(7)) for the next daemon. The one thing that
//! is lost is the rest of a pipe whose process ends while there is no daemon; why it ended is in `end.json`. A logger
//! process beside the daemon would keep that, and would have to be watched and restarted as the daemon is.

use std::fs::{self, File, OpenOptions};
use std::future::{Future, pending};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{CWD, FallocateFlags, Mode, fallocate, mkfifoat};
use rustix::io::{Errno, read, retry_on_intr};
use tokio::net::unix::pipe::Receiver;
use tokio::time::sleep;

use super::store::{self, LOG, open_without_waiting};
use super::task::blocking;
use host::printable::printable_lines;
use host::report::chain;

/// The pipe, in the guest's folder.
const PIPE: &str = "log.pipe";

/// Longest log of a guest in bytes.
const LONGEST_LOG: u64 = 4 << 20;
/// Bytes on the disk that are reserved for a log when it begins.
const LOG_ROOM: u64 = 4 << 10;
/// Bytes that are taken of a pipe in a second, and at once after a time of silence.
const RATE: u64 = 16 << 10;
const BURST: u64 = 256 << 10;
/// Most bytes that are read at once.
const CHUNK: usize = 64 << 10;
/// From one look at a pipe to the next: a process that writes byte by byte does not wake the daemon for each.
const PAUSE: Duration = Duration::from_millis(50);
/// Longest line in bytes. It is broken where it is longer.
const LONGEST_LINE: usize = 4 << 10;
/// Most bytes of a pipe that are read when its process has ended: as much as a user's process can have it hold
/// (pipe(7), `pipe-max-size`). Another process may have got hold of the pipe, and never stop to write.
const CAPACITY: usize = 1 << 20;
/// Bytes of the end of a log that are looked at for its last line.
const TAIL: u64 = 8 << 10;

/// The two ends of a new pipe.
#[derive(Debug)]
pub struct Ends {
    /// For the process.
    pub process: OwnedFd,
    /// For the daemon.
    pub daemon: File,
}

/// Makes an empty log, and the pipe to it.
///
/// # Errors
/// The host's error.
pub fn make(folder: &Path) -> io::Result<Ends> {
    let log = folder.join(LOG);
    let make_log = || {
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(true).mode(0o600);
        let file = open_without_waiting(&log, &mut options)?;
        // Where the disk is full, the process fails to start for that reason, most likely, and has to have room to log
        // it.
        match fallocate(&file, FallocateFlags::KEEP_SIZE, 0, LOG_ROOM) {
            Ok(()) | Err(Errno::OPNOTSUPP | Errno::NOSYS) => Ok(()),
            Err(error) => Err(error.into()),
        }
    };
    make_log().map_err(store::named(&log))?;
    let pipe = folder.join(PIPE);
    let make_pipe = || {
        match fs::remove_file(&pipe) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            Ok(()) | Err(_) => {}
        }
        mkfifoat(CWD, &pipe, Mode::RUSR | Mode::WUSR)?;
        Ok(Ends {
            process: open_pipe(OpenOptions::new().read(true).write(true), &pipe)?.into(),
            daemon: open_pipe(OpenOptions::new().read(true), &pipe)?,
        })
    };
    make_pipe().map_err(store::named(&pipe))
}

fn open_pipe(options: &mut OpenOptions, path: &Path) -> io::Result<File> {
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    let file = options.custom_flags(flags).open(path)?;
    if !file.metadata()?.file_type().is_fifo() {
        return Err(io::Error::other("it is no named pipe"));
    }
    Ok(file)
}

/// Opens the daemon's end of the pipe of a process that an earlier daemon has started; `None` where there is none.
///
/// # Errors
/// The host's error.
pub fn open(folder: &Path) -> io::Result<Option<File>> {
    let path = folder.join(PIPE);
    match open_pipe(OpenOptions::new().read(true), &path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        opened => opened.map(Some).map_err(store::named(&path)),
    }
}

/// The last line of a guest's log that is not empty.
///
/// # Errors
/// The host's error.
pub fn last_line(folder: &Path) -> io::Result<Option<String>> {
    let path = folder.join(LOG);
    let read_tail = || {
        let mut log = open_without_waiting(&path, OpenOptions::new().read(true))?;
        let len = log.metadata()?.len();
        log.seek(SeekFrom::Start(len.saturating_sub(TAIL)))?;
        let mut tail = Vec::new();
        log.take(TAIL).read_to_end(&mut tail)?;
        Ok::<_, io::Error>(tail)
    };
    let tail = match read_tail() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        tail => tail.map_err(store::named(&path))?,
    };
    let tail = String::from_utf8_lossy(&tail);
    let last = tail.lines().rfind(|line| !line.trim().is_empty());
    Ok(last.map(|line| printable_lines(line).into_owned()))
}

/// How many bytes may be taken of a pipe now.
#[derive(Debug)]
struct Allowance {
    bytes: u64,
    at: Instant,
}

impl Allowance {
    fn new(now: Instant) -> Self {
        Self {
            bytes: BURST,
            at: now,
        }
    }

    fn take(&mut self, now: Instant, most: usize) -> usize {
        let passed = now.saturating_duration_since(self.at).as_millis();
        let gained = u64::try_from(passed)
            .unwrap_or(u64::MAX)
            .saturating_mul(RATE)
            / 1000;
        // What is less than a byte is not lost, as the time stands still until it is one.
        if gained > 0 {
            self.bytes = self.bytes.saturating_add(gained).min(BURST);
            self.at = now;
        }
        usize::try_from(self.bytes).unwrap_or(usize::MAX).min(most)
    }

    fn has_taken(&mut self, bytes: usize) {
        self.bytes = self.bytes.saturating_sub(bytes as u64);
    }
}

/// Where the lines of a pipe go.
#[derive(Debug)]
struct Lines {
    path: PathBuf,
    /// The beginning of a line whose end has not come.
    rest: Vec<u8>,
    /// Bytes that could not be written.
    lost: usize,
}

impl Lines {
    /// The whole lines among what was read before and now, escaped; `is_end` says that no more comes.
    fn take(&mut self, bytes: &[u8], is_end: bool) -> String {
        let mut text = String::new();
        let mut put = |line: &[u8]| {
            text.push_str(&printable_lines(&String::from_utf8_lossy(line)));
            text.push('\n');
        };
        for byte in bytes {
            if *byte == b'\n' || self.rest.len() == LONGEST_LINE {
                put(&self.rest);
                self.rest.clear();
            }
            if *byte != b'\n' {
                self.rest.push(*byte);
            }
        }
        if is_end && !self.rest.is_empty() {
            put(&self.rest);
            self.rest.clear();
        }
        text
    }

    /// Writes lines, and says how many bytes were lost where earlier ones could not be written.
    async fn write(&mut self, text: String) {
        if text.is_empty() {
            return;
        }
        let (path, lost, len) = (self.path.clone(), self.lost, text.len());
        let written = blocking(move || {
            let text = match lost {
                0 => text,
                lost => format!("coppice: {lost} bytes of the log could not be written\n{text}"),
            };
            append(&path, text.as_bytes()).map_err(store::named(&path))
        });
        match written.await {
            Ok(Ok(())) => self.lost = 0,
            Ok(Err(error)) => {
                if self.lost == 0 {
                    tracing::warn!(error = %chain(&error), "lines of a guest's log are lost");
                }
                self.lost += len;
            }
            Err(fault) => {
                tracing::error!(fault = %chain(&fault), "lines of a guest's log are lost");
            }
        }
    }
}

/// Appends to a log, which stays within its limit.
fn append(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut options = OpenOptions::new();
    options.append(true).create(true).mode(0o600);
    let mut log = open_without_waiting(path, &mut options)?;
    if log.metadata()?.len().saturating_add(bytes.len() as u64) > LONGEST_LOG {
        // Where the newer half cannot be kept, on a full disk for one, there is none.
        if keep_newer_half(path).is_err() {
            log.set_len(0)?;
        }
        log = open_without_waiting(path, &mut options)?;
    }
    log.write_all(bytes)
}

/// Replaces a log by the lines in its newer half.
fn keep_newer_half(path: &Path) -> io::Result<()> {
    let mut log = open_without_waiting(path, OpenOptions::new().read(true))?;
    let len = log.metadata()?.len();
    log.seek(SeekFrom::Start(len.saturating_sub(LONGEST_LOG / 2)))?;
    let mut half = Vec::new();
    log.take(LONGEST_LOG / 2).read_to_end(&mut half)?;
    let whole = half
        .iter()
        .position(|byte| *byte == b'\n')
        .map_or(0, |at| at + 1);
    store::replace(path, half.get(whole..).unwrap_or_default())
}

/// Drains the pipe of a process into the log in `folder` until `end`, and gives what that gives. All that the process
/// has written by then is in the log afterwards.
pub async fn drain<T>(pipe: File, folder: &Path, end: impl Future<Output = T>) -> T {
    let pipe = match Receiver::from_file(pipe) {
        Ok(pipe) => pipe,
        Err(error) => {
            tracing::error!(error = %chain(&error), "the log of a guest cannot be read");
            return end.await;
        }
    };
    let mut lines = Lines {
        path: folder.join(LOG),
        rest: Vec::new(),
        lost: 0,
    };
    let mut allowance = Allowance::new(Instant::now());
    let mut end = std::pin::pin!(end);
    let mut is_over = false;
    let ended = loop {
        let wait_for_more = async {
            if is_over {
                pending::<()>().await;
            }
            sleep(PAUSE).await;
            // An error is seen by the read, too.
            let _ = pipe.readable().await;
        };
        tokio::select! {
            ended = &mut end => break ended,
            () = wait_for_more => {}
        }
        let most = allowance.take(Instant::now(), CHUNK);
        if most == 0 {
            continue;
        }
        // Made for each read, as a guest that logs nothing is to take nothing of the daemon.
        let mut chunk = vec![0; most];
        match pipe.try_read(&mut chunk) {
            // The process has closed its standard error.
            Ok(0) => is_over = true,
            Ok(len) => {
                allowance.has_taken(len);
                let text = lines.take(chunk.get(..len).unwrap_or_default(), false);
                lines.write(text).await;
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => {
                tracing::error!(error = %chain(&error), "the log of a guest cannot be read");
                is_over = true;
            }
        }
    };
    let (mut left, mut chunk) = (CAPACITY, vec![0; CHUNK]);
    while left > 0 {
        // Not by `try_read`, which reads nothing where the runtime has not been woken for it yet.
        match retry_on_intr(|| read(&pipe, &mut *chunk)) {
            Ok(len) if len > 0 => {
                let text = lines.take(chunk.get(..len).unwrap_or_default(), false);
                lines.write(text).await;
                left = left.saturating_sub(len);
            }
            Ok(_) | Err(_) => break,
        }
    }
    let text = lines.take(&[], true);
    lines.write(text).await;
    ended
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use rustix::fs::{OFlags, fcntl_getfl};
    use tokio::runtime::Builder;
    use tokio::time::timeout;

    use super::*;

    fn run<T>(task: impl Future<Output = T>) -> T {
        let runtime = Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(task)
    }

    fn lines() -> Lines {
        Lines {
            path: PathBuf::new(),
            rest: Vec::new(),
            lost: 0,
        }
    }

    /// Writes until the pipe is full, as a process that does not wait.
    fn flood(mut pipe: &File, line: &[u8]) -> usize {
        let mut written = 0;
        while let Ok(len) = pipe.write(line) {
            written += len;
        }
        written
    }

    #[test]
    fn a_process_writes_without_a_daemon_and_the_next_daemon_reads_that() {
        let folder = tempfile::tempdir().unwrap();
        let ends = make(folder.path()).unwrap();
        drop(ends.daemon);
        let process = File::from(ends.process);
        assert!(fcntl_getfl(&process).unwrap().contains(OFlags::NONBLOCK));
        let line = b"a line of 32 bytes with its end\n";
        let written = flood(&process, line);
        assert_eq!(written % line.len(), 0);
        let pipe = open(folder.path()).unwrap().unwrap();
        run(async { drain(pipe, folder.path(), async {}).await });
        let log = fs::read(folder.path().join(LOG)).unwrap();
        assert_eq!(log.len(), written);
        assert!(log.chunks(line.len()).all(|found| found == line));
    }

    #[test]
    fn a_process_that_floods_its_log_takes_no_more_of_the_disk_than_the_rate_and_is_not_held_up() {
        let folder = tempfile::tempdir().unwrap();
        let ends = make(folder.path()).unwrap();
        let process = File::from(ends.process);
        let begun = Instant::now();
        let flooding = std::thread::spawn(move || {
            let mut refused = 0u32;
            while begun.elapsed() < Duration::from_millis(1500) {
                flood(&process, &[b'x'; 512]);
                refused += 1;
            }
            refused
        });
        run(async {
            let end = sleep(Duration::from_millis(1500));
            drain(ends.daemon, folder.path(), end).await;
        });
        let took = begun.elapsed().as_secs() + 1;
        assert!(flooding.join().unwrap() > 100, "it was held up");
        let len = fs::metadata(folder.path().join(LOG)).unwrap().len();
        // A line is broken where it is too long, so there are some more bytes.
        let most = BURST + RATE * took + CAPACITY as u64;
        assert!((BURST / 2..most + most / 1000).contains(&len), "{len}");
    }

    #[test]
    fn a_process_that_never_stops_does_not_keep_the_daemon_from_its_end() {
        let folder = tempfile::tempdir().unwrap();
        let ends = make(folder.path()).unwrap();
        let process = File::from(ends.process);
        let (stop, stopped) = std::sync::mpsc::channel::<()>();
        let flooding = std::thread::spawn(move || {
            while stopped.try_recv() == Err(std::sync::mpsc::TryRecvError::Empty) {
                flood(&process, b"y\n");
            }
        });
        let ended = run(async {
            let drained = drain(ends.daemon, folder.path(), async { 7 });
            timeout(Duration::from_secs(20), drained).await
        });
        assert_eq!(ended.unwrap(), 7);
        drop(stop);
        flooding.join().unwrap();
        let len = fs::metadata(folder.path().join(LOG)).unwrap().len();
        assert!(len <= (CAPACITY + CHUNK) as u64, "{len}");
    }

    #[test]
    fn the_log_of_a_process_that_closes_its_standard_error_is_done() {
        let folder = tempfile::tempdir().unwrap();
        let ends = make(folder.path()).unwrap();
        let mut process = File::from(ends.process);
        process.write_all(b"the end").unwrap();
        drop(process);
        run(async {
            let end = sleep(Duration::from_millis(200));
            drain(ends.daemon, folder.path(), end).await;
        });
        assert_eq!(
            fs::read_to_string(folder.path().join(LOG)).unwrap(),
            "the end\n"
        );
    }

    #[test]
    fn bytes_become_lines_that_a_terminal_can_be_given() {
        let mut lines = lines();
        assert_eq!(lines.take(b"one\n\x1b[2J two\xff", false), "one\n");
        assert_eq!(
            lines.take(b"\tend\nrest", false),
            "\\u001b[2J two\u{fffd}\tend\n"
        );
        let long = vec![b'a'; LONGEST_LINE + 1];
        let text = lines.take(&long, true);
        assert_eq!(
            text.lines().map(str::len).collect::<Vec<_>>(),
            [LONGEST_LINE, 5]
        );
        assert_eq!(lines.take(b"", true), "");
    }

    #[test]
    fn the_allowance_is_a_burst_and_then_the_rate() {
        let begun = Instant::now();
        let at = |ms| begun + Duration::from_millis(ms);
        let mut allowance = Allowance::new(begun);
        assert_eq!(allowance.take(begun, usize::MAX), BURST as usize);
        allowance.has_taken(BURST as usize);
        assert_eq!(allowance.take(begun, usize::MAX), 0);
        for ms in (0..1000).step_by(7) {
            allowance.take(at(ms), usize::MAX);
        }
        let second = allowance.take(at(1000), usize::MAX) as u64;
        assert!((RATE - RATE / 100..=RATE).contains(&second), "{second}");
        assert_eq!(allowance.take(at(1000), 10), 10);
        assert_eq!(allowance.take(at(1 << 40), usize::MAX), BURST as usize);
    }

    #[test]
    fn a_log_that_is_too_long_keeps_its_newer_half() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(LOG);
        let line = [&[b'a'; 1023][..], b"\n"].concat();
        fs::write(&path, line.repeat((LONGEST_LOG >> 10) as usize)).unwrap();
        append(&path, b"next\n").unwrap();
        let log = fs::read(&path).unwrap();
        assert!(log.ends_with(b"a\nnext\n") && log.starts_with(&line));
        assert!((LONGEST_LOG / 2 - 1024..=LONGEST_LOG / 2 + 5).contains(&(log.len() as u64)));
        // A guest has put a folder where the half is to be written.
        fs::write(&path, line.repeat((LONGEST_LOG >> 10) as usize)).unwrap();
        fs::create_dir(folder.path().join("log.new")).unwrap();
        append(&path, b"next\n").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"next\n");
    }

    #[test]
    fn what_is_no_log_is_neither_read_nor_written_nor_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(LOG);
        let other = folder.path().join("other");
        let refused = || {
            last_line(folder.path()).unwrap_err();
            append(&path, b"line\n").unwrap_err();
            make(folder.path()).unwrap_err();
        };
        mkfifoat(CWD, &path, Mode::RWXU).unwrap();
        refused();
        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        refused();
        fs::remove_dir(&path).unwrap();
        fs::write(&other, "precious").unwrap();
        symlink(&other, &path).unwrap();
        refused();
        assert_eq!(fs::read_to_string(&other).unwrap(), "precious");
        fs::remove_file(&path).unwrap();
        fs::write(folder.path().join(PIPE), "").unwrap();
        open(folder.path()).unwrap_err();
        assert_eq!(last_line(folder.path()).unwrap(), None);
    }

    #[test]
    fn the_last_line_of_a_long_log_is_read_without_the_rest() {
        let folder = tempfile::tempdir().unwrap();
        let mut log = File::create(folder.path().join(LOG)).unwrap();
        // Sparse: were it read whole, it would be 1 TiB of memory.
        log.seek(SeekFrom::Start(1 << 40)).unwrap();
        log.write_all(b"\nwhy: \x1b[2J\n \n").unwrap();
        let last = last_line(folder.path()).unwrap();
        assert_eq!(last.as_deref(), Some("why: \\u001b[2J"));
    }
}
