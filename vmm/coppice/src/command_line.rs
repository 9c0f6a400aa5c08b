//! How the programs of Coppice read their command line, and end where they cannot go on.

use std::error::Error;
use std::ffi::OsString;
use std::fmt::Display;
use std::io::{self, Write};
use std::process::ExitCode;

use clap::Parser;
use control::logging::{Log, LogFilter, LogFormat};
use host::exit;
use host::printable::printable_lines;
use host::report::chain;

/// Bytes of the parser's stack: enough for a build without optimization, and too few for the host to make a huge page
/// of them.
const PARSER_STACK: usize = 1 << 20;

/// Parses the command line on a stack that goes with its thread: it is deep, and would stay with a guest's process for
/// ever.
///
/// # Errors
/// What is wrong has been said then, and this is the code to end with: `usage` where the arguments are wrong.
pub fn parse<C: Parser + Send + 'static>(args: Vec<OsString>, usage: u8) -> Result<C, ExitCode> {
    let parsed = || {
        let parser = std::thread::Builder::new().stack_size(PARSER_STACK);
        let parser = parser.spawn(|| C::try_parse_from(args))?;
        let panicked = |_| io::Error::other("it has panicked");
        parser.join().map_err(panicked)
    };
    match parsed() {
        Ok(Ok(cli)) => Ok(cli),
        Ok(Err(error)) => Err(parser_error(&error, usage)),
        Err(error) => Err(fail(
            exit::FAILURE,
            format_args!("parser of arguments: {}", chain(&error)),
        )),
    }
}

/// Says on standard error what is wrong, and gives the code to end with.
pub fn fail(code: u8, text: impl Display) -> ExitCode {
    // What others have written may be in it: names of files, or the reason of a guest's process.
    let text = text.to_string();
    // Standard error may be a file on a full disk. The exit code says what it can all the same.
    let _ = writeln!(io::stderr(), "coppice: {}", printable_lines(&text));
    ExitCode::from(code)
}

/// Shows an error with its sources on standard error, and gives the code to end with.
pub fn fail_with(code: u8, error: &dyn Error) -> ExitCode {
    fail(code, chain(error))
}

/// Help and version go to standard output; an error is printed in one line, as every other one.
fn parser_error(error: &clap::Error, usage: u8) -> ExitCode {
    if !error.use_stderr() {
        return match error.print() {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => fail_with(exit::FAILURE, &error),
        };
    }
    let text = error.render().to_string();
    let said = text
        .lines()
        .map(str::trim)
        .take_while(|line| !line.starts_with("Usage:") && !line.starts_with("For more"));
    let said = said
        .filter(|line| !line.is_empty())
        .collect::<Vec<_>>()
        .join(" ");
    fail(
        usage,
        format_args!(
            "{}; see --help",
            said.strip_prefix("error: ").unwrap_or(&said)
        ),
    )
}

/// Logs what may be wrong to standard error, for a program that has no options for its log.
///
/// # Errors
/// Where something else logs already: the code to end with.
pub fn log_warnings() -> Result<(), ExitCode> {
    let (_, subscriber) = Log::new(LogFilter::default(), LogFormat::default());
    tracing::subscriber::set_global_default(subscriber)
        .map_err(|error| fail_with(exit::FAILURE, &error))
}
