//! What a disk is taken for, and which other files are opened with it.

use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use storage::foreign::SourceFormat;
use storage::{Format, OpenError, OpenOptions, ParentRefusal, Parents, Refusal};

use super::error::ToolError;
use host::report::chain;

/// A format that is read as it is.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(super) enum Named {
    Raw,
    Vhdx,
}

impl From<Named> for Format {
    fn from(named: Named) -> Self {
        match named {
            Named::Raw => Self::Raw,
            Named::Vhdx => Self::Vhdx,
        }
    }
}

/// The options of commands that look at a disk.
#[derive(Debug, Args)]
pub(super) struct FormatArgs {
    /// Format of the file; found by its signature if not given, or vhdx with --backing. Name it for a raw disk that a
    /// guest could write.
    #[arg(long, value_enum, value_name = "FORMAT")]
    format: Option<Named>,
    /// Open the parents that a VHDX names too, in its folder or below.
    #[arg(long)]
    backing: bool,
    /// Open parents in this folder or below.
    #[arg(long, value_name = "DIR", requires = "backing")]
    backing_dir: Option<PathBuf>,
}

/// The folder of a file.
fn folder(file: &Path) -> PathBuf {
    file.parent()
        .filter(|folder| !folder.as_os_str().is_empty())
        .unwrap_or(Path::new("."))
        .to_owned()
}

impl FormatArgs {
    /// The format, where one was given. Whoever asks for parents has said that the file is a VHDX.
    pub(super) fn named(&self) -> Option<Format> {
        match self.format {
            Some(named) => Some(named.into()),
            None => self.backing.then_some(Format::Vhdx),
        }
    }

    /// Whether a file on which `file` stands may be opened.
    pub(super) fn allows(&self, file: &Path, parent: &Path) -> bool {
        match self.options(file).parents {
            Parents::Anywhere => true,
            Parents::Within(folder) => {
                let paths = folder.canonicalize().and_then(|folder| {
                    let parent = parent.canonicalize()?;
                    Ok(parent.starts_with(folder))
                });
                paths.unwrap_or(false)
            }
            Parents::Nowhere => false,
        }
    }

    /// What `file` is.
    pub(super) fn of(&self, file: &Path) -> Result<SourceFormat, OpenError> {
        match self.named() {
            Some(Format::Raw) => Ok(SourceFormat::Raw),
            Some(Format::Vhdx) => Ok(SourceFormat::Vhdx),
            None => storage::detect(file),
        }
    }

    /// How `file` is opened for reading. A format that was guessed is followed nowhere: a guest can write a VHDX header
    /// that names a parent into its raw disk.
    pub(super) fn options(&self, file: &Path) -> OpenOptions {
        self.options_as(file, self.named())
    }

    /// As [`FormatArgs::options`], for a file of another format.
    pub(super) fn options_as(&self, file: &Path, format: Option<Format>) -> OpenOptions {
        let parents = match (&self.backing_dir, self.backing && format.is_some()) {
            (_, false) => Parents::Nowhere,
            (Some(folder), true) => Parents::Within(folder.clone()),
            (None, true) => Parents::Within(folder(file)),
        };
        OpenOptions {
            format,
            parents,
            ..OpenOptions::read_only()
        }
    }
}

/// Why a disk cannot be opened; where that is a parent that may not be, with the way to be allowed it.
pub(super) fn with_hint(error: OpenError) -> ToolError {
    let hint = match error.reason() {
        Refusal::Parent(ParentRefusal::Forbidden { allowed: None, .. }) => {
            "if no guest wrote the file as a raw disk, --backing opens it"
        }
        Refusal::Parent(ParentRefusal::Forbidden {
            allowed: Some(_), ..
        }) => "--backing-dir names another folder",
        _ => return error.into(),
    };
    ToolError::Refused(format!("{}; {hint}", chain(&error)))
}
