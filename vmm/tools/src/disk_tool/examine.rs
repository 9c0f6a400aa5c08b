//! Examines disks: identity, structures, extents and differences.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::{Value, json};
use storage::foreign::SourceFormat;
use storage::vhdx::{Checked, Guid, Vhdx};
use storage::{ByteRange, Disk, ExtentState, Format, Mapping, OpenOptions, Refusal, alignment};

use super::error::ToolError;
use super::format::{FormatArgs, Named, with_hint};
use super::lost::{lost_json, lost_text};
use super::outcome::{Outcome, Output, lines};
use super::size::human;
use super::watch::Watch;
use host::report::chain;

/// Extents are resolved in pieces of this many bytes.
const STRIDE: u64 = 1 << 34;

/// `coppice disk info`.
#[derive(Debug, Args)]
pub struct Info {
    /// The disk.
    file: PathBuf,
    #[command(flatten)]
    format: FormatArgs,
    #[command(flatten)]
    pub(super) output: Output,
}

/// One file of a chain.
pub(super) fn layer(info: &storage::vhdx::Info) -> Value {
    let parent = info.parent.as_ref().map(|locator| {
        json!({
            "file": info.parent_path,
            "linkage": locator.linkage.to_string(),
            "linkage2": locator.linkage2.map(|guid| guid.to_string()),
            "relative_path": locator.relative_path,
            "volume_path": locator.volume_path,
            "absolute_path": locator.absolute_path,
        })
    });
    json!({
        "file": info.path,
        "format": "vhdx",
        "kind": kind(info),
        "size": info.size,
        "file_bytes": info.file_bytes,
        "host_bytes": info.host_bytes,
        "block_size": info.block_size,
        "logical_sector": info.logical_sector.bytes(),
        "physical_sector": info.physical_sector.bytes(),
        "file_write_guid": info.identifiers.file_write_guid.to_string(),
        "data_write_guid": info.identifiers.data_write_guid.to_string(),
        "virtual_disk_id": info.identifiers.virtual_disk_id.to_string(),
        "dirty": info.dirty,
        "creator": info.creator,
        "parent": parent,
    })
}

fn kind(info: &storage::vhdx::Info) -> &'static str {
    match (info.fixed, &info.parent) {
        (_, Some(_)) => "differencing",
        (true, None) => "fixed",
        (false, None) => "dynamic",
    }
}

fn describe(info: &storage::vhdx::Info) -> String {
    let mut text = lines([
        ("file", info.path.display().to_string()),
        ("format", format!("vhdx, {}", kind(info))),
        (
            "size",
            format!("{} ({} bytes)", human(info.size), info.size),
        ),
        (
            "file length",
            format!(
                "{}, {} on the host",
                human(info.file_bytes),
                human(info.host_bytes)
            ),
        ),
        ("block size", human(info.block_size)),
        (
            "sectors",
            format!(
                "{} logical, {} physical",
                info.logical_sector.bytes(),
                info.physical_sector.bytes()
            ),
        ),
        (
            "DataWriteGuid",
            info.identifiers.data_write_guid.to_string(),
        ),
        (
            "FileWriteGuid",
            info.identifiers.file_write_guid.to_string(),
        ),
        (
            "virtual disk id",
            info.identifiers.virtual_disk_id.to_string(),
        ),
        ("made by", info.creator.clone()),
    ]);
    if info.dirty {
        text += &lines([(
            "log",
            "not empty: the file was not closed, and is replayed when it is opened for writing"
                .into(),
        )]);
    }
    if let Some(locator) = &info.parent {
        let place = info
            .parent_path
            .as_ref()
            .map_or("not found".into(), |path| path.display().to_string());
        text += &lines([
            ("parent", place),
            ("parent linkage", locator.linkage.to_string()),
        ]);
    }
    text
}

/// What keeps guests from sharing pages of a disk, as JSON and as text.
fn unshared(disk: &dyn Disk) -> Result<(Value, String), storage::DiskError> {
    let found = alignment::unshared(disk)?;
    let json = found
        .iter()
        .map(|found| json!({"partition": found.partition, "reason": found.to_string()}))
        .collect();
    let text = found
        .iter()
        .map(|found| lines([("not shared", found.to_string())]))
        .collect();
    Ok((json, text))
}

impl Info {
    pub(super) fn run(&self) -> Result<Outcome, ToolError> {
        if self.format.of(&self.file)? == SourceFormat::Vhdx {
            self.vhdx()
        } else {
            self.raw()
        }
    }

