//! Chains of disks: snapshots, other parents, and commits.

use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::json;
use storage::OpenOptions;
use storage::vhdx::{ChildOptions, Vhdx, children_in};

use super::ending::{Form, form};
use super::error::ToolError;
use super::outcome::{Outcome, Output};
use super::size::human;
use super::watch::Watch;

/// `coppice disk commit`.
#[derive(Debug, Args)]
pub struct Commit {
    /// The child.
    file: PathBuf,
    /// Remove the child when it is merged.
    #[arg(long)]
    delete: bool,
    /// Go on although the parent has other children, which cannot be used afterwards.
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    pub(super) output: Output,
}

impl Commit {
    pub(super) fn run(&self, watch: &Watch) -> Result<Outcome, ToolError> {
        let info = Vhdx::info(&self.file)?;
        let parent = info.parent_path.clone().unwrap_or_default();
        let siblings = self.siblings(&parent)?;
        if !siblings.is_empty() && !self.force {
            let names: Vec<_> = siblings
                .iter()
                .map(|path| path.display().to_string())
                .collect();
            return Err(ToolError::Refused(format!(
                "{} is the parent of {} too, which could not be used any more: --force to go on all the same",
                parent.display(),
                names.join(", ")
            )));
        }
        let merged = Vhdx::commit(&self.file, &OpenOptions::default(), watch)
            .map_err(ToolError::chain(&self.file, watch))?;
        if self.delete {
            std::fs::remove_file(&self.file)
                .map_err(ToolError::io(format!("remove {}", self.file.display())))?;
        }
        Ok(Outcome::new(
            json!({
                "file": self.file,
                "parent": parent,
                "bytes_copied": merged.copied,
                "bytes_zeroed": merged.cleared,
                "deleted": self.delete,
                "orphaned": siblings,
            }),
            format!(
                "merged {} into {}: {} copied, {} zeroed",
                self.file.display(),
                parent.display(),
                human(merged.copied),
                human(merged.cleared)
            ),
        ))
    }

    /// The other children of the parent that are in its folder or in the child's.
    fn siblings(&self, parent: &Path) -> Result<Vec<PathBuf>, ToolError> {
        let mut siblings = Vec::new();
        for file in [parent, &self.file] {
            let folder = file.parent().unwrap_or(Path::new(""));
            let folder = std::path::absolute(if folder.as_os_str().is_empty() {
                Path::new(".")
            } else {
                folder
            })
            .map_err(ToolError::io("find the folder of the disk"))?;
            let found = children_in(&folder, parent, Some(&self.file)).map_err(ToolError::io(
                format!("look for other children in {}", folder.display()),
            ))?;
            siblings.extend(found);
        }
        siblings.sort_unstable();
        siblings.dedup();
        Ok(siblings)
    }
}

/// `coppice disk rebase`.
#[derive(Debug, Args)]
pub struct Rebase {
    /// The child.
    file: PathBuf,
    /// The parent.
    #[arg(long, value_name = "FILE")]
    parent: PathBuf,
    /// Take the parent although its identifier is not the one that the child was made on: its content has to be as it
    /// was then, which nobody checks.
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    pub(super) output: Output,
}

impl Rebase {
    pub(super) fn run(&self, watch: &Watch) -> Result<Outcome, ToolError> {
        Vhdx::rebase(
            &self.file,
            &self.parent,
            self.force,
            &OpenOptions::default(),
        )
        .map_err(ToolError::chain(&self.file, watch))?;
        let info = Vhdx::info(&self.file)?;
        Ok(Outcome::new(
            super::examine::layer(&info),
            format!(
                "{} stands on {} now",
                self.file.display(),
                self.parent.display()
            ),
        ))
    }
}

/// `coppice disk snapshot`.
#[derive(Debug, Args)]
pub struct Snapshot {
    /// The disk, which is not written from then on.
    file: PathBuf,
    /// The new file, in which the disk goes on.
    new: PathBuf,
    #[command(flatten)]
    pub(super) output: Output,
}

impl Snapshot {
    pub(super) fn run(&self) -> Result<Outcome, ToolError> {
        form(&self.new, Some(Form::Vhdx))?;
        let options = ChildOptions {
            same_disk: true,
            ..ChildOptions::default()
        };
        Vhdx::create_child(&self.new, &self.file, &options)?;
        let frozen = Vhdx::info(&self.file)?;
        let guid = frozen.identifiers.data_write_guid.to_string();
        Ok(Outcome::new(
            json!({"file": self.file, "new": self.new, "data_write_guid": guid}),
            format!(
                "go on with {}; what changes from now on: coppice disk diff --since {guid} {}",
                self.new.display(),
                self.new.display()
            ),
        ))
    }
}
