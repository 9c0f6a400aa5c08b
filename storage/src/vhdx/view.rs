//! The file as it is after log replay, whether or not the log has been replayed into it.

use std::io;

use super::format::LOG_SECTOR;
use crate::medium::Medium;

/// A change that the log describes. It has been checked to lie outside the log and inside the file's length.
#[derive(Clone, Copy, Debug)]
pub(super) enum Patch {
    /// A range of zeros.
    Zero {
        /// First byte.
        offset: u64,
        /// Length in bytes.
        len: u64,
    },
    /// A sector of 4 KiB, whose middle lies in the log.
    Data {
        /// First byte.
        offset: u64,
        /// The sector's first eight bytes.
        leading: [u8; 8],
        /// Its last four bytes.
        trailing: [u8; 4],
        /// The file offset of the data sector in the log that holds the bytes between.
        logged_at: u64,
    },
}

impl Patch {
    /// First byte that it changes.
    pub(super) fn offset(&self) -> u64 {
        match self {
            Self::Zero { offset, .. } | Self::Data { offset, .. } => *offset,
        }
    }

    /// First byte after those that it changes.
    pub(super) fn end(&self) -> u64 {
        match self {
            Self::Zero { offset, len } => offset + len,
            Self::Data { offset, .. } => offset + LOG_SECTOR,
        }
    }
}

/// A file, and the patches that are to be seen over it.
#[derive(Debug)]
pub(super) struct View {
    pub medium: Box<dyn Medium>,
    patches: Vec<Patch>,
    /// Length after replay.
    len: u64,
}

impl View {
    /// A view of a file of `len` bytes with nothing over it.
    pub(super) fn new(medium: Box<dyn Medium>, len: u64) -> Self {
        Self {
            medium,
            patches: Vec::new(),
            len,
        }
    }

    /// Lays patches over the file, later ones over earlier ones, and extends what is seen to `len`.
    pub(super) fn lay_over(&mut self, patches: Vec<Patch>, len: u64) {
        self.patches = patches;
        self.len = self.len.max(len);
    }

    /// The patches that are seen but not in the file.
    pub(super) fn patches(&self) -> &[Patch] {
        &self.patches
    }

    /// Length of the file as it is seen.
    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// Writes all patches into the file and makes them durable.
    pub(super) fn write_out(&mut self) -> io::Result<()> {
        if self.medium.len()? < self.len {
            self.medium.set_len(self.len)?;
        }
        for patch in &self.patches {
            match *patch {
                // A hole first: a range of zeros can be of any length.
                Patch::Zero { offset, len } => {
                    if !self.medium.punch_hole(offset, len)? {
                        self.medium.zero(offset, len)?;
                    }
                }
                Patch::Data { offset, .. } => {
                    self.medium.write_all_at(&self.logged(patch)?, offset)?;
                }
            }
        }
        self.medium.sync_data()?;
        self.patches.clear();
        Ok(())
    }

    /// Fills `buffer` from `offset`. An end of file in between is an error.
    pub(super) fn read(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        if self.patches.is_empty() {
            return self.medium.read_exact_at(buffer, offset);
        }
        let end = offset.saturating_add(buffer.len() as u64);
        if end > self.len {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let in_file = self.medium.len()?.clamp(offset, end) - offset;
        let (held, extended) = buffer.split_at_mut(in_file as usize);
        self.medium.read_exact_at(held, offset)?;
        extended.fill(0);
        for patch in &self.patches {
            let (from, to) = (patch.offset().max(offset), patch.end().min(end));
            if from >= to {
                continue;
            }
            let target = &mut buffer[(from - offset) as usize..(to - offset) as usize];
            match patch {
                Patch::Zero { .. } => target.fill(0),
                Patch::Data { offset, .. } => {
                    target.copy_from_slice(
                        &self.logged(patch)?[(from - offset) as usize..(to - offset) as usize],
                    );
                }
            }
        }
        Ok(())
    }

    /// See [`Medium::next_data`]; holes under patches are not looked for.
    pub(super) fn next_data(&self, offset: u64) -> io::Result<Option<u64>> {
        if self.patches.is_empty() {
            self.medium.next_data(offset)
        } else {
            Ok(Some(offset))
        }
    }

    /// The whole sector of a data patch.
    fn logged(&self, patch: &Patch) -> io::Result<[u8; LOG_SECTOR as usize]> {
        let mut sector = [0; LOG_SECTOR as usize];
        match *patch {
            Patch::Zero { .. } => {}
            Patch::Data {
                leading,
                trailing,
                logged_at,
                ..
            } => {
                self.medium.read_exact_at(&mut sector, logged_at)?;
                sector[..8].copy_from_slice(&leading);
                sector[LOG_SECTOR as usize - 4..].copy_from_slice(&trailing);
            }
        }
        Ok(sector)
    }
}
