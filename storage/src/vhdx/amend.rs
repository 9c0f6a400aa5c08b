//! Changes of what is not a block: the size, the parent locator. Each is one entry of the log, so that a cut leaves it
//! done or not.

use std::collections::BTreeMap;
use std::time::Duration;

use super::bat::PAGE;
use super::disk::Vhdx;
use super::format::PARENT_LOCATOR;
use super::locator::ParentLocator;
use super::metadata::{ItemAt, Metadata};
use super::pages::{Bytes, blank, page_of};
use super::state::{Commit, Exclusion, Level, State};
use crate::disk::DiskError;
use crate::refusal::Refusal;

/// How long requests in flight are waited for at once.
const PATIENCE: Duration = Duration::from_millis(20);

/// A refusal of a file that was found sound when it was opened.
pub(super) fn refused(refusal: Refusal) -> DiskError {
    match refusal {
        Refusal::Io { operation, source } => DiskError::Io { operation, source },
        Refusal::Corrupt {
            structure,
            offset,
            expected,
        } => DiskError::Corrupt {
            structure,
            offset,
            expected,
        },
        other => DiskError::Unsupported(report::chain(&other).to_string()),
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

    /// Writes bytes outside the BAT by one entry of the log, and makes them durable in place. The file has been
    /// announced.
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
        let end = self.state.lock().space.end();
        self.log_sectors(commit, &sectors, end)?;
        self.sync(commit.log.as_mut())
    }

    /// Records where the parent is, and what it is. What a reader of the disk sees does not change.
    pub(super) fn set_locator(&self, locator: ParentLocator) -> Result<(), DiskError> {
        if self.is_read_only() {
            return Err(DiskError::ReadOnly);
        }
        self.announce(Level::File)?;
        let mut commit = self.commit.lock();
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
        self.state.lock().locator = Some(locator);
        Ok(())
    }

    /// The locator of a child.
    pub fn locator(&self) -> Option<ParentLocator> {
        self.state.lock().locator.clone()
    }

    /// Does work while no request changes an entry, and no changed entry waits for a commit.
    pub(super) fn while_excluded<T>(
        &self,
        work: impl FnOnce(&mut Commit) -> Result<T, DiskError>,
    ) -> Result<T, DiskError> {
        self.exclude(Exclusion::Everything);
        // The commit lock is taken after that, as a request that is waited for may need it.
        let mut commit = self.commit.lock();
        let worked = self
            .commit_under(&mut commit)
            .and_then(|()| work(&mut commit));
        self.readmit();
        worked
    }

    /// Lets no new request change what is excluded, and waits until all requests that began before are over.
    ///
    /// A request that is waited for may itself wait for this: a thread that has requests in flight begins another,
    /// which is excluded. So the exclusion is lifted after a while, and tried again.
    pub(super) fn exclude(&self, what: Exclusion) {
        loop {
            let mut state = self.state.lock();
            self.changed
                .wait_while(&mut state, |state| state.excluded.is_some());
            state.excluded = Some(what);
            let epoch = state.in_flight.advance();
            let waited = self.changed.wait_while_for(
                &mut state,
                |state: &mut State| !state.in_flight.is_over(epoch),
                PATIENCE,
            );
            if !waited.timed_out() {
                return;
            }
            state.excluded = None;
            drop(state);
            self.changed.notify_all();
            std::thread::sleep(PATIENCE);
        }
    }

    /// Ends the exclusion.
    pub(super) fn readmit(&self) {
        self.state.lock().excluded = None;
        self.changed.notify_all();
    }
}
