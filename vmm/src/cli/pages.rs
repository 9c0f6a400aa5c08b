//! Man pages and completions, made from the command line's own description.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use clap::{Command, CommandFactory};
use clap_complete::Shell;
use clap_mangen::Man;

use super::Cli;

/// Why a page is not there.
#[derive(Debug, thiserror::Error)]
pub enum PagesError {
    /// Standard output.
    #[error("the completions cannot be written: {0}")]
    Output(io::Error),
    /// A file.
    #[error("{}: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
}

/// Prints the completions of a shell.
///
/// # Errors
/// `Output`.
pub fn completions(shell: Shell) -> Result<(), PagesError> {
    let mut text = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "coppice", &mut text);
    io::stdout().write_all(&text).map_err(PagesError::Output)
}

/// Writes `coppice.1`, `coppice-run.1` and so on.
///
/// # Errors
/// `File`.
pub fn man_pages(folder: &Path) -> Result<(), PagesError> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        |source| PagesError::File { path, source }
    };
    fs::create_dir_all(folder).map_err(failed(folder))?;
    let mut command = Cli::command();
    command.build();
    write_pages(&command, "coppice", &mut |name, page| {
        let path = folder.join(format!("{name}.1"));
        fs::write(&path, page).map_err(failed(&path))
    })
}

fn write_pages(
    command: &Command,
    name: &str,
    write: &mut impl FnMut(&str, &[u8]) -> Result<(), PagesError>,
) -> Result<(), PagesError> {
    let mut page = Vec::new();
    // Writing to memory does not fail.
    Man::new(command.clone())
        .render(&mut page)
        .map_err(PagesError::Output)?;
    write(name, &page)?;
    let visible = command
        .get_subcommands()
        .filter(|sub| !sub.is_hide_set() && sub.get_name() != "help");
    for sub in visible {
        write_pages(sub, &format!("{name}-{}", sub.get_name()), write)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fmt::Write as _;

    use expect_test::expect_file;

    use super::*;

    /// What `--help` says, for each command below one another.
    fn reference(command: &mut Command, page: &mut String) {
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
        let mut command = Cli::command();
        command.build();
        reference(&mut command, &mut page);
        expect_file!["../../../docs/reference/command-line.md"].assert_eq(&page);
    }

    #[test]
    fn every_command_has_a_page() {
        let folder = tempfile::tempdir().unwrap();
        man_pages(folder.path()).unwrap();
        for (name, word) in [
            ("coppice", "bench"),
            ("coppice-run", "kernel"),
            ("coppice-serve", "memory\\-ratio"),
            ("coppice-vm-create", "on\\-failure"),
            ("coppice-disk-create", "size"),
        ] {
            let page = fs::read_to_string(folder.path().join(format!("{name}.1"))).unwrap();
            assert!(
                page.contains(".TH") && page.contains(word),
                "{name}: {page:.300}"
            );
        }
        assert!(!folder.path().join("coppice-man.1").exists());
    }
}
