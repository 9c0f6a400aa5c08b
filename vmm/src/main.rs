//! The `coppice` command.

use std::fmt::Display;
use std::process::ExitCode;

use clap::Parser;
use coppice::cli::{Cli, Command, RunArguments};
use coppice::logging::Log;
use coppice::{doctor, exit, run};

fn main() -> ExitCode {
    match Cli::parse().command {
        Command::Run(arguments) => run_guest(*arguments),
        Command::Doctor { json } => examine_host(json),
    }
}

fn fail(code: u8, error: impl Display) -> ExitCode {
    eprintln!("coppice: {error}");
    ExitCode::from(code)
}

fn run_guest(arguments: RunArguments) -> ExitCode {
    let (log, subscriber) = Log::new(
        arguments.log.clone().unwrap_or_default(),
        arguments.log_format,
    );
    if let Err(error) = tracing::subscriber::set_global_default(subscriber) {
        return fail(exit::FAILURE, error);
    }
    let options = match arguments.into_options() {
        Ok(options) => options,
        Err(error) => return fail(exit::USAGE, error),
    };
    match run::run(options, log) {
        Ok(reason) => ExitCode::from(&reason),
        Err(error) => fail(exit::FAILURE, error),
    }
}

fn examine_host(json: bool) -> ExitCode {
    let report = doctor::examine();
    if json {
        match serde_json::to_string_pretty(&report) {
            Ok(text) => println!("{text}"),
            Err(error) => return fail(exit::FAILURE, error),
        }
    } else {
        println!("{report}");
    }
    if report.can_run_guests() {
        ExitCode::SUCCESS
    } else {
        ExitCode::from(exit::FAILURE)
    }
}
