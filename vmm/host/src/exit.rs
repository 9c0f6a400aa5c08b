//! How `coppice` ends, its exit codes, and the report in the file of `--end-file`.

use std::error::Error;
use std::fs;
use std::io::{self, Write};
use std::path::Path;
use std::process::ExitCode;

use serde::{Deserialize, Serialize};

use crate::report::chain;

/// How a guest came to its end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GuestEnd {
    /// It powered off.
    PowerOff,
    /// It asked for a reset.
    Reset,
    /// Its kernel panicked, and reported that by pvpanic.
    Panic,
    /// A triple fault.
    TripleFault,
    /// It could not start or go on.
    Failed(String),
}

/// Why `coppice run` ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ExitReason {
    /// The guest has ended.
    Guest(GuestEnd),
    /// A signal asked for it.
    Signal(u8),
    /// `Ctrl-A x`.
    Quit,
}

/// A VMM failure: the guest could not start or go on.
pub const FAILURE: u8 = 1;
/// The command line or the configuration is wrong.
pub const USAGE: u8 = 2;
/// The guest asked for a reset.
pub const GUEST_RESET: u8 = 10;
/// The guest's kernel panicked.
pub const GUEST_PANIC: u8 = 11;
/// The guest crashed: a triple fault.
pub const GUEST_CRASH: u8 = 12;
/// A filter stopped a system call (`--seccomp`); Firecracker's number for it.
pub const SECCOMP: u8 = 148;
/// Added to the number of the signal that ended the process, as shells do.
pub const SIGNAL_BASE: u8 = 128;

/// The exit codes as `--help` shows them.
pub const HELP: &str = "\
Exit codes:
  0      the guest powered off
  1      the guest could not start, or the VMM failed
  2      wrong command line or configuration
  10     the guest reset itself (reboot)
  11     the guest's kernel panicked (told by pvpanic)
  12     the guest crashed (triple fault)
  148    a system call was stopped by the seccomp filter, which the log names
  128+N  ended by signal N: 129 SIGHUP, 130 SIGINT or Ctrl-A x, 131 SIGQUIT, 143 SIGTERM";

impl ExitReason {
    /// The exit code of the process.
    pub fn code(&self) -> u8 {
        match self {
            Self::Guest(end) => match end {
                GuestEnd::PowerOff => 0,
                GuestEnd::Reset => GUEST_RESET,
                GuestEnd::Panic => GUEST_PANIC,
                GuestEnd::TripleFault => GUEST_CRASH,
                GuestEnd::Failed(_) => FAILURE,
            },
            Self::Signal(number) => SIGNAL_BASE.saturating_add(*number),
            // In raw mode Ctrl-C goes to the guest, and Ctrl-A x takes its place: so the code is that of SIGINT, signal
            // 2.
            Self::Quit => SIGNAL_BASE + 2,
        }
    }
}

impl From<&ExitReason> for ExitCode {
    fn from(reason: &ExitReason) -> Self {
        Self::from(reason.code())
    }
}

/// Why a guest ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum EndKind {
    /// The guest powered off.
    PowerOff,
    /// The guest asked for a reset.
    Reset,
    /// The guest's kernel panicked.
    Panic,
    /// The guest crashed: a triple fault.
    Crash,
    /// The guest could not start or go on.
    Failed,
    /// A signal asked the process to end.
    Signal,
    /// A user at the terminal ended the process, by `Ctrl-A x`.
    Quit,
    /// The process was killed, or crashed. Another process has written the report.
    Killed,
    /// The end was not observed.
    Unknown,
}

/// The content of the file of `--end-file`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct EndReport {
    /// Why the guest ended.
    pub kind: EndKind,
    /// The reason as a sentence.
    pub text: String,
    /// The exit code of the process; none where it was killed, or its end was not observed.
    pub code: Option<u8>,
}

impl EndReport {
    /// The report of a guest that could not be run, with the error and its sources.
    pub fn failed(error: &dyn Error) -> Self {
        Self::failed_because(chain(error).to_string())
    }

    /// The report of a guest that could not be run, with a text.
    pub fn failed_because(text: impl Into<String>) -> Self {
        Self {
            kind: EndKind::Failed,
            text: text.into(),
            code: Some(FAILURE),
        }
    }

    /// Writes the report as JSON, completely or not at all.
    ///
    /// # Errors
    /// The host's error.
    pub fn write(&self, path: &Path) -> io::Result<()> {
        let mut new = path.as_os_str().to_owned();
        new.push(".new");
        match fs::remove_file(&new) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            Ok(()) | Err(_) => {}
        }
        // A new file is created, so that a link that a jailed process has left there is not followed by this process,
        // which is not jailed yet.
        let mut file = fs::File::create_new(&new)?;
        file.write_all(&serde_json::to_vec(self)?)?;
        fs::rename(&new, path)
    }
}

impl From<&ExitReason> for EndReport {
    fn from(reason: &ExitReason) -> Self {
        let (kind, text) = match reason {
            ExitReason::Guest(end) => match end {
                GuestEnd::PowerOff => (EndKind::PowerOff, "the guest powered off".to_owned()),
                GuestEnd::Reset => (EndKind::Reset, "the guest reset itself".to_owned()),
                GuestEnd::Panic => (EndKind::Panic, "the guest's kernel panicked".to_owned()),
                GuestEnd::TripleFault => (
                    EndKind::Crash,
                    "the guest crashed (triple fault)".to_owned(),
                ),
                GuestEnd::Failed(error) => (EndKind::Failed, error.clone()),
            },
            ExitReason::Signal(number) => (
                EndKind::Signal,
                format!("signal {number} asked the process to end"),
            ),
            ExitReason::Quit => (EndKind::Quit, "ended by Ctrl-A x".to_owned()),
        };
        Self {
            kind,
            text,
            code: Some(reason.code()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fmt::Write as _;

    use expect_test::expect_file;

    use super::*;

    const HEAD: &str = "# Exit codes

Of `coppice run`, as its help tells them; written here by `make reference`; do not edit.

| code | |
|---|---|
";

    const TAIL: &str = "
An error is one line on standard error that begins with `coppice: `. `--end-file FILE` gets the reason as JSON: see [EndReport](rest-operations.md#endreport).
";

    #[test]
    fn the_reference_of_exit_codes_is_current() {
        let mut page = HEAD.to_owned();
        for line in HELP.lines().skip(1) {
            let (code, meaning) = line.trim_start().split_once(' ').unwrap();
            writeln!(page, "| {code} | {} |", meaning.trim_start()).unwrap();
        }
        page.push_str(TAIL);
        expect_file!["../../../docs/reference/exit-codes.md"].assert_eq(&page);
    }

    #[test]
    fn every_end_has_the_code_that_the_help_names() {
        let guest = |end| ExitReason::Guest(end).code();
        assert_eq!(guest(GuestEnd::PowerOff), 0);
        assert_eq!(guest(GuestEnd::Failed("x".to_owned())), 1);
        assert_eq!(guest(GuestEnd::Reset), 10);
        assert_eq!(guest(GuestEnd::Panic), 11);
        assert_eq!(guest(GuestEnd::TripleFault), 12);
        assert_eq!(ExitReason::Signal(15).code(), 143);
        assert_eq!(ExitReason::Quit.code(), 130);
    }
}