    fn raw(&self) -> Result<Outcome, ToolError> {
        let disk = storage::open(&self.file, &self.format.options(&self.file))?;
        let metadata = std::fs::metadata(&self.file)
            .map_err(ToolError::io(format!("look at {}", self.file.display())))?;
        let host = std::os::unix::fs::MetadataExt::blocks(&metadata) * 512;
        let size = disk.geometry().size;
        let (unshared, reasons) = unshared(&*disk).map_err(|error| ToolError::Disk {
            path: self.file.clone(),
            error,
        })?;
        let mut text = lines([
            ("file", self.file.display().to_string()),
            ("format", "raw".into()),
            ("size", format!("{} ({size} bytes)", human(size))),
            (
                "file length",
                format!("{}, {} on the host", human(metadata.len()), human(host)),
            ),
        ]);
        text += &reasons;
        Ok(Outcome::new(
            json!({
                "layers": [{"file": self.file, "format": "raw", "size": size, "file_bytes": metadata.len(), "host_bytes": host}],
                "unshared": unshared,
            }),
            text,
        ))
    }

    fn vhdx(&self) -> Result<Outcome, ToolError> {
        let mut layers = vec![Vhdx::info(&self.file)?];
        // The error of the open is what is wrong with the chain, if anything is.
        let opened = Vhdx::open(&self.file, &self.format.options(&self.file));
        // A cycle ends where it begins, and where a file is missing or may not be opened the chain does.
        while let Some(next) = layers.last().and_then(|info| info.parent_path.clone())
            && self.format.allows(&self.file, &next)
            && !layers.iter().any(|known| same(&known.path, &next))
        {
            layers.push(Vhdx::info(&next)?);
        }
        let mut text = layers.iter().map(describe).collect::<Vec<_>>().join("\n");
        let (looked, problem) = match opened {
            Ok(disk) => match unshared(&disk) {
                Ok(found) => (Some(found), None),
                Err(error) => (None, Some(chain(&error).to_string())),
            },
            Err(error) => (None, Some(chain(&with_hint(error)).to_string())),
        };
        let (unshared, reasons) = looked.unwrap_or_default();
        text += &reasons;
        if let Some(problem) = &problem {
            let _ = writeln!(text, "\ncannot be read: {problem}");
        }
        Ok(Outcome::new(
            json!({
                "layers": layers.iter().map(layer).collect::<Vec<_>>(),
                "problem": problem,
                "unshared": unshared,
            }),
            text,
        ))
    }
}

fn same(a: &Path, b: &Path) -> bool {
    a.canonicalize()
        .is_ok_and(|a| b.canonicalize().is_ok_and(|b| a == b))
}

/// Whether a file is a raw disk, or is in a format that is refused as soon as it is opened as one. A file whose name
/// ends in `.vhdx` is no raw disk, however damaged it is.
pub(super) fn is_raw(path: &Path) -> Result<bool, ToolError> {
    match storage::detect(path) {
        Ok(SourceFormat::Vhdx) => Ok(false),
        Ok(SourceFormat::Raw) => {
            let ending = path.extension();
            Ok(!ending.is_some_and(|ending| ending.eq_ignore_ascii_case("vhdx")))
        }
        Ok(SourceFormat::Qcow2 | SourceFormat::Vhd | SourceFormat::Vmdk) => Ok(true),
        Err(error) => match error.reason() {
            Refusal::Corrupt { .. } => Ok(false),
            _ => Err(error.into()),
        },
    }
}

/// `coppice disk check`.
#[derive(Debug, Args)]
pub struct Check {
    /// The file. Of a chain, the structures of this file alone.
    file: PathBuf,
    #[command(flatten)]
    format: FormatArgs,
    /// Print a digest of what the disk holds, all layers together: the same for every file that holds the same.
    #[arg(long)]
    hash: bool,
    #[command(flatten)]
    pub(super) output: Output,
}

