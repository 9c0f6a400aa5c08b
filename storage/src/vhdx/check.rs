//! What is wrong with a file.

use std::path::Path;

use sha2::{Digest, Sha256};

use super::amend::refused;
use super::bat::{self, BlockState, Entry};
use super::bitmap;
use super::commit::io_error;
use super::disk::Vhdx;
use super::format::{Guid, REGION_TABLE_OFFSETS};
use super::header::Headers;
use super::open::Layer;
use super::snapshot::ChainError;
use crate::blocking;
use crate::disk::{ByteRange, Disk, DiskError};
use crate::file::open_locked;
use crate::lock::OpenMode;
use crate::medium::Medium;
use crate::progress::Progress;
use crate::refusal::{OpenError, Refusal};

/// Problems that are kept; more are counted.
const KEPT: usize = 100;
/// Unit of the digest, in bytes.
const DIGEST_UNIT: u64 = 65536;

/// What a check of one file found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Checked {
    /// What is wrong, in words that name the structure and where it lies in the file.
    pub problems: Vec<String>,
    /// What is no fault, but could be better: what a replay or a compaction would do.
    pub notes: Vec<String>,
    /// Problems beyond those that are listed.
    pub more: u64,
    /// Whether a repair can put all problems right; entries of the BAT at the price of their blocks.
    pub repairable: bool,
    /// What cannot be read of the disk, in order: the blocks whose entries lead nowhere.
    pub lost: Vec<ByteRange>,
    /// Length of the file in bytes.
    pub file_bytes: u64,
    /// Bytes of the file that nothing describes.
    pub free_bytes: u64,
    /// Blocks with data of their own.
    pub blocks: u64,
    /// Partially present ones among them.
    pub partial_blocks: u64,
    /// Unmapped blocks that keep their space.
    pub anchors: u64,
}

impl Checked {
    fn problem(&mut self, problem: String) {
        if self.problems.len() < KEPT {
            self.problems.push(problem);
        } else {
            self.more += 1;
        }
    }

    /// Whether nothing is wrong.
    pub fn is_sound(&self) -> bool {
        self.problems.is_empty()
    }
}

impl Vhdx {
    /// Checks every structure of the file at `path`, checksums included, and nothing of its parents. Writes nothing.
    ///
    /// # Errors
    /// Where the file cannot be opened or read at all; what is wrong with its structures is in [`Checked`].
    pub fn check(path: &Path, progress: &dyn Progress) -> Result<Checked, ChainError> {
        let failed = |reason| OpenError::new(path, reason);
        let file = open_locked(path, OpenMode::ReadOnly).map_err(failed)?;
        let mut checked = Checked {
            file_bytes: Medium::len(&file)
                .map_err(|e| failed(Refusal::io("read the length", e)))?,
            repairable: true,
            ..Checked::default()
        };
        for offset in Headers::damaged(&file) {
            checked.problem(format!(
                "header at file offset {offset:#x}: expected signature and checksum to match"
            ));
        }
        let mut bad = Vec::new();
        let mut words = Vec::new();
        let layer = Layer::read_with(
            Box::new(file),
            OpenMode::ReadOnly,
            Some(&mut |index, expected| {
                bad.push(index);
                if words.len() < KEPT {
                    words.push(expected);
                }
                Ok(())
            }),
        );
        let layer = match layer {
            Ok(layer) => layer,
            Err(refusal @ Refusal::Io { .. }) => return Err(failed(refusal).into()),
            Err(refusal) => {
                checked.problem(report::chain(&refusal).to_string());
                checked.repairable = false;
                return Ok(checked);
            }
        };
        for (index, expected) in bad.iter().zip(&words) {
            let offset = layer.layout.entry_offset(*index);
            checked.problem(format!(
                "BAT entry {index} at file offset {offset:#x}: {expected}"
            ));
        }
        checked.more += (bad.len() - words.len()) as u64;
        checked.lost = layer.layout.ranges(bad, layer.metadata.size);
        if let Some(copy) = layer.regions.damaged_copy {
            checked.problem(format!(
                "region table at file offset {:#x}: expected signature and checksum to match",
                REGION_TABLE_OFFSETS[copy]
            ));
        }
        if layer.headers.current().log_guid != Guid::ZERO {
            checked.notes.push(format!(
                "the log describes {} changes that are not in place: the file was not closed",
                layer.view.changes()
            ));
        }
        checked.free_bytes = layer.found.free.iter().map(|(_, len)| len).sum();
        checked.anchors = layer.found.anchors.len() as u64;
        let tail = checked.file_bytes.saturating_sub(layer.found.end);
        if tail > 0 {
            checked.notes.push(format!(
                "{tail} bytes at the end of the file belong to nothing"
            ));
        }
        if checked.free_bytes > 0 {
            checked.notes.push(format!(
                "{} bytes inside the file are free",
                checked.free_bytes
            ));
        }
        check_blocks(&layer, &mut checked, progress).map_err(ChainError::Disk)?;
        Ok(checked)
    }

