//! Comments that are too wide to be read beside the code.

use std::ffi::OsStr;
use std::io;
use std::path::{Path, PathBuf};

/// The most columns of a line that is a comment. `rustfmt` keeps code to 100, and leaves comments as they are.
pub const MAX_COLUMNS: usize = 120;

/// A file or folder of the workspace that cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("cannot read {}", path.display())]
pub struct ReadError {
    path: PathBuf,
    source: io::Error,
}

/// The numbers of the lines that are comments and have more than [`MAX_COLUMNS`] columns; a character is a column.
///
/// A comment behind code is not looked at: `rustfmt` breaks such a line where it can.
pub fn wide_lines(text: &str) -> Vec<usize> {
    (1..)
        .zip(text.lines())
        .filter(|(_, line)| line.trim_start().starts_with("//"))
        .filter(|(_, line)| line.chars().count() > MAX_COLUMNS)
        .map(|(number, _)| number)
        .collect()
}

/// Finds the wide comments in all Rust files below a folder, as the file and the number of the line.
///
/// Folders named `target` and those whose names begin with a dot are left out: their files are none of the workspace.
///
/// # Errors
/// Where a folder or a file cannot be read, or a file is not UTF-8.
pub fn find(folder: &Path) -> Result<Vec<(PathBuf, usize)>, ReadError> {
    let mut found = Vec::new();
    for file in rust_files(folder)? {
        let text = std::fs::read_to_string(&file).map_err(failed(&file))?;
        let lines = wide_lines(&text).into_iter();
        found.extend(lines.map(|number| (file.clone(), number)));
    }
    found.sort();
    Ok(found)
}

fn rust_files(folder: &Path) -> Result<Vec<PathBuf>, ReadError> {
    let mut files = Vec::new();
    let mut waiting = vec![folder.to_owned()];
    while let Some(folder) = waiting.pop() {
        for entry in folder.read_dir().map_err(failed(&folder))? {
            let entry = entry.map_err(failed(&folder))?;
            let path = entry.path();
            // A symbolic link is neither: what it leads to lies elsewhere in the workspace, or outside.
            let kind = entry.file_type().map_err(failed(&path))?;
            if kind.is_dir() && !is_left_out(&entry.file_name()) {
                waiting.push(path);
            } else if kind.is_file() && path.extension() == Some(OsStr::new("rs")) {
                files.push(path);
            }
        }
    }
    Ok(files)
}

fn is_left_out(folder: &OsStr) -> bool {
    folder == "target" || folder.as_encoded_bytes().starts_with(b".")
}

fn failed(path: &Path) -> impl FnOnce(io::Error) -> ReadError {
    move |source| ReadError {
        path: path.to_owned(),
        source,
    }
}
