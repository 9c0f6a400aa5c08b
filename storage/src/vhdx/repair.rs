//! Putting right what a check found, and undoing that.
//!
//! A block whose entry leads nowhere is given up: its entry says from then on that the block was never written. The old
//! entries go into a backup, a small text file, before the first write. An undo puts them back, as long as nobody has
//! written the file in between: whoever finds the missing end of a file that was cut appends it, undoes the repair, and
//! has all blocks again. That is why a repair that gives blocks up leaves the length of the file and its free space as
//! they are.
//!
//! ```text
//! coppice BAT backup 1
//! file_write_guid 6f0e...       the identifiers that the repair gave the file: an undo looks for them
//! data_write_guid 0c1d...
//! before 93aa...                the DataWriteGuid before the repair, which an undo puts back
//! 17 0000000038400006           entries: index in the BAT, and value in hexadecimal digits
//! end 1 5ad3c29b                how many there are, and the CRC-32C of all before this line
//! ```

use std::fs::File;
use std::io::{self, BufRead, BufReader, BufWriter, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::bat::{BlockState, Entry};
use super::check::Checked;
use super::create::sync_name;
use super::disk::Vhdx;
use super::format::Guid;
use super::open::Layer;
use super::pages::page_of;
use super::snapshot::ChainError;
use super::state::{Level, Stop};
use crate::disk::DiskError;
use crate::file::open_locked;
use crate::lock::OpenMode;
use crate::progress::Progress;
use crate::refusal::{OpenError, Refusal};

/// First line of a backup.
const TITLE: &str = "coppice BAT backup 1";
/// More than any line of a backup has, in bytes.
const LONGEST_LINE: u64 = 128;

/// What a repair has done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Repaired {
    /// What was wrong before; the blocks that were given up are its `lost`.
    pub before: Checked,
    /// Where the old entries are, if some were changed and a backup was wanted.
    pub backup: Option<PathBuf>,
}

/// What the undo of a repair has done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Undone {
    /// Entries that are again as they were.
    pub entries: usize,
}

/// What a backup holds.
#[derive(Debug, PartialEq, Eq)]
struct Backup {
    file_write_guid: Guid,
    data_write_guid: Guid,
    /// The DataWriteGuid before the repair.
    before: Guid,
    /// Index and value of each entry.
    entries: Vec<(u64, u64)>,
}

impl Vhdx {
    /// Puts right what a check of the file at `path` found: replays the log, restores damaged copies, and gives up
    /// blocks whose entries lead nowhere, which then read as the parent does, or as zeros. The entries of those blocks
    /// are kept in a new file at `backup` first, where that is given.
    ///
    /// # Errors
    /// As [`Vhdx::check`], and where the file or the backup cannot be written.
    pub fn repair(
        path: &Path,
        backup: Option<&Path>,
        progress: &dyn Progress,
    ) -> Result<Repaired, ChainError> {
        let before = Self::check(path, progress)?;
        let untouched = |before| Repaired {
            before,
            backup: None,
        };
        if !before.repairable {
            return Ok(untouched(before));
        }
        let failed = |reason| OpenError::new(path, reason);
        let file = open_locked(path, OpenMode::ReadWrite).map_err(failed)?;
        let mut bad = Vec::new();
        let mut layer = Layer::read_with(
            Box::new(file),
            OpenMode::ReadWrite,
            Some(&mut |index, _| {
                bad.push(index);
                Ok(())
            }),
        )
        .map_err(failed)?;
        if before.is_sound() && layer.headers.current().log_guid == Guid::ZERO {
            return Ok(untouched(before));
        }
        if bad.is_empty() {
            let disk = layer
                .finish(OpenMode::ReadWrite, None, true)
                .map_err(failed)?;
            // This writes both headers, and the damaged region table.
            disk.announce(Level::File)?;
            disk.close_all()?;
            return Ok(untouched(before));
        }
        let old = Backup {
            file_write_guid: Guid::random(),
            data_write_guid: Guid::random(),
            before: layer.headers.current().data_write_guid,
            entries: old_entries(&layer, &bad).map_err(failed)?,
        };
        if let Some(backup) = backup {
            old.write(backup)
                .map_err(|e| OpenError::new(backup, Refusal::io("write the backup", e)))?;
        }
        layer.keep_length();
        // No block of a parent is looked at, and nothing is punched.
        let disk = layer
            .finish(OpenMode::ReadWrite, None, false)
            .map_err(failed)?;
        let (data, file) = (Some(old.data_write_guid), Some(old.file_write_guid));
        disk.announce_as(Level::Data, data, file)?;
        let absent = Entry::absent(BlockState::NotPresent).raw();
        for index in bad {
            disk.set_raw_entry(index, None, absent)?;
        }
        disk.close_all()?;
        Ok(Repaired {
            before,
            backup: backup.map(Path::to_owned),
        })
    }

