//! Changes of what is not a block: the size, the parent locator. Each is one entry of the log, so that a cut leaves it done or not.

use std::collections::BTreeMap;
use std::sync::PoisonError;
use std::time::Duration;

use super::bat::PAGE;
use super::commit::Commit;
use super::disk::{Held, Level, State, Vhdx, lock};
use super::format::PARENT_LOCATOR;
use super::locator::ParentLocator;
use super::metadata::{ItemAt, Metadata};
use super::pages::{Bytes, blank, page_of};
use crate::disk::DiskError;
use crate::refusal::Refusal;

/// How long requests in flight are waited for at once.
const PATIENCE: Duration = Duration::from_millis(20);

/// A refusal of a file that was found sound when it was opened.
pub(super) fn refused(refusal: Refusal) -> DiskError {
    match refusal {
        Refusal::Io { operation, error } => DiskError::Io {
            operation,
            source: error,
        },
        Refusal::Corrupt {
            structure,
            offset,
            expected,
        } => DiskError::Corrupt {
            structure,
            offset,
            expected,
        },
        other => DiskError::Unsupported(other.to_string()),
    }
}

impl Vhdx {
    /// Where an item of the metadata lies.
    pub(super) fn item(
        &self,
        commit: &Commit,
        id: super::format::Guid,
        name: &str,
    ) -> Result<ItemAt, DiskError> {
        let read = |buffer: &mut [u8], offset| self.view.read(buffer, offset);
        Metadata::find(&read, commit.metadata, id)
            .map_err(refused)?
            .ok_or_else(|| DiskError::Corrupt {
                structure: format!("metadata item \"{name}\""),
                offset: commit.metadata.offset,
                expected: "expected this item, found none".into(),
            })
    }

    /// Writes bytes outside the BAT by one entry of the log, and makes them durable in place. The file has been announced.
    pub(super) fn amend(
        &self,
        commit: &mut Commit,
        writes: &[(u64, &[u8])],
    ) -> Result<(), DiskError> {
        let mut sectors: BTreeMap<u64, Bytes> = BTreeMap::new();
        for (offset, bytes) in writes {
            let end = offset + bytes.len() as u64;
            for page in (page_of(*offset)..end).step_by(PAGE as usize) {
                let sector = match sectors.entry(page) {
                    std::collections::btree_map::Entry::Occupied(known) => known.into_mut(),
                    std::collections::btree_map::Entry::Vacant(new) => {
                        let mut sector = blank();
                        self.view
                            .read(&mut sector[..], page)
                            .map_err(|source| DiskError::Io {
                                operation: format!("read the metadata at file offset {page:#x}"),
                                source,
                            })?;
                        new.insert(sector)
                    }
                };
                let (from, to) = (page.max(*offset), (page + PAGE).min(end));
                let source = &bytes[(from - offset) as usize..(to - offset) as usize];
                sector[(from - page) as usize..(to - page) as usize].copy_from_slice(source);
            }
        }
        let sectors: Vec<_> = sectors.iter().map(|(at, bytes)| (*at, &**bytes)).collect();
        let end = lock(&self.state).space.end();
        self.log_sectors(commit, &sectors, end)?;
        self.sync(commit.log.as_mut())
    }

    /// Records where the parent is, and what it is. What a reader of the disk sees does not change.
    pub(super) fn set_locator(&self, locator: ParentLocator) -> Result<(), DiskError> {
        if self.is_read_only() {
            return Err(DiskError::ReadOnly);
        }
        self.announce(Level::File)?;
        let mut commit = lock(&self.commit);
        let item = locator.to_disk();
        let read = |buffer: &mut [u8], offset| self.view.read(buffer, offset);
        let len = item.len() as u64;
        let at = self.item(&commit, PARENT_LOCATOR, "parent locator")?;
        let room = Metadata::room(&read, commit.metadata, PARENT_LOCATOR, len)
            .map_err(refused)?
            .ok_or_else(|| {
                DiskError::Unsupported(format!(
                    "the metadata region has no room for a parent locator of {len} bytes"
                ))
            })?;
        let place = [room.to_le_bytes(), (item.len() as u32).to_le_bytes()].concat();
        // Offset and length follow the GUID in the table's entry.
        let writes: [(u64, &[u8]); 2] = [
            (at.entry + 16, &place),
            (commit.metadata.offset + u64::from(room), &item),
        ];
        self.amend(&mut commit, &writes)?;
        lock(&self.state).locator = Some(locator);
        Ok(())
    }

    /// The locator of a child.
    pub fn locator(&self) -> Option<ParentLocator> {
        lock(&self.state).locator.clone()
    }

    /// Does work while nobody changes any entry, and none waits for a commit.
    pub(super) fn while_held<T>(
        &self,
        work: impl FnOnce(&mut Commit) -> Result<T, DiskError>,
    ) -> Result<T, DiskError> {
        self.hold(Held::Everything);
        // The commit lock comes after: who is waited for may need it.
        let mut commit = lock(&self.commit);
        let worked = self
            .commit_under(&mut commit)
            .and_then(|()| work(&mut commit));
        self.let_go();
        worked
    }

    /// Lets nobody begin to change something, and waits until every request is over that began before.
    ///
    /// Who is waited for may wait for this: a thread with requests in flight begins another. So this gives way after a while,
    /// and tries again.
    pub(super) fn hold(&self, what: Held) {
        loop {
            let mut state = self
                .changed
                .wait_while(lock(&self.state), |state| state.held.is_some())
                .unwrap_or_else(PoisonError::into_inner);
            state.held = Some(what);
            let epoch = state.flights.advance();
            let (mut state, waited) = self
                .changed
                .wait_timeout_while(state, PATIENCE, |state: &mut State| {
                    !state.flights.is_over(epoch)
                })
                .unwrap_or_else(PoisonError::into_inner);
            if !waited.timed_out() {
                return;
            }
            state.held = None;
            drop(state);
            self.changed.notify_all();
            std::thread::sleep(PATIENCE);
        }
    }

    /// Ends what holds still.
    pub(super) fn let_go(&self) {
        lock(&self.state).held = None;
        self.changed.notify_all();
    }
}
