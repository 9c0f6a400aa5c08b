//! The `coppice` command.

use std::error::Error;
use std::ffi::OsString;
use std::fmt::Display;
use std::io::{self, Write};
use std::process::ExitCode;

use clap::Parser;
use coppice::cli::{
    BenchCommand, Cli, Command, DensityArguments, DensityTask, ImageCommand, RunArguments,
    ServeArguments, VmArguments, VmCommand,
};
use coppice::logging::{Log, LogFilter, LogFormat};
use coppice::reference::{self, WarmRequest, Warmed};
use coppice::report::chain;
use coppice::{bench, cli, disk_tool, doctor, exit, heap, remote, run, serve, top, zygote};

fn main() -> ExitCode {
    heap::share();
    match parse(std::env::args_os().collect()) {
        Ok(command) => carry_out(command),
        Err(code) => code,
    }
}

fn carry_out(command: Command) -> ExitCode {
    match command {
        Command::Run(arguments) => run_guest(*arguments),
        Command::Serve(arguments) => serve_guests(*arguments),
        Command::Zygote { .. } => match zygote::serve() {
            Ok(None) => ExitCode::SUCCESS,
            Ok(Some(spawned)) => {
                match parse(spawned.args.into_iter().map(OsString::from).collect()) {
                    Ok(command) => carry_out(command),
                    Err(code) => code,
                }
            }
            Err(error) => fail(exit::FAILURE, format_args!("zygote: {}", chain(&error))),
        },
        Command::Vm(arguments) => use_guests(*arguments),
        Command::Console { id, connection } => outcome(remote::console(&connection.socket(), &id)),
        Command::Completions { shell } => pages(cli::completions(shell)),
        Command::Man { folder } => pages(cli::man_pages(&folder)),
        Command::Disk(command) => use_disk(&command),
        Command::Image(command) => make_image(command),
        Command::Bench(BenchCommand::Density(arguments)) => measure_density(*arguments),
        Command::Top(arguments) => show_guests(&arguments.into_options()),
        Command::Doctor { json } => examine_host(json),
    }
}

/// Bytes of the parser's stack: enough for a build without optimization, and too few for the host to make a huge page of them.
const PARSER_STACK: usize = 1 << 20;

/// Parses the command line on a stack that goes with its thread: it is deep, and would stay with a guest's process for ever.
fn parse(args: Vec<OsString>) -> Result<Command, ExitCode> {
    let parsed = || {
        let parser = std::thread::Builder::new().stack_size(PARSER_STACK);
        let parser = parser.spawn(|| Cli::try_parse_from(args))?;
        let panicked = |_| io::Error::other("it has panicked");
        parser.join().map_err(panicked)
    };
    match parsed() {
        Ok(Ok(cli)) => Ok(cli.command),
        Ok(Err(error)) => Err(told_by_parser(&error)),
        Err(error) => Err(fail(
            exit::FAILURE,
            format_args!("parser of arguments: {}", chain(&error)),
        )),
    }
}

fn fail(code: u8, text: impl Display) -> ExitCode {
    // Standard error may be a file on a full disk. The exit code says what it can all the same.
    let _ = writeln!(io::stderr(), "coppice: {text}");
    ExitCode::from(code)
}

/// Shows an error with its sources, and gives the exit code.
fn fail_with(code: u8, error: &dyn Error) -> ExitCode {
    fail(code, chain(error))
}

/// Help and version go to standard output; what is wrong is said in one line like everything else.
fn told_by_parser(error: &clap::Error) -> ExitCode {
    if !error.use_stderr() {
        return match error.print() {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => fail_with(exit::FAILURE, &error),
        };
    }
    let text = error.to_string();
    let said = text
        .lines()
        .map(str::trim)
        .take_while(|line| !line.starts_with("Usage:") && !line.starts_with("For more"));
    let said = said
        .filter(|line| !line.is_empty())
        .collect::<Vec<_>>()
        .join(" ");
    fail(
        exit::USAGE,
        format_args!(
            "{}; see --help",
            said.strip_prefix("error: ").unwrap_or(&said)
        ),
    )
}

fn run_guest(arguments: RunArguments) -> ExitCode {
    let (log, subscriber) = Log::new(
        arguments.log.clone().unwrap_or_default(),
        arguments.log_format,
    );
    if let Err(error) = tracing::subscriber::set_global_default(subscriber) {
        return fail_with(exit::FAILURE, &error);
    }
    let end_file = arguments.end_file.clone();
    let options = match arguments.into_options() {
        Ok(options) => options,
        Err(error) => {
            let end = exit::EndReport {
                code: Some(exit::USAGE),
                ..exit::EndReport::failed(&error)
            };
            if let Some(Err(error)) = end_file.map(|path| end.write(&path)) {
                tracing::error!(error = %chain(&error), "why the guest ended cannot be written");
            }
            return fail_with(exit::USAGE, &error);
        }
    };
    match run::run(options, log) {
        Ok(reason) => ExitCode::from(&reason),
        Err(error) => fail_with(exit::FAILURE, &error),
    }
}