    /// Puts the entries back that a repair of the file at `path` has changed and kept at `backup`, and the
    /// DataWriteGuid. The blocks are then as lost as they were before the repair, unless the file has got back what it
    /// lacked.
    ///
    /// # Errors
    /// Where a file cannot be read or written, and where the backup is not that of the last thing that happened to the
    /// disk.
    pub fn undo_repair(path: &Path, backup: &Path) -> Result<Undone, ChainError> {
        let old = Backup::read(backup).map_err(|e| OpenError::new(backup, e))?;
        let failed = |reason| OpenError::new(path, reason);
        let file = open_locked(path, OpenMode::ReadWrite).map_err(failed)?;
        let mut is_damaged = false;
        let mut layer = Layer::read_with(
            Box::new(file),
            OpenMode::ReadWrite,
            Some(&mut |_, _| {
                is_damaged = true;
                Ok(())
            }),
        )
        .map_err(failed)?;
        let header = layer.headers.current();
        if (header.file_write_guid, header.data_write_guid)
            != (old.file_write_guid, old.data_write_guid)
        {
            return Err(failed(Refusal::Unsupported(format!(
                "is not as the repair left it that made {}: its identifiers are {} and {}, and the repair gave it {} and {}",
                backup.display(),
                header.file_write_guid,
                header.data_write_guid,
                old.file_write_guid,
                old.data_write_guid
            )))
            .into());
        }
        if is_damaged {
            let refusal = "has been damaged anew since it was repaired: repair it first";
            return Err(failed(Refusal::Unsupported(refusal.into())).into());
        }
        let entries = layer.layout.entries();
        if let Some((index, _)) = old.entries.iter().find(|(index, _)| *index >= entries) {
            return Err(OpenError::new(
                backup,
                Refusal::Unsupported(format!(
                    "has BAT entry {index}, and the table of {} has {entries}",
                    path.display()
                )),
            )
            .into());
        }
        layer.keep_length();
        let disk = layer
            .finish(OpenMode::ReadWrite, None, false)
            .map_err(failed)?;
        disk.announce_as(Level::Data, Some(old.before), None)?;
        let absent = Entry::absent(BlockState::NotPresent).raw();
        for (index, raw) in &old.entries {
            disk.set_raw_entry(*index, Some(absent), *raw)?;
        }
        disk.close_all()?;
        Ok(Undone {
            entries: old.entries.len(),
        })
    }

    /// Gives an entry of the BAT any value; where `expected` is given, only if it has that one.
    fn set_raw_entry(&self, index: u64, expected: Option<u64>, raw: u64) -> Result<(), DiskError> {
        let at = self.state.lock().layout.entry_offset(index);
        self.with_state(|state| {
            let found = state.pages.entry(at).ok_or(Stop::Page(page_of(at)))?;
            if let Some(expected) = expected.filter(|expected| *expected != found) {
                return Err(DiskError::Corrupt {
                    structure: format!("BAT entry {index}"),
                    offset: at,
                    expected: format!(
                        "expected {expected:#x}, as a repair left it, found {found:#x}"
                    ),
                }
                .into());
            }
            state.ready(Level::Data)?;
            state.pages.set_entry(at, raw);
            Ok(())
        })
    }
}

/// Index and value of entries.
fn old_entries(layer: &Layer, indices: &[u64]) -> Result<Vec<(u64, u64)>, Refusal> {
    let read = |index: &u64| {
        let mut raw = [0; 8];
        layer
            .view
            .read(&mut raw, layer.layout.entry_offset(*index))?;
        Ok((*index, u64::from_le_bytes(raw)))
    };
    let entries: io::Result<_> = indices.iter().map(read).collect();
    entries.map_err(|e| Refusal::io("read the BAT", e))
}

