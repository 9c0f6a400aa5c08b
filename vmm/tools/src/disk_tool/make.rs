//! New disks, and changes of their size.

use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::json;
use storage::vhdx::{ChildOptions, CompactOptions, CreateOptions, Vhdx};
use storage::{Disk, OpenOptions};

use super::ending::{Form, form};
use super::error::ToolError;
use super::outcome::{Outcome, Output};
use super::size::{Sector, block_size, human};
use super::watch::Watch;
use config::Bytes;
use host::report::chain;

/// `coppice disk create`.
#[derive(Debug, Args)]
pub struct Create {
    /// Size of the disk; a child has its parent's.
    #[arg(long, value_name = "SIZE", required_unless_present = "parent")]
    size: Option<Bytes>,
    /// Give all blocks their space now.
    #[arg(long, conflicts_with = "parent")]
    fixed: bool,
    /// Size of a payload block, 1M to 256M, a power of two [default: 2M, or the parent's].
    #[arg(long, value_name = "SIZE")]
    block_size: Option<Bytes>,
    /// Logical sector size.
    #[arg(long, value_enum, default_value = "512", conflicts_with = "parent")]
    sector: Sector,
    /// Physical sector size.
    #[arg(long, value_enum, default_value = "4096", conflicts_with = "parent")]
    physical_sector: Sector,
    /// Make a differencing disk on this VHDX, which must not change from then on.
    #[arg(long, value_name = "BASE")]
    parent: Option<PathBuf>,
    /// The new file.
    out: PathBuf,
    #[command(flatten)]
    pub(super) output: Output,
}

impl Create {
    pub(super) fn run(&self, watch: &Watch) -> Result<Outcome, ToolError> {
        form(&self.out, Some(Form::Vhdx))?;
        let block = self.block_size.map(block_size).transpose()?;
        if let Some(parent) = &self.parent {
            let options = ChildOptions {
                block_size: block,
                ..ChildOptions::default()
            };
            Vhdx::create_child(&self.out, parent, &options)?;
            if let Some(size) = self.size {
                grow_child(&self.out, size.0, watch)?;
            }
        } else {
            let defaults = CreateOptions::new(self.size.map_or(0, |size| size.0));
            Vhdx::create(
                &self.out,
                &CreateOptions {
                    block_size: block.unwrap_or(defaults.block_size),
                    logical_sector: self.sector.into(),
                    physical_sector: self.physical_sector.into(),
                    fixed: self.fixed,
                    ..defaults
                },
            )?;
        }
        let info = Vhdx::info(&self.out)?;
        Ok(Outcome::new(
            super::examine::layer(&info),
            format!("made {}, {}", self.out.display(), human(info.size)),
        ))
    }
}

/// Makes a child larger than its parent, by a resize after it was created.
fn grow_child(path: &Path, size: u64, watch: &Watch) -> Result<(), ToolError> {
    let grown = Vhdx::open(path, &OpenOptions::default())
        .map_err(ToolError::from)
        .and_then(|disk| {
            disk.resize(size, false)
                .and_then(|()| disk.close())
                .map_err(ToolError::disk(path, watch))
        });
    if grown.is_err() {
        // An error of the removal is not reported, but why the child could not be made.
        let _ = std::fs::remove_file(path);
    }
    grown
}

/// `coppice disk resize`.
#[derive(Debug, Args)]
pub struct Resize {
    /// The disk.
    file: PathBuf,
    /// Its new size.
    size: Bytes,
    /// Cut the end off, if the disk is larger. What lies there is lost.
    #[arg(long)]
    shrink: bool,
    #[command(flatten)]
    pub(super) output: Output,
}

impl Resize {
    pub(super) fn run(&self, watch: &Watch) -> Result<Outcome, ToolError> {
        let disk = Vhdx::open(&self.file, &OpenOptions::default())?;
        let before = disk.geometry().size;
        disk.resize(self.size.0, self.shrink)
            .and_then(|()| disk.close())
            .map_err(|error| match error {
                error @ storage::DiskError::Size { .. } if !self.shrink && self.size.0 < before => {
                    let file = self.file.display();
                    ToolError::Refused(format!("{file}: {}: --shrink", chain(&error)))
                }
                error => ToolError::disk(&self.file, watch)(error),
            })?;
        Ok(Outcome::new(
            json!({"file": self.file, "size_before": before, "size": self.size.0}),
            format!(
                "{} is {} now, was {}",
                self.file.display(),
                human(self.size.0),
                human(before)
            ),
        ))
    }
}

/// `coppice disk compact`.
#[derive(Debug, Args)]
pub struct Compact {
    /// The disk.
    file: PathBuf,
    /// Read every block, and give back those that hold only zeros.
    #[arg(long)]
    find_zeros: bool,
    #[command(flatten)]
    pub(super) output: Output,
}

impl Compact {
    pub(super) fn run(&self, watch: &Watch) -> Result<Outcome, ToolError> {
        let disk = Vhdx::open(&self.file, &OpenOptions::default())?;
        let options = CompactOptions {
            find_zeros: self.find_zeros,
        };
        let done = disk
            .compact(options, watch)
            .map_err(ToolError::disk(&self.file, watch))?;
        Ok(Outcome::new(
            json!({
                "file": self.file,
                "file_bytes_before": done.before,
                "file_bytes": done.after,
                "blocks_moved": done.moved,
                "blocks_of_zeros": done.zeros,
            }),
            format!(
                "{} takes {} now, was {}: {} blocks moved, {} found to be zeros",
                self.file.display(),
                human(done.after),
                human(done.before),
                done.moved,
                done.zeros
            ),
        ))
    }
}
