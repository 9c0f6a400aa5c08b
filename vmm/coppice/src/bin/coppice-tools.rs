//! `coppice-tools`: what `coppice` does beside running guests, in a program of its own.
//!
//! `coppice disk`, `bench`, `top`, `doctor`, `completions` and `man` execute it with their words. So the process of a
//! guest, of which a host has thousands, is linked with none of it.

use std::path::PathBuf;
use std::process::ExitCode;

use bench::{BenchCommand, DensityArguments, DensityTask};
use clap::{CommandFactory, Parser, Subcommand};
use coppice::command_line::{fail, fail_with, log_warnings, parse};
use host::exit;
use tools::disk_tool::{self, DiskCommand};
use tools::top::{self, TopArguments};
use tools::{doctor, pages};

/// A virtual machine monitor for many small guests.
#[derive(Debug, Parser)]
#[command(
    name = "coppice",
    bin_name = "coppice",
    version,
    propagate_version = true
)]
struct Tools {
    /// What to do.
    #[command(subcommand)]
    command: Tool,
}

#[derive(Debug, Subcommand)]
enum Tool {
    /// Make, examine and change virtual disks.
    #[command(subcommand, after_help = disk_tool::EXAMPLES)]
    Disk(DiskCommand),
    /// Measure what guests cost on this host.
    #[command(subcommand)]
    Bench(BenchCommand),
    /// Show all of this user's guests, with what each of them takes of the host.
    #[command(after_help = top::HELP)]
    Top(TopArguments),
    /// Say whether this host can run guests, and what to do where it cannot.
    ///
    /// Exits 0 if guests can run here, and else 1.
    Doctor {
        /// Write JSON.
        #[arg(long)]
        json: bool,
    },
    /// Print the completions of a shell.
    Completions {
        /// The shell.
        #[arg(value_enum)]
        shell: clap_complete::Shell,
    },
    /// Write the man pages into a folder.
    #[command(hide = true)]
    Man {
        /// The folder.
        folder: PathBuf,
    },
}

fn main() -> ExitCode {
    match parse::<Tools>(std::env::args_os().collect(), exit::USAGE) {
        Ok(tools) => carry_out(tools.command),
        Err(code) => code,
    }
}

fn carry_out(command: Tool) -> ExitCode {
    match command {
        Tool::Disk(command) => use_disk(&command),
        Tool::Bench(BenchCommand::Density(arguments)) => measure_density(*arguments),
        Tool::Top(arguments) => show_guests(&arguments.into_options()),
        Tool::Doctor { json } => examine_host(json),
        Tool::Completions { shell } => written(pages::completions(&mut whole_command(), shell)),
        Tool::Man { folder } => written(pages::man_pages(whole_command(), &folder)),
    }
}

/// The command line of `coppice` with those of the tools in their places.
fn whole_command() -> clap::Command {
    let tools = Tools::command();
    let tools: Vec<_> = tools.get_subcommands().cloned().collect();
    tools
        .into_iter()
        .fold(cli::Cli::command(), |command, tool| {
            let name = tool.get_name().to_owned();
            command.mut_subcommand(name, |_| tool)
        })
}

fn written(done: Result<(), pages::PagesError>) -> ExitCode {
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail_with(exit::FAILURE, &error),
    }
}

fn use_disk(command: &DiskCommand) -> ExitCode {
    if let Err(code) = log_warnings() {
        return code;
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
    if let Err(code) = log_warnings() {
        return code;
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

#[cfg(test)]
mod tests {
    use std::fmt::Write as _;

    use expect_test::expect_file;

    use super::*;

    /// What `--help` says, for each command below one another.
    fn reference(command: &mut clap::Command, page: &mut String) {
        let name = command.get_bin_name().unwrap_or("coppice").to_owned();
        let help = command.render_long_help().to_string();
        let lines = help.trim_end().lines().map(str::trim_end);
        let help = lines.collect::<Vec<_>>().join("\n");
        writeln!(page, "\n## {name}\n\n```text\n{help}\n```").unwrap();
        for sub in command.get_subcommands_mut() {
            if !sub.is_hide_set() && sub.get_name() != "help" {
                reference(sub, page);
            }
        }
    }

    #[test]
    fn the_command_line_reference_is_current() {
        let mut page = "# Command line\n\nWhat `--help` says of each command, written here by `make reference`; do not edit.\n".to_owned();
        let mut command = whole_command();
        command.build();
        reference(&mut command, &mut page);
        let mut firecracker = cli::FirecrackerArguments::command();
        firecracker.build();
        reference(&mut firecracker.bin_name("firecracker"), &mut page);
        expect_file!["../../../../docs/reference/command-line.md"].assert_eq(&page);
    }

    #[test]
    fn every_tool_has_its_place_in_the_command_line() {
        let command = whole_command();
        for tool in Tools::command().get_subcommands() {
            let placed = command.find_subcommand(tool.get_name());
            let placed = placed.unwrap_or_else(|| panic!("coppice has no {}", tool.get_name()));
            assert_eq!(
                placed.get_about().map(ToString::to_string),
                tool.get_about().map(ToString::to_string)
            );
            assert_eq!(placed.get_arguments().count(), tool.get_arguments().count());
        }
    }

    #[test]
    fn every_command_has_a_page() {
        let folder = tempfile::tempdir().unwrap();
        pages::man_pages(whole_command(), folder.path()).unwrap();
        for (name, word) in [
            ("coppice", "bench"),
            ("coppice-run", "kernel"),
            ("coppice-serve", "memory\\-ratio"),
            ("coppice-vm-create", "on\\-failure"),
            ("coppice-disk-create", "size"),
        ] {
            let page = std::fs::read_to_string(folder.path().join(format!("{name}.1"))).unwrap();
            assert!(
                page.contains(".TH") && page.contains(word),
                "{name}: {page:.300}"
            );
        }
        assert!(!folder.path().join("coppice-man.1").exists());
    }
}
