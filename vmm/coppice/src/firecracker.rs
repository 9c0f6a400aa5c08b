//! `coppice` under the name `firecracker`: Firecracker's command line and exit codes, for the programs that start that.

use std::ffi::OsString;
use std::path::Path;
use std::process::ExitCode;

use cli::{BAD_ARGUMENTS, FirecrackerArguments, FirecrackerRequest, RunOptions};
use config::LoggerConfig;
use control::logging::{Log, LogFilter, LogFormat};
use host::exit::{self, ExitReason, GuestEnd};
use machine::snapshot;

use crate::command_line::{fail_with, parse};
use crate::run;

/// The name.
const NAME: &str = "firecracker";
/// Firecracker's exit code after a hangup (`FcExitCode::SIGHUP`).
const HANGUP: u8 = 156;
/// The number of that signal.
const SIGHUP: u8 = 1;

/// Whether a command line is that of `firecracker`: by the name of the file by which the program was called.
pub fn is_called(words: &[OsString]) -> bool {
    let program = words.first().and_then(|word| Path::new(word).file_name());
    program.is_some_and(|name| name == NAME)
}

/// Carries out the command line of `firecracker`.
pub fn carry_out(words: Vec<OsString>) -> ExitCode {
    let arguments = match parse::<FirecrackerArguments>(words, BAD_ARGUMENTS) {
        Ok(arguments) => arguments,
        Err(code) => return code,
    };
    match arguments.into_request() {
        Ok(FirecrackerRequest::SnapshotVersion) => {
            print_version(snapshot::VERSION);
            ExitCode::SUCCESS
        }
        Ok(FirecrackerRequest::DescribeSnapshot(path)) => match snapshot::version_of(&path) {
            Ok(version) => {
                print_version(version);
                ExitCode::SUCCESS
            }
            Err(error) => fail_with(exit::FAILURE, &error),
        },
        Ok(FirecrackerRequest::Run { options, logger }) => run_guest(*options, &logger),
        Err(error) => fail_with(error.code(), &error),
    }
}

/// Clients take a version in three parts apart (Semantic Versioning). Coppice's has one.
fn print_version(version: u32) {
    println!("v{version}.0.0");
}

fn run_guest(options: RunOptions, logger: &LoggerConfig) -> ExitCode {
    let (log, subscriber) = Log::new(LogFilter::default(), LogFormat::default());
    if let Err(error) = tracing::subscriber::set_global_default(subscriber) {
        return fail_with(exit::FAILURE, &error);
    }
    if let Err(error) = log.configure(logger) {
        return fail_with(exit::FAILURE, &error);
    }
    match run::run(options, log) {
        Ok(reason) => ExitCode::from(code_of(&reason)),
        Err(error) => fail_with(exit::FAILURE, &error),
    }
}

/// Firecracker's exit code. A guest that has ended by itself is a success, in whichever way it did: Firecracker knows a
/// reset alone, and ends with 0.
fn code_of(reason: &ExitReason) -> u8 {
    match reason {
        ExitReason::Guest(
            GuestEnd::PowerOff | GuestEnd::Reset | GuestEnd::Panic | GuestEnd::TripleFault,
        ) => 0,
        ExitReason::Guest(GuestEnd::Failed(_)) => exit::FAILURE,
        ExitReason::Signal(SIGHUP) => HANGUP,
        ExitReason::Signal(_) | ExitReason::Quit => reason.code(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_is_that_of_the_file() {
        for (word, is_it) in [
            ("firecracker", true),
            ("/usr/bin/firecracker", true),
            ("./firecracker", true),
            ("coppice", false),
            ("/firecracker/coppice", false),
            ("firecracker-v1.17", false),
            ("", false),
        ] {
            assert_eq!(is_called(&[word.into()]), is_it, "{word}");
        }
        assert!(!is_called(&[]));
        assert!(!is_called(&["coppice".into(), "firecracker".into()]));
    }

    #[test]
    fn every_end_has_the_exit_code_of_firecracker() {
        for (reason, code) in [
            (ExitReason::Guest(GuestEnd::PowerOff), 0),
            (ExitReason::Guest(GuestEnd::Reset), 0),
            (ExitReason::Guest(GuestEnd::Panic), 0),
            (ExitReason::Guest(GuestEnd::TripleFault), 0),
            (ExitReason::Guest(GuestEnd::Failed("x".to_owned())), 1),
            (ExitReason::Signal(1), 156),
            (ExitReason::Signal(15), 143),
            (ExitReason::Quit, 130),
        ] {
            assert_eq!(code_of(&reason), code, "{reason:?}");
        }
    }
}
