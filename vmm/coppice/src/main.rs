//! The `coppice` command.

use std::env;
use std::error::Error;
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{self, ExitCode};

use cli::{
    Cli, Command, ImageCommand, RunArguments, ServeArguments, ServeOptionsError, VmArguments,
    VmCommand,
};
use control::logging::Log;
use coppice::command_line::{fail, fail_with, log_warnings, parse};
use coppice::warm::{self, WarmOutcome};
use coppice::{firecracker, gate, run};
use daemon::{remote, serve, zygote};
use host::report::chain;
use host::{exit, heap, program};
use jail::{Confinement, SeccompMode, reader};
use machine::reference::{Size, WarmRequest};

fn main() -> ExitCode {
    heap::share();
    let words: Vec<_> = env::args_os().collect();
    if firecracker::is_called(&words) {
        firecracker::carry_out(words)
    } else {
        begin(words)
    }
}

fn begin(words: Vec<OsString>) -> ExitCode {
    match parse::<Cli>(words, exit::USAGE) {
        Ok(cli) => carry_out(cli.command),
        Err(code) => code,
    }
}

fn carry_out(command: Command) -> ExitCode {
    match command {
        Command::Run(arguments) => run_guest(*arguments),
        Command::Serve(arguments) => serve_guests(*arguments),
        Command::Zygote { .. } => match zygote::serve() {
            Ok(None) => ExitCode::SUCCESS,
            Ok(Some(spawned)) => begin(spawned.args.into_iter().map(OsString::from).collect()),
            Err(error) => fail(exit::FAILURE, format_args!("zygote: {}", chain(&error))),
        },
        Command::DiskParent { folder, uid, place } => {
            match disk_parent(&folder, uid, place.as_deref()) {
                Ok(()) => ExitCode::SUCCESS,
                Err(error) => fail(exit::FAILURE, format_args!("disk: {}", chain(&error))),
            }
        }
        Command::Vm(arguments) => use_guests(*arguments),
        Command::Console { id, connection } => outcome(remote::console(&connection.socket(), &id)),
        Command::Image(command) => make_image(command),
        Command::Disk(_)
        | Command::Bench(_)
        | Command::Top(_)
        | Command::Doctor(_)
        | Command::Completions(_)
        | Command::Man(_) => execute_tools(),
    }
}

/// Answers which parent the disk names that is standard input.
fn disk_parent(folder: &Path, uid: Option<u32>, place: Option<&Path>) -> io::Result<()> {
    let disk = io::stdin().as_fd().try_clone_to_owned()?;
    let answer = reader::answer(File::from(disk), folder, (uid, uid), place)?;
    io::stdout().write_all(&answer)?;
    io::stdout().flush()
}

/// Becomes the program that has the tools, with the words that this one was given.
fn execute_tools() -> ExitCode {
    let tools = match program::beside_this(program::TOOLS) {
        Ok(tools) => tools,
        Err(error) => {
            return fail(
                exit::FAILURE,
                format_args!("{}: {}", program::TOOLS, chain(&error)),
            );
        }
    };
    let error = process::Command::new(&tools)
        .args(env::args_os().skip(1))
        .exec();
    let hint = match error.kind() {
        io::ErrorKind::NotFound => ": it is installed beside coppice, and has to be copied with it",
        _ => "",
    };
    fail(
        exit::FAILURE,
        format_args!("{}: {}{hint}", tools.display(), chain(&error)),
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
    let options = if arguments.held {
        match gate::wait() {
            Ok((spec, taps)) => arguments.into_launched(spec, taps),
            Err(error) if error.is_abandonment() => return fail_with(exit::FAILURE, &error),
            Err(error) => return refuse(end_file.as_deref(), &error),
        }
    } else {
        arguments.into_options()
    };
    match options.map(|options| run::run(options, log)) {
        Ok(Ok(reason)) => ExitCode::from(&reason),
        Ok(Err(error)) => fail_with(exit::FAILURE, &error),
        Err(error) => refuse(end_file.as_deref(), &error),
    }
}

/// Ends a process that was not asked for a guest in the right way, and says so in its end file, too.
fn refuse(end_file: Option<&Path>, error: &dyn Error) -> ExitCode {
    let end = exit::EndReport {
        code: Some(exit::USAGE),
        ..exit::EndReport::failed(error)
    };
    if let Some(Err(error)) = end_file.map(|path| end.write(path)) {
        tracing::error!(error = %chain(&error), "why the guest ended cannot be written");
    }
    fail_with(exit::USAGE, error)
}

fn serve_guests(arguments: ServeArguments) -> ExitCode {
    let (_, subscriber) = Log::new(arguments.log.clone(), arguments.log_format);
    if let Err(error) = tracing::subscriber::set_global_default(subscriber) {
        return fail_with(exit::FAILURE, &error);
    }
    let options = match arguments.into_options() {
        Ok(options) => options,
        Err(error @ ServeOptionsError::Networks(_)) => return fail_with(exit::USAGE, &error),
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

fn make_image(command: ImageCommand) -> ExitCode {
    if let Err(code) = log_warnings() {
        return code;
    }
    let warmed = match command {
        ImageCommand::Warm(arguments) => {
            let size = Size {
                vcpus: arguments.cpus,
                mem_mib: arguments.mem.0,
            };
            let confinement = Confinement {
                jail: arguments.jail.map(Into::into),
                seccomp: SeccompMode::Kill,
            };
            let (kernel, domain) = (arguments.kernel, arguments.share_domain);
            let request = WarmRequest::new(kernel, &arguments.cmdline, size, domain);
            warm::warm(&request, &confinement).map(Some)
        }
        ImageCommand::WarmWhenTold => warm::warm_when_told(),
        ImageCommand::WarmingGuest => {
            return match warm::boot_and_tell() {
                Ok(()) => ExitCode::SUCCESS,
                Err(error) => fail_with(exit::FAILURE, &error),
            };
        }
    };
    match warmed {
        Ok(Some(WarmOutcome::Kept(path))) => println!("{} is there", path.display()),
        Ok(Some(WarmOutcome::Made { path, pages })) => {
            println!("{}: {pages} pages", path.display());
        }
        Ok(None) => {}
        Err(error) => return fail_with(exit::FAILURE, &error),
    }
    ExitCode::SUCCESS
}