    /// A digest of what the disk holds, whatever file and layers it lies in: SHA-256 over offset and bytes (the last
    /// unit filled up with zeros) of every 64 KiB that are not all zeros, and then the size.
    ///
    /// # Errors
    /// Where the disk cannot be read, and `Cancelled`.
    pub fn digest(disk: &dyn Disk, progress: &dyn Progress) -> Result<[u8; 32], DiskError> {
        let mut hash = Sha256::new();
        let mut units = Units::default();
        blocking::for_each_piece(disk, progress, |offset, piece| {
            // Pieces begin at whole units, or where data does, inside one.
            let mut at = offset;
            let mut left = piece;
            while !left.is_empty() {
                let len = (DIGEST_UNIT - at % DIGEST_UNIT).min(left.len() as u64);
                let (unit, rest) = left.split_at(len as usize);
                units.add(at, unit, &mut hash);
                at += len;
                left = rest;
            }
            Ok::<(), DiskError>(())
        })?;
        units.end(&mut hash);
        hash.update(disk.geometry().size.to_le_bytes());
        Ok(hash.finalize().into())
    }
}

/// The unit of a digest that is being put together: what no file holds of it is zeros.
#[derive(Default)]
struct Units {
    number: u64,
    bytes: Vec<u8>,
}

impl Units {
    fn add(&mut self, offset: u64, part: &[u8], hash: &mut Sha256) {
        if offset / DIGEST_UNIT != self.number {
            self.end(hash);
            self.number = offset / DIGEST_UNIT;
        }
        self.bytes.resize((offset % DIGEST_UNIT) as usize, 0);
        self.bytes.extend_from_slice(part);
    }

    fn end(&mut self, hash: &mut Sha256) {
        if self.bytes.iter().any(|byte| *byte != 0) {
            self.bytes.resize(DIGEST_UNIT as usize, 0);
            hash.update((self.number * DIGEST_UNIT).to_le_bytes());
            hash.update(&self.bytes);
        }
        self.bytes.clear();
    }
}

/// Counts blocks, and looks at the sector bitmaps of partially present ones.
fn check_blocks(
    layer: &Layer,
    checked: &mut Checked,
    progress: &dyn Progress,
) -> Result<(), DiskError> {
    let layout = &layer.layout;
    let mut partial = Vec::new();
    let failed = |e| io_error("read the BAT")(e);
    bat::scan(&layer.view, layout, failed, |index, raw| {
        progress.advance(index, layout.entries());
        if progress.is_cancelled() {
            return Err(DiskError::Cancelled);
        }
        if layout.is_bitmap(index) {
            let bitmap = bat::decode_bitmap(raw).ok().flatten();
            for block in partial.drain(..) {
                if let Some(bitmap) = bitmap {
                    check_bits(layer, block, bitmap, checked)?;
                }
            }
            return Ok(());
        }
        if let (Ok(entry), Some(block)) =
            (Entry::decode(raw, layout.has_parent), layout.block(index))
        {
            checked.blocks += u64::from(entry.state.is_present());
            if entry.state == BlockState::PartiallyPresent {
                checked.partial_blocks += 1;
                partial.push(block);
            }
        }
        Ok(())
    })
}

fn check_bits(
    layer: &Layer,
    block: u64,
    bitmap: u64,
    checked: &mut Checked,
) -> Result<(), DiskError> {
    let bits = layer.layout.bits(block);
    let mut bytes = vec![0; (bits.count / 8) as usize];
    layer
        .view
        .read(&mut bytes, bitmap + bits.first / 8)
        .map_err(|e| refused(Refusal::io("read a sector bitmap", e)))?;
    if bitmap::is_clear(&bytes, &(0..bits.count as usize)) {
        checked.notes.push(format!(
            "block {block} is partially present without a sector that is"
        ));
    }
    checked.notes.truncate(KEPT);
    Ok(())
}
