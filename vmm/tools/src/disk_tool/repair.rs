//! Repairs damaged files, and undoes repairs.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::json;
use storage::ByteRange;
use storage::vhdx::Vhdx;

use super::error::ToolError;
use super::examine::{is_raw, report};
use super::lost::{lost_json, lost_text, total};
use super::outcome::{LOST, Outcome, Output};
use super::size::human;
use super::watch::Watch;

/// The most names that are tried for a backup.
const MOST_BACKUPS: u32 = 100;

/// `coppice disk repair`.
#[derive(Debug, Args)]
pub struct Repair {
    /// The file.
    file: PathBuf,
    /// Keep the entries of blocks that are given up in this file [default: the name of the disk and .bat-backup].
    #[arg(long, value_name = "FILE", num_args = 0..=1, require_equals = true)]
    #[allow(
        clippy::option_option,
        reason = "clap's form of an option whose value may be left out"
    )]
    backup: Option<Option<PathBuf>>,
    /// Keep nothing: the repair cannot be undone.
    #[arg(long, conflicts_with_all = ["backup", "undo"])]
    no_backup: bool,
    /// Undo a repair: put the entries back that are in this backup. The file must not have been written since; the end
    /// of it that was missing may have been appended.
    #[arg(long, value_name = "BACKUP", conflicts_with = "backup")]
    undo: Option<PathBuf>,
    #[command(flatten)]
    pub(super) output: Output,
}

/// A name for the backup of a disk's entries that no file has.
fn free_name(file: &Path) -> PathBuf {
    let name = |number| {
        let mut name = file.as_os_str().to_owned();
        name.push(".bat-backup");
        if number > 1 {
            name.push(format!(".{number}"));
        }
        PathBuf::from(name)
    };
    // Where all names are taken, creating the first one fails.
    let free = (1..=MOST_BACKUPS)
        .map(name)
        .find(|name| name.symlink_metadata().is_err());
    free.unwrap_or_else(|| name(1))
}

impl Repair {
    pub(super) fn run(&self, watch: &Watch) -> Result<Outcome, ToolError> {
        if is_raw(&self.file)? {
            return Err(ToolError::Refused(format!(
                "{}: is a raw disk, which has no structures that could be repaired",
                self.file.display()
            )));
        }
        if let Some(backup) = &self.undo {
            return self.undo(backup, watch);
        }
        let failed = || ToolError::chain(&self.file, watch);
        let backup = if self.no_backup {
            None
        } else {
            let named = self.backup.clone().flatten();
            Some(named.unwrap_or_else(|| free_name(&self.file)))
        };
        let done = Vhdx::repair(&self.file, backup.as_deref(), watch).map_err(failed())?;
        let after = Vhdx::check(&self.file, watch).map_err(failed())?;
        let lost: &[ByteRange] = if after.is_sound() {
            &done.before.lost
        } else {
            &[]
        };
        let mut text = String::new();
        for problem in &done.before.problems {
            let _ = writeln!(text, "was wrong: {problem}");
        }
        if done.before.more > 0 {
            let _ = writeln!(text, "was wrong: {} more", done.before.more);
        }
        text += &report(&self.file, &after).1;
        text += &lost_text(lost);
        if !lost.is_empty() {
            let _ = writeln!(
                text,
                "{}: {} of the disk are lost, and read as its parent does, or as zeros",
                self.file.display(),
                human(total(lost))
            );
        }
        if let Some(backup) = &done.backup {
            let _ = writeln!(
                text,
                "the old entries are kept: coppice disk repair --undo {} {}",
                backup.display(),
                self.file.display()
            );
        }
        let mut outcome = Outcome::new(
            json!({
                "file": self.file,
                "repaired": done.before.problems,
                "sound": after.is_sound(),
                "problems": after.problems,
                "lost": lost_json(lost),
                "lost_bytes": total(lost),
                "backup": done.backup,
            }),
            text,
        );
        outcome.code = match (after.is_sound(), lost.is_empty()) {
            (false, _) => 1,
            (true, false) => LOST,
            (true, true) => 0,
        };
        Ok(outcome)
    }

    fn undo(&self, backup: &Path, watch: &Watch) -> Result<Outcome, ToolError> {
        let failed = || ToolError::chain(&self.file, watch);
        let undone = Vhdx::undo_repair(&self.file, backup).map_err(failed())?;
        let after = Vhdx::check(&self.file, watch).map_err(failed())?;
        let mut text = format!("put {} entries back\n", undone.entries);
        text += &report(&self.file, &after).1;
        Ok(Outcome::new(
            json!({
                "file": self.file,
                "entries": undone.entries,
                "sound": after.is_sound(),
                "problems": after.problems,
                "lost": lost_json(&after.lost),
            }),
            text,
        ))
    }
}
