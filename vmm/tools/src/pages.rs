//! Man pages and completions, made from the description of a command line.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use clap::Command;
use clap_complete::Shell;
use clap_mangen::Man;

/// Why a page cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum PagesError {
    /// Standard output cannot be written to.
    #[error("the completions cannot be written")]
    Output(#[source] io::Error),
    /// A file cannot be written.
    #[error("{}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// The host's error.
        source: io::Error,
    },
}

/// Prints the completions of a shell.
///
/// # Errors
/// `Output`.
pub fn completions(command: &mut Command, shell: Shell) -> Result<(), PagesError> {
    let mut text = Vec::new();
    clap_complete::generate(shell, command, "coppice", &mut text);
    io::stdout().write_all(&text).map_err(PagesError::Output)
}

/// Writes `coppice.1`, `coppice-run.1` and so on.
///
/// # Errors
/// `File`.
pub fn man_pages(mut command: Command, folder: &Path) -> Result<(), PagesError> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        |source| PagesError::File { path, source }
    };
    fs::create_dir_all(folder).map_err(failed(folder))?;
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