fn serve_guests(arguments: ServeArguments) -> ExitCode {
    let (_, subscriber) = Log::new(arguments.log.clone(), arguments.log_format);
    if let Err(error) = tracing::subscriber::set_global_default(subscriber) {
        return fail_with(exit::FAILURE, &error);
    }
    let options = match arguments.into_options() {
        Ok(options) => options,
        Err(error) => return fail_with(exit::FAILURE, &error),
    };
    match serve::run(options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail_with(exit::FAILURE, &error),
    }
}

fn outcome(done: Result<(), remote::RemoteError>) -> ExitCode {
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail_with(exit::FAILURE, &error),
    }
}

fn use_guests(arguments: VmArguments) -> ExitCode {
    let (socket, json) = (arguments.connection.socket(), arguments.connection.json);
    match arguments.command {
        VmCommand::Create(create) => match create.into_body() {
            Ok(body) => outcome(remote::create(&socket, json, &body)),
            Err(error) => fail_with(exit::USAGE, &error),
        },
        VmCommand::Existing(command) => outcome(remote::run(&socket, json, command)),
    }
}

fn pages(done: Result<(), cli::PagesError>) -> ExitCode {
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail_with(exit::FAILURE, &error),
    }
}

fn use_disk(command: &disk_tool::DiskCommand) -> ExitCode {
    let (_, subscriber) = Log::new(LogFilter::default(), LogFormat::default());
    if let Err(error) = tracing::subscriber::set_global_default(subscriber) {
        return fail_with(exit::FAILURE, &error);
    }
    match disk_tool::run(command) {
        Ok(code) => ExitCode::from(code),
        Err(disk_tool::ToolError::Cancelled(signal)) => fail(
            exit::SIGNAL_BASE + signal,
            "interrupted; no file was left half-made",
        ),
        Err(error) => fail_with(exit::FAILURE, &error),
    }
}

fn measure_density(arguments: DensityArguments) -> ExitCode {
    let (_, subscriber) = Log::new(LogFilter::default(), LogFormat::default());
    if let Err(error) = tracing::subscriber::set_global_default(subscriber) {
        return fail_with(exit::FAILURE, &error);
    }
    let json = arguments.json();
    let measured = match arguments.into_task() {
        DensityTask::Measure(options) => {
            bench::density(&options).map(|report| shown(&report, json))
        }
        DensityTask::Explain(options) => bench::explanations(&options).map(|explanations| {
            let text = explanations.iter().map(ToString::to_string);
            let text = text.collect::<Vec<_>>().join("\n\n");
            if json {
                as_json(&explanations)
            } else {
                Ok(text)
            }
        }),
        DensityTask::Plot { results, out } => {
            bench::plot(&results, &out).map(|report| shown(&report, json))
        }
    };
    match measured {
        Ok(Ok(text)) => {
            println!("{text}");
            ExitCode::SUCCESS
        }
        Ok(Err(error)) => fail_with(exit::FAILURE, &error),
        Err(bench::BenchError::Cancelled(signal)) => fail(
            exit::SIGNAL_BASE + signal,
            "interrupted; all guests are stopped",
        ),
        Err(error) => fail_with(exit::FAILURE, &error),
    }
}

fn as_json(value: &impl serde::Serialize) -> serde_json::Result<String> {
    serde_json::to_string_pretty(value)
}

fn shown(report: &bench::Report, json: bool) -> serde_json::Result<String> {
    if json {
        as_json(report)
    } else {
        Ok(report.to_string())
    }
}

fn show_guests(options: &top::Options) -> ExitCode {
    match top::run(options) {
        Ok(None) => ExitCode::SUCCESS,
        Ok(Some(signal)) => ExitCode::from(exit::SIGNAL_BASE + signal),
        Err(error) => fail_with(exit::FAILURE, &error),
    }
}

fn make_image(command: ImageCommand) -> ExitCode {
    let (_, subscriber) = Log::new(LogFilter::default(), LogFormat::default());
    if let Err(error) = tracing::subscriber::set_global_default(subscriber) {
        return fail_with(exit::FAILURE, &error);
    }
    let warmed = match command {
        ImageCommand::Warm {
            kernel,
            cmdline,
            cpus,
            mem,
            share_domain,
        } => reference::warm(&WarmRequest {
            kernel,
            cmdline,
            size: reference::Size {
                vcpus: cpus,
                mem_mib: mem.0,
            },
            domain: share_domain,
        })
        .map(Some),
        ImageCommand::WarmWhenTold => reference::warm_when_told(),
    };
    match warmed {
        Ok(Some(Warmed::Kept(path))) => println!("{} is there", path.display()),
        Ok(Some(Warmed::Made { path, pages })) => println!("{}: {pages} pages", path.display()),
        Ok(None) => {}
        Err(error) => return fail_with(exit::FAILURE, &error),
    }
    ExitCode::SUCCESS
}

fn examine_host(json: bool) -> ExitCode {
    let report = doctor::examine();
    if json {
        match serde_json::to_string_pretty(&report) {
            Ok(text) => println!("{text}"),
            Err(error) => return fail_with(exit::FAILURE, &error),
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