/// A writer that keeps the checksum of what went through.
struct Checksummed<W> {
    inner: W,
    sum: u32,
}

impl<W: Write> Write for Checksummed<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.inner.write(bytes)?;
        self.sum = crc32c::crc32c_append(self.sum, &bytes[..written]);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

impl Backup {
    /// Makes a new file at `path`, durably.
    fn write(&self, path: &Path) -> io::Result<()> {
        let file = File::options()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path)?;
        let mut out = Checksummed {
            inner: BufWriter::new(&file),
            sum: 0,
        };
        writeln!(out, "{TITLE}")?;
        writeln!(out, "file_write_guid {}", self.file_write_guid)?;
        writeln!(out, "data_write_guid {}", self.data_write_guid)?;
        writeln!(out, "before {}", self.before)?;
        for (index, raw) in &self.entries {
            writeln!(out, "{index} {raw:016x}")?;
        }
        let sum = out.sum;
        writeln!(out, "end {} {sum:08x}", self.entries.len())?;
        out.flush()?;
        drop(out);
        file.sync_all()?;
        sync_name(path)
    }

    fn read(path: &Path) -> Result<Self, Refusal> {
        let file = open_locked(path, OpenMode::ReadOnly)?;
        Self::parse(BufReader::new(&*file))
    }

    fn parse(mut from: impl BufRead) -> Result<Self, Refusal> {
        let mut sum = 0;
        let mut line = || -> Result<(String, u32), Refusal> {
            let before = sum;
            let mut bytes = Vec::new();
            (&mut from)
                .take(LONGEST_LINE)
                .read_until(b'\n', &mut bytes)
                .map_err(|e| Refusal::io("read the backup", e))?;
            sum = crc32c::crc32c_append(sum, &bytes);
            let text = String::from_utf8_lossy(&bytes);
            let text = text.strip_suffix('\n').ok_or_else(not_a_backup)?;
            Ok((text.to_owned(), before))
        };
        if line()?.0 != TITLE {
            return Err(not_a_backup());
        }
        let mut guid = |name: &str| {
            let (text, _) = line()?;
            let value = text.strip_prefix(name).map(str::trim_start);
            value.and_then(Guid::parse).ok_or_else(not_a_backup)
        };
        let (file_write_guid, data_write_guid) =
            (guid("file_write_guid ")?, guid("data_write_guid ")?);
        let before = guid("before ")?;
        let mut entries = Vec::new();
        loop {
            let (text, sum) = line()?;
            if let Some(end) = text.strip_prefix("end ") {
                if end != format!("{} {sum:08x}", entries.len()) {
                    return Err(not_a_backup());
                }
                break;
            }
            let entry = text.split_once(' ').and_then(|(index, raw)| {
                Some((index.parse().ok()?, u64::from_str_radix(raw, 16).ok()?))
            });
            entries.push(entry.ok_or_else(not_a_backup)?);
        }
        Ok(Self {
            file_write_guid,
            data_write_guid,
            before,
            entries,
        })
    }
}

fn not_a_backup() -> Refusal {
    Refusal::Unsupported("is not a whole backup of a BAT, as coppice disk repair writes it".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_backup_is_read_as_it_was_written_and_in_no_other_way() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("backup");
        let backup = Backup {
            file_write_guid: Guid::random(),
            data_write_guid: Guid::random(),
            before: Guid::random(),
            entries: vec![(0, 6), (17, u64::MAX), (u64::MAX, 0)],
        };
        backup.write(&path).unwrap();
        assert_eq!(Backup::read(&path).unwrap(), backup);
        assert!(backup.write(&path).is_err(), "never over another");
        let whole = std::fs::read(&path).unwrap();
        for cut in 0..whole.len() {
            assert!(Backup::parse(&whole[..cut]).is_err(), "{cut}");
        }
        for at in 0..whole.len() {
            let mut damaged = whole.clone();
            damaged[at] ^= 1;
            assert!(Backup::parse(&damaged[..]).is_err(), "{at}");
        }
    }
}