pub(super) fn report(file: &Path, checked: &Checked) -> (Value, String) {
    let mut text = String::new();
    for problem in &checked.problems {
        let _ = writeln!(text, "wrong: {problem}");
    }
    if checked.more > 0 {
        let _ = writeln!(text, "wrong: {} more", checked.more);
    }
    text += &lost_text(&checked.lost);
    for note in &checked.notes {
        let _ = writeln!(text, "note: {note}");
    }
    let _ = writeln!(
        text,
        "{}: {}, {} blocks in {}",
        file.display(),
        match (checked.is_sound(), checked.repairable) {
            (true, _) => "sound",
            (false, true) => "damaged, can be repaired by coppice disk repair",
            (false, false) => "damaged",
        },
        checked.blocks,
        human(checked.file_bytes)
    );
    let json = json!({
        "file": file,
        "sound": checked.is_sound(),
        "repairable": checked.repairable,
        "problems": checked.problems,
        "more_problems": checked.more,
        "lost": lost_json(&checked.lost),
        "notes": checked.notes,
        "file_bytes": checked.file_bytes,
        "free_bytes": checked.free_bytes,
        "blocks": checked.blocks,
        "partial_blocks": checked.partial_blocks,
        "anchors": checked.anchors,
    });
    (json, text)
}

impl Check {
    pub(super) fn run(&self, watch: &Watch) -> Result<Outcome, ToolError> {
        let is_raw = match self.format.named() {
            Some(named) => named == Format::Raw,
            None => is_raw(&self.file)?,
        };
        if is_raw {
            return self.raw(watch);
        }
        let checked =
            Vhdx::check(&self.file, watch).map_err(ToolError::chain(&self.file, watch))?;
        let (mut json, mut text) = report(&self.file, &checked);
        if checked.is_sound() {
            match Vhdx::open(&self.file, &self.format.options(&self.file)) {
                Ok(disk) => self.content(&disk, watch, &mut json, &mut text)?,
                Err(error) if self.hash => return Err(with_hint(error)),
                // Another file of the chain is damaged or missing, and only this file is checked.
                Err(_) => {}
            }
        }
        let mut outcome = Outcome::new(json, text);
        outcome.code = u8::from(!checked.is_sound());
        Ok(outcome)
    }

    /// Checks a raw disk, which has no structures that could be damaged.
    fn raw(&self, watch: &Watch) -> Result<Outcome, ToolError> {
        let disk = storage::open(&self.file, &self.format.options(&self.file))?;
        let mut text = format!("{}: a raw disk, without structures\n", self.file.display());
        let mut json = json!({"file": self.file, "sound": true, "problems": [], "notes": []});
        self.content(&*disk, watch, &mut json, &mut text)?;
        Ok(Outcome::new(json, text))
    }

    /// Adds what the content of the disk shows: what keeps guests from sharing it, and its digest.
    fn content(
        &self,
        disk: &dyn Disk,
        watch: &Watch,
        json: &mut Value,
        text: &mut String,
    ) -> Result<(), ToolError> {
        let failed = || ToolError::disk(&self.file, watch);
        let (unshared, reasons) = unshared(disk).map_err(failed())?;
        *text += &reasons;
        json["unshared"] = unshared;
        if self.hash {
            let digest = Vhdx::digest(disk, watch).map_err(failed())?;
            let hex = digest.iter().fold(String::new(), |mut hex, byte| {
                let _ = write!(hex, "{byte:02x}");
                hex
            });
            let _ = writeln!(text, "content {hex}");
            json["content"] = hex.into();
        }
        Ok(())
    }
}

/// `coppice disk map`.
#[derive(Debug, Args)]
pub struct Map {
    /// The disk.
    file: PathBuf,
    #[command(flatten)]
    format: FormatArgs,
    #[command(flatten)]
    pub(super) output: Output,
}

fn state(mapping: &Mapping) -> &'static str {
    match mapping.state {
        ExtentState::Mapped => "mapped",
        ExtentState::Zero => "zero",
        ExtentState::Unmapped => "unmapped",
        ExtentState::Undefined => "undefined",
        ExtentState::Transparent => "transparent",
    }
}

fn extents(mappings: &[Mapping]) -> (Vec<Value>, String) {
    let mut text = format!(
        "{:>18} {:>18} {:<12} {:>5} {:>18}\n",
        "offset", "length", "state", "layer", "file offset"
    );
    let json = mappings
        .iter()
        .map(|mapping| {
            let place = mapping
                .file_offset
                .map_or("-".into(), |offset| format!("{offset:#x}"));
            let _ = writeln!(
                text,
                "{:>#18x} {:>#18x} {:<12} {:>5} {:>18}",
                mapping.offset,
                mapping.len,
                state(mapping),
                mapping.layer,
                place
            );
            json!({
                "offset": mapping.offset,
                "length": mapping.len,
                "state": state(mapping),
                "layer": mapping.layer,
                "file_offset": mapping.file_offset,
            })
        })
        .collect();
    (json, text)
}

