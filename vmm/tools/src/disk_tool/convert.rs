//! Disks of other formats.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use serde_json::json;
use storage::convert::{ConvertError, ConvertOptions, Target, convert};
use storage::foreign::{self, Backing, SourceFormat, SourceOptions};

use super::ending::{Form, form};
use super::error::ToolError;
use super::lost::{lost_json, lost_text, total};
use super::outcome::{LOST, Outcome, Output};
use super::size::{Sector, block_size, human};
use super::watch::Watch;
use config::Bytes;

/// A format to read.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum From {
    Raw,
    Vhdx,
    Qcow2,
    Vhd,
    Vmdk,
}

/// The other files that a source names.
#[derive(Debug, Args)]
struct NamedFiles {
    /// Read the other files too that the source names, in its folder or below: backing files, extents, parents, up to
    /// 16 one behind the other.
    #[arg(long, requires = "from")]
    backing: bool,
    /// Read such files in this folder or below.
    #[arg(long, value_name = "DIR", requires = "backing")]
    backing_dir: Option<PathBuf>,
}

impl NamedFiles {
    fn backing(&self) -> Option<Backing> {
        self.backing.then(|| match &self.backing_dir {
            Some(folder) => Backing::Within(folder.clone()),
            None => Backing::Beside,
        })
    }
}

/// `coppice disk convert`.
#[derive(Debug, Args)]
pub struct Convert {
    /// The disk to copy.
    src: PathBuf,
    /// The new file.
    dst: PathBuf,
    /// Format of the source; found by its signature if not given. Name it for a raw disk that a guest could write.
    #[arg(long, value_enum, value_name = "FORMAT")]
    from: Option<From>,
    #[command(flatten)]
    named: NamedFiles,
    /// Format of the new file [default: as its name ends, else vhdx].
    #[arg(long, value_enum, value_name = "FORMAT")]
    to: Option<Form>,
    /// Size of a payload block, 1M to 256M, a power of two.
    #[arg(long, value_name = "SIZE", default_value = "2M")]
    block_size: Bytes,
    /// Logical sector size [default: the source's].
    #[arg(long, value_enum)]
    sector: Option<Sector>,
    /// Give all blocks their space now.
    #[arg(long)]
    fixed: bool,
    /// Replace the new file if it is there.
    #[arg(long)]
    overwrite: bool,
    /// Copy what can be read of a damaged disk, and list what cannot, which becomes zeros; exits 3 then.
    #[arg(long)]
    salvage: bool,
    #[command(flatten)]
    pub(super) output: Output,
}

impl Convert {
    pub(super) fn run(&self, watch: &Watch) -> Result<Outcome, ToolError> {
        let format = self.from.map(|format| match format {
            From::Raw => SourceFormat::Raw,
            From::Vhdx => SourceFormat::Vhdx,
            From::Qcow2 => SourceFormat::Qcow2,
            From::Vhd => SourceFormat::Vhd,
            From::Vmdk => SourceFormat::Vmdk,
        });
        let form = form(&self.dst, self.to)?;
        let options = SourceOptions {
            format,
            backing: self.named.backing(),
            damaged: self.salvage,
        };
        let (format, mut source) =
            foreign::open(&self.src, &options).map_err(|error| match error {
                // This error names its file itself.
                foreign::SourceError::Open(error) => ToolError::Open(error),
                error => ToolError::Convert(ConvertError::Source {
                    path: self.src.clone(),
                    error,
                }),
            })?;
        let target = match form {
            Form::Raw => Target::Raw,
            Form::Vhdx => Target::Vhdx {
                block_size: block_size(self.block_size)?,
                logical_sector: self.sector.map(Into::into),
                fixed: self.fixed,
            },
        };
        let done = convert(
            (&self.src, &mut *source),
            &self.dst,
            &ConvertOptions {
                target,
                overwrite: self.overwrite,
                salvage: self.salvage,
            },
            watch,
        )
        .map_err(|error| match error {
            ConvertError::Disk(storage::DiskError::Cancelled) => {
                ToolError::Cancelled(watch.signal())
            }
            ConvertError::Disk(error) => ToolError::disk(&self.dst, watch)(error),
            ConvertError::Exists(path) => ToolError::Refused(format!(
                "{} is there already: --overwrite to replace it",
                path.display()
            )),
            error => ToolError::Convert(error),
        })?;
        let mut text = format!(
            "{} ({}) is {} now: {}, {} of it data\n",
            self.src.display(),
            format.name(),
            self.dst.display(),
            human(done.size),
            human(done.written)
        );
        text += &lost_text(&done.lost);
        let mut outcome = Outcome::new(
            json!({
                "source": self.src,
                "source_format": format.name(),
                "file": self.dst,
                "size": done.size,
                "bytes_written": done.written,
                "lost": lost_json(&done.lost),
                "lost_bytes": total(&done.lost),
            }),
            text,
        );
        if !done.lost.is_empty() {
            outcome.code = LOST;
        }
        Ok(outcome)
    }
}
