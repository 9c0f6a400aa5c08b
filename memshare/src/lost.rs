//! Files that change under a guest, and the pages that are lost with them.
//!
//! A page of a private mapping that nobody has written to is the file's own. Where the file is cut, or does not answer, there is no such page any
//! more, and nothing to put in its place: whoever runs the guest is told which page it is.

use std::fmt;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;

use crate::file::{FileChange, OnChange, SharedFile};
use crate::memory::SharedMemory;
use crate::stats::add;
use crate::table::{Run, Table};
use crate::window::PAGE_SIZE;

/// A page of a guest that is a file's, and cannot be read any more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LostPage {
    /// Its guest physical address.
    pub address: u64,
    /// The file, by the name that it had when it was opened.
    pub file: PathBuf,
    /// Where in the file the page is, in bytes.
    pub offset: u64,
    /// What has become of the file, where that is known.
    pub change: Option<FileChange>,
}

impl fmt::Display for LostPage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            address,
            file,
            offset,
            change,
        } = self;
        let file = file.display();
        write!(
            f,
            "guest page {address:#x} is that of {file} at offset {offset:#x}, and cannot be read: "
        )?;
        match change {
            Some(change) => change.fmt(f),
            None => f.write_str("the disk does not give it"),
        }
    }
}

/// Whether a page of a file cannot be had as it was when the file was first shared.
fn is_lost(file: &SharedFile, offset: u64) -> bool {
    // A file that is cut inside a page leaves zeros there, so the last byte tells.
    let last = (offset + PAGE_SIZE).min(file.len()).saturating_sub(1);
    !matches!(file.file().read_at(&mut [0], last), Ok(1))
}

fn first_lost(run: &Run) -> Option<LostPage> {
    let backing = &run.backing;
    (0..run.pages).find_map(|page| {
        let offset = backing.offset + page * PAGE_SIZE;
        is_lost(&backing.file, offset).then(|| LostPage {
            address: (run.gfn + page) * PAGE_SIZE,
            file: backing.file.path().to_owned(),
            offset,
            change: backing.file.check().err(),
        })
    })
}

impl Table {
    /// The first page that cannot be read any more, with its address in the table. Each page is read from its file.
    pub fn lost_page(&self) -> Option<LostPage> {
        self.runs().find_map(|run| first_lost(&run))
    }
}

impl SharedMemory {
    /// The first page that is a file's and cannot be read any more.
    pub fn lost_page(&self) -> Option<LostPage> {
        self.mapped().iter().find_map(first_lost)
    }

    /// Calls `tell` for each file that is found to have changed under the guest. Only the first call of this counts.
    pub fn on_change(&self, tell: Box<OnChange>) {
        if self.on_change.set(tell).is_err() {
            tracing::debug!("somebody is told of changed files already");
        }
    }

    /// Looks after a file that backs memory of the guest beside this one, too.
    pub fn look_after(&self, file: Arc<SharedFile>) {
        self.state().others.push(file);
    }

    /// The files that back pages, or may come to, and are not as they were, with what has become of them.
    pub fn changed_files(&self) -> Vec<(Arc<SharedFile>, FileChange)> {
        let mut files = self.state().others.clone();
        files.extend(self.files().known());
        let changed = |file: Arc<SharedFile>| Some((file.check().err()?, file));
        let changed = files.into_iter().filter_map(changed);
        changed
            .filter(|(_, file)| self.is_in_use(file))
            .map(|(change, file)| (file, change))
            .collect()
    }

    /// What was taken from the guest, so that it can be written to, may be remembered for a moment.
    fn is_in_use(&self, file: &Arc<SharedFile>) -> bool {
        let state = self.state();
        let mut runs = state.mapped.runs().chain(state.candidates.runs());
        runs.any(|run| Arc::ptr_eq(&run.backing.file, file))
            || state.others.iter().any(|other| Arc::ptr_eq(other, file))
    }

    /// Tells of the files that have changed since somebody last looked: `stat` of each.
    pub fn look_at_files(&self) {
        for (file, change) in self.changed_files() {
            self.tell_change(&file, change);
        }
    }

    /// Tells of a change, unless that was done.
    pub(crate) fn tell_change(&self, file: &SharedFile, change: FileChange) {
        let Some(is_first) = file.mark_reported(change) else {
            return;
        };
        if is_first {
            add(&self.stats().changed_files, 1);
        }
        tracing::error!(file = %file.path().display(), %change, "a file that guests share has changed: no more of it is shared");
        if let Some(tell) = self.on_change.get() {
            tell(file, change);
        }
    }
}