impl Map {
    pub(super) fn run(&self, watch: &Watch) -> Result<Outcome, ToolError> {
        use storage::Progress;
        let disk =
            storage::open(&self.file, &self.format.options(&self.file)).map_err(with_hint)?;
        let size = disk.geometry().size;
        let mut all: Vec<Mapping> = Vec::new();
        let mut at = 0;
        while at < size {
            watch.advance(at, size);
            if watch.is_cancelled() {
                return Err(ToolError::Cancelled(watch.signal()));
            }
            let known = all.len();
            let len = STRIDE.min(size - at);
            if let Some(range) = ByteRange::new(at, len) {
                disk.map(range, &mut all)
                    .map_err(ToolError::disk(&self.file, watch))?;
            }
            join(&mut all, known);
            at += len;
        }
        let (json, text) = extents(&all);
        Ok(Outcome::new(
            json!({"file": self.file, "size": size, "extents": json}),
            text,
        ))
    }
}

/// Joins the extent at `at` to the one before it, where it continues that.
fn join(all: &mut Vec<Mapping>, at: usize) {
    let (Some(before), Some(next)) = (at.checked_sub(1).and_then(|at| all.get(at)), all.get(at))
    else {
        return;
    };
    let one = (before.state, before.layer) == (next.state, next.layer)
        && before.file_offset.map(|offset| offset + before.len) == next.file_offset;
    if one {
        let next = all.remove(at);
        if let Some(before) = all.get_mut(at - 1) {
            before.len += next.len;
        }
    }
}

/// `coppice disk diff`.
#[derive(Debug, Args)]
pub struct Diff {
    /// Tell what changed since the disk, or a disk it stands on, had this DataWriteGuid; by what its layers say, no
    /// data is read.
    #[arg(long, value_name = "GUID", conflicts_with = "other")]
    since: Option<String>,
    /// The disk.
    file: PathBuf,
    /// The disk to compare it with, byte by byte.
    #[arg(required_unless_present = "since")]
    other: Option<PathBuf>,
    #[command(flatten)]
    format: FormatArgs,
    /// Format of the other disk [default: as --format].
    #[arg(long, value_enum, value_name = "FORMAT", conflicts_with = "since")]
    other_format: Option<Named>,
    #[command(flatten)]
    pub(super) output: Output,
}

impl Diff {
    pub(super) fn run(&self, watch: &Watch) -> Result<Outcome, ToolError> {
        let failed = || ToolError::disk(&self.file, watch);
        if let Some(since) = &self.since {
            let identifier = Guid::parse(since).ok_or_else(|| {
                ToolError::Refused(format!(
                    "{since:?} is not a GUID, as coppice disk info shows them"
                ))
            })?;
            let options = OpenOptions {
                format: Some(Format::Vhdx),
                ..OpenOptions::read_only()
            };
            let disk = Vhdx::open(&self.file, &options)?;
            let changed = disk.changed_since(identifier).map_err(failed())?;
            let (json, text) = extents(&changed);
            let mut outcome = Outcome::new(
                json!({"file": self.file, "since": since, "extents": json}),
                text,
            );
            outcome.code = u8::from(!changed.is_empty());
            return Ok(outcome);
        }
        let other = self.other.clone().unwrap_or_default();
        let of_other = match self.other_format {
            Some(named) => self.format.options_as(&other, Some(named.into())),
            None => self.format.options(&other),
        };
        let one = storage::open(&self.file, &self.format.options(&self.file)).map_err(with_hint)?;
        let second = storage::open(&other, &of_other).map_err(with_hint)?;
        let found = storage::blocking::differences(&*one, &*second, watch).map_err(failed())?;
        let total: u64 = found.iter().map(|range| range.len()).sum();
        let mut text = String::new();
        for range in &found {
            let _ = writeln!(text, "{:>#18x} {:>#18x}", range.offset(), range.len());
        }
        let _ = writeln!(
            text,
            "{}",
            if found.is_empty() {
                "the disks are the same".to_owned()
            } else {
                format!("{} in {} ranges differ", human(total), found.len())
            }
        );
        let ranges: Vec<_> = found
            .iter()
            .map(|range| json!({"offset": range.offset(), "length": range.len()}))
            .collect();
        let mut outcome = Outcome::new(
            json!({"file": self.file, "other": other, "differences": ranges}),
            text,
        );
        outcome.code = u8::from(!found.is_empty());
        Ok(outcome)
    }
}
