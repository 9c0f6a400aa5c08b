//! The file as it is after log replay, whether or not the log has been replayed into it.

use std::collections::BTreeMap;
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

/// What is left to be seen of patches, later ones laid over earlier ones: in order, and none over another. A log can
/// describe one range any number of times, and a read looks at what is in its range alone.
fn visible(patches: &[Patch]) -> Vec<Patch> {
    let mut seen: BTreeMap<u64, Patch> = BTreeMap::new();
    for patch in patches {
        let (from, to) = (patch.offset(), patch.end());
        if from == to {
            continue;
        }
        // What begins before, and what begins inside. All are made of whole sectors, so that only zeros, which can have
        // more than one, are left in part.
        let before = seen.range(..from).next_back();
        let mut covered: Vec<Patch> = before
            .map(|(_, other)| *other)
            .filter(|other| other.end() > from)
            .into_iter()
            .collect();
        covered.extend(seen.range(from..to).map(|(_, other)| *other));
        for other in covered {
            seen.remove(&other.offset());
            for (start, end) in [(other.offset(), from), (to, other.end())] {
                if start < end {
                    let len = end - start;
                    seen.insert(start, Patch::Zero { offset: start, len });
                }
            }
        }
        seen.insert(from, *patch);
    }
    seen.into_values().collect()
}

/// A file, and the patches that are to be seen over it.
#[derive(Debug)]
pub(super) struct View {
    pub medium: Box<dyn Medium>,
    /// In order, and none over another.
    patches: Vec<Patch>,
    /// Changes that the log describes, seen or not.
    changes: usize,
    /// Length after replay.
    len: u64,
}

impl View {
    /// A view of a file of `len` bytes with nothing over it.
    pub(super) fn new(medium: Box<dyn Medium>, len: u64) -> Self {
        Self {
            medium,
            patches: Vec::new(),
            changes: 0,
            len,
        }
    }

    /// Lays patches over the file, later ones over earlier ones, and extends what is seen to `len`.
    pub(super) fn lay_over(&mut self, patches: &[Patch], len: u64) {
        self.changes = patches.len();
        self.patches = visible(patches);
        self.len = self.len.max(len);
    }

    /// What is seen and not in the file, in order, and none over another.
    pub(super) fn patches(&self) -> &[Patch] {
        &self.patches
    }

    /// How many changes the log describes.
    pub(super) fn changes(&self) -> usize {
        self.changes
    }

    /// The patches that reach into a range.
    fn patches_in(&self, offset: u64, end: u64) -> &[Patch] {
        let first = self.patches.partition_point(|patch| patch.end() <= offset);
        let rest = &self.patches[first..];
        &rest[..rest.partition_point(|patch| patch.offset() < end)]
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
        self.changes = 0;
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
        for patch in self.patches_in(offset, end) {
            let (from, to) = (patch.offset().max(offset), patch.end().min(end));
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

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt;
    use std::sync::Arc;

    use proptest::prelude::*;

    use super::*;

    const SECTORS: u64 = 64;

    fn patch() -> impl Strategy<Value = Patch> {
        prop_oneof![
            (0..SECTORS, 0..SECTORS).prop_map(|(sector, len)| Patch::Zero {
                offset: sector * LOG_SECTOR,
                len: len.min(SECTORS - sector) * LOG_SECTOR,
            }),
            (0..SECTORS, any::<u8>()).prop_map(|(sector, byte)| Patch::Data {
                offset: sector * LOG_SECTOR,
                leading: [byte; 8],
                trailing: [byte; 4],
                logged_at: SECTORS * LOG_SECTOR,
            }),
        ]
    }

    /// Ones where the disk is, and twos in the sector that all data patches take their middle from.
    fn file() -> Arc<File> {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&vec![1; (SECTORS * LOG_SECTOR) as usize], 0)
            .unwrap();
        file.write_all_at(&[2; LOG_SECTOR as usize], SECTORS * LOG_SECTOR)
            .unwrap();
        Arc::new(file)
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn a_view_shows_what_its_patches_make_one_after_the_other(
            patches in prop::collection::vec(patch(), 0..40),
            (from, len) in (0..SECTORS * LOG_SECTOR, 0..SECTORS * LOG_SECTOR),
        ) {
            let file = file();
            let mut expected = vec![1; (SECTORS * LOG_SECTOR) as usize];
            for patch in &patches {
                let target = &mut expected[patch.offset() as usize..patch.end() as usize];
                match patch {
                    Patch::Zero { .. } => target.fill(0),
                    Patch::Data { leading, .. } => {
                        target.fill(2);
                        target[..8].copy_from_slice(leading);
                        target[LOG_SECTOR as usize - 4..].fill(leading[0]);
                    }
                }
            }
            let mut view = View::new(Box::new(Arc::clone(&file)), (SECTORS + 1) * LOG_SECTOR);
            view.lay_over(&patches, 0);
            prop_assert!(view.patches().is_sorted_by(|one, next| one.end() <= next.offset()));
            let len = len.min(SECTORS * LOG_SECTOR - from);
            let mut found = vec![9; len as usize];
            view.read(&mut found, from).unwrap();
            prop_assert!(found == expected[from as usize..(from + len) as usize]);
            view.write_out().unwrap();
            let mut found = vec![0; expected.len()];
            file.read_exact_at(&mut found, 0).unwrap();
            prop_assert!(found == expected);
        }
    }

    #[test]
    fn a_read_looks_at_the_patches_in_its_range_alone() {
        // The whole file in one patch, again and again, and then every second sector.
        let whole = Patch::Zero {
            offset: 0,
            len: SECTORS * LOG_SECTOR,
        };
        let mut patches = vec![whole; 1000];
        patches.extend((0..SECTORS / 2).map(|pair| Patch::Data {
            offset: pair * 2 * LOG_SECTOR,
            leading: [0; 8],
            trailing: [0; 4],
            logged_at: 0,
        }));
        let mut view = View::new(Box::new(file()), (SECTORS + 1) * LOG_SECTOR);
        view.lay_over(&patches, 0);
        assert_eq!(view.changes(), 1032);
        assert_eq!(view.patches().len(), 64);
        assert_eq!(view.patches_in(4 * LOG_SECTOR, 5 * LOG_SECTOR).len(), 1);
        assert_eq!(
            view.patches_in(4 * LOG_SECTOR - 1, 5 * LOG_SECTOR + 1)
                .len(),
            3
        );
    }
}
