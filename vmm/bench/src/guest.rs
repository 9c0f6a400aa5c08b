//! A guest that is measured: its process, and the lines of its console with their times.

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, MutexGuard};

use super::BenchError;
use super::interrupt::{Interrupt, TICK};
use super::workload::{IDLE, INIT, SUM};

/// How many lines an error quotes of a guest that failed.
const LAST_LINES: usize = 5;

/// Lines, each with the time since the start at which it was read.
#[derive(Default)]
struct Lines {
    state: Mutex<(Vec<(Duration, String)>, bool)>,
    grew: Condvar,
}

impl Lines {
    fn lock(&self) -> MutexGuard<'_, (Vec<(Duration, String)>, bool)> {
        self.state.lock()
    }

    /// Reads `source` to its end, in a thread of its own.
    fn follow(self: &Arc<Self>, source: impl Read + Send + 'static, started: Instant) {
        let this = Arc::clone(self);
        std::thread::spawn(move || {
            // A source that fails has ended.
            for line in BufReader::new(source).split(b'\n').map_while(Result::ok) {
                let text = String::from_utf8_lossy(&line).trim_end().to_owned();
                this.lock().0.push((started.elapsed(), text));
                this.grew.notify_all();
            }
            this.lock().1 = true;
            this.grew.notify_all();
        });
    }

    /// The first line with `prefix`: when it was read, and its rest.
    fn find(&self, prefix: &str) -> Option<(Duration, String)> {
        self.lock()
            .0
            .iter()
            .find_map(|(at, line)| Some((*at, line.strip_prefix(prefix)?.to_owned())))
    }

    fn last_lines(&self) -> String {
        let state = self.lock();
        let lines = &state.0[state.0.len().saturating_sub(LAST_LINES)..];
        lines
            .iter()
            .map(|(_, line)| line.as_str())
            .collect::<Vec<_>>()
            .join(" | ")
    }
}

/// How long a guest took, since the start of its process.
#[derive(Clone, Copy, Debug)]
pub(super) struct Times {
    /// Until its `/init` ran.
    pub(super) init: Duration,
    /// The guest's own time then, in seconds.
    pub(super) uptime: f64,
    /// Until its work was done.
    pub(super) idle: Duration,
}

/// A guest, which is killed when this is dropped.
pub(super) struct Guest {
    child: Child,
    console: Arc<Lines>,
    log: Arc<Lines>,
    started: Instant,
}

impl Guest {
    /// Starts it.
    pub(super) fn start(command: &mut Command) -> Result<Self, BenchError> {
        let started = Instant::now();
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(BenchError::io(format!(
                "start {}",
                command.get_program().to_string_lossy()
            )))?;
        let (console, log) = (Arc::<Lines>::default(), Arc::<Lines>::default());
        if let (Some(stdout), Some(stderr)) = (child.stdout.take(), child.stderr.take()) {
            console.follow(stdout, started);
            log.follow(stderr, started);
        }
        Ok(Self {
            child,
            console,
            log,
            started,
        })
    }

    /// The number of its process.
    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits until the guest idles, and compares its checksum.
    pub(super) fn wait_until_idle(
        &mut self,
        expected: &str,
        patience: Duration,
        interrupt: &Interrupt,
    ) -> Result<Times, BenchError> {
        let (init, uptime) = self.wait_for(INIT, patience, interrupt)?;
        let uptime = uptime.parse().map_err(|_| BenchError::Malformed {
            path: "the guest's console".into(),
            expected: "the uptime at /init",
        })?;
        let (idle, _) = self.wait_for(IDLE, patience, interrupt)?;
        let (_, found) = self.wait_for(SUM, patience, interrupt)?;
        if found == expected {
            Ok(Times { init, uptime, idle })
        } else {
            Err(BenchError::Checksum {
                expected: expected.to_owned(),
                found,
            })
        }
    }

    fn wait_for(
        &mut self,
        awaited: &'static str,
        patience: Duration,
        interrupt: &Interrupt,
    ) -> Result<(Duration, String), BenchError> {
        loop {
            interrupt.check()?;
            if let Some(found) = self.console.find(awaited) {
                return Ok(found);
            }
            let status = self
                .child
                .try_wait()
                .map_err(BenchError::io("wait for a guest"))?;
            if let Some(status) = status
                && self.console.lock().1
                && self.log.lock().1
            {
                // Its last line may have been read since the search above.
                return self.console.find(awaited).ok_or_else(|| BenchError::Ended {
                    status: status.to_string(),
                    awaited,
                    words: self.last_lines(),
                });
            }
            if self.started.elapsed() > patience {
                return Err(BenchError::Silent {
                    awaited,
                    patience,
                    words: self.last_lines(),
                });
            }
            let mut state = self.console.lock();
            self.console.grew.wait_for(&mut state, TICK);
        }
    }

    /// The end of the log, where the VMM reports what went wrong, or of the console.
    fn last_lines(&self) -> String {
        match self.log.last_lines() {
            words if words.is_empty() => self.console.last_lines(),
            words => words,
        }
    }

    /// Fails if the guest has ended.
    pub(super) fn check(&mut self) -> Result<(), BenchError> {
        match self
            .child
            .try_wait()
            .map_err(BenchError::io("wait for a guest"))?
        {
            None => Ok(()),
            Some(status) => Err(BenchError::Ended {
                status: status.to_string(),
                awaited: "that it was measured",
                words: self.last_lines(),
            }),
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // The guest may have ended already. Its memory is free once the process is waited for.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Guest {
        Guest::start(Command::new("sh").args(["-c", script])).unwrap()
    }

    fn wait(script: &str, patience: Duration) -> Result<Times, BenchError> {
        let interrupt = Interrupt::new().unwrap();
        shell(script).wait_until_idle("abc", patience, &interrupt)
    }

    const PATIENCE: Duration = Duration::from_mins(1);

    #[test]
    fn a_guest_that_idles_with_its_checksum_is_timed() {
        let script = "echo COPPICE-INIT uptime=1.25; sleep 0.2; echo BENCH-SUM abc; echo BENCH-IDLE; sleep 100";
        let times = wait(script, PATIENCE).unwrap();
        assert!((times.uptime - 1.25).abs() < 1e-9);
        // The process was started after the clock. How late its lines are read depends on the load of the host.
        assert!(times.idle >= times.init, "{times:?}");
        assert!(times.idle >= Duration::from_millis(200), "{times:?}");
    }

    #[test]
    fn a_wrong_checksum_is_an_error() {
        let script =
            "echo COPPICE-INIT uptime=1.25; echo BENCH-SUM abd; echo BENCH-IDLE; sleep 100";
        let error = wait(script, PATIENCE).unwrap_err();
        assert!(
            matches!(&error, BenchError::Checksum { found, .. } if found == "abd"),
            "{error}"
        );
    }

    #[test]
    fn the_error_of_a_guest_that_ends_quotes_its_last_lines() {
        let script = "echo COPPICE-INIT uptime=1.25; echo no disk >&2; exit 3";
        let error = wait(script, PATIENCE).unwrap_err().to_string();
        assert!(
            error.contains("exit status: 3") && error.contains("no disk"),
            "{error}"
        );
    }

    #[test]
    fn a_silent_guest_is_not_awaited_for_ever() {
        let error = wait("sleep 100", Duration::from_millis(300)).unwrap_err();
        assert!(matches!(error, BenchError::Silent { .. }), "{error}");
    }
}
