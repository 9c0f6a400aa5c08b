//! The memory files of a snapshot: guest RAM as it is mapped into guests.
//!
//! A memory file has the regions of RAM one behind the other, and a hole wherever nothing was saved. That of a full
//! snapshot stands for itself; that of a difference holds some runs of pages, and what it is laid upon has the others.
//! So a guest's memory is a list of layers, the lowest first. Behind RAM are pages of pmem devices, see `own_pages`.
//! Blocks of each run have checksums, in the state.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memshare::{Content, PAGE_SIZE, SharedMemory};
use serde::{Deserialize, Serialize};

use super::SnapshotError;
use super::file::NewFile;
use super::own_pages::AllOwnPages;
use super::runs::{Blocks, SavedRun};
use crate::pmem::{MapBudget, PmemMemory};

/// Most layers: each is a file that is held open, and mapped.
const MAX_LAYERS: usize = 64;

/// Guest RAM in files.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryState {
    /// Bytes of RAM.
    pub bytes: u64,
    /// The lowest first.
    pub layers: Vec<Layer>,
    /// Pages that are in the uppermost file behind RAM.
    #[serde(default, skip_serializing_if = "AllOwnPages::is_empty")]
    pub own_pages: AllOwnPages,
}

/// One file of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Layer {
    /// The file.
    pub path: PathBuf,
    /// What it holds, by offset.
    pub runs: Vec<SavedRun>,
}

/// Writes what `memory` holds to a file that has not its name yet, and no more than what is not in the base where
/// `diff` says so. The guest stands still.
///
/// # Errors
/// `File` and `Memory`.
pub(super) fn write(
    memory: &SharedMemory,
    new: &NewFile,
    diff: bool,
    blocks: &mut Blocks,
) -> Result<Layer, SnapshotError> {
    let (mut runs, mut start) = (Vec::new(), 0);
    for region in memory.regions() {
        let contents = memory
            .contents(region, diff)
            .map_err(SnapshotError::Memory)?;
        let read = |block: Range<u64>, bytes: &mut [u8]| {
            let first = contents.partition_point(|(range, _)| range.end <= block.start);
            let in_block = contents.iter().skip(first);
            for (range, content) in in_block.take_while(|(range, _)| range.start < block.end) {
                if *content != Content::Bytes {
                    continue;
                }
                let range = range.start.max(block.start)..range.end.min(block.end);
                let place =
                    (range.start - block.start) as usize..(range.end - block.start) as usize;
                if let Some(bytes) = bytes.get_mut(place) {
                    region.window.read(range.start, bytes);
                }
            }
        };
        // A full snapshot is one run, whatever of it is zeros.
        let news = contents.iter().filter(|(_, c)| *c != Content::Base);
        let parts: Vec<Range<u64>> = if diff {
            news.map(|(range, _)| range.clone()).collect()
        } else {
            std::iter::once(0..region.window.len()).collect()
        };
        for part in parts {
            let run = blocks.write(new, start + part.start, part, read)?;
            runs.push(SavedRun {
                offset: start + run.offset,
                ..run
            });
        }
        start += region.window.len();
    }
    let path = new.path().to_owned();
    Ok(Layer { path, runs })
}

impl MemoryState {
    /// Checks what the state says of itself: a hostile one has no say about what is mapped where.
    fn validate(&self) -> Result<(), SnapshotError> {
        let wrong = |what: String| Err(SnapshotError::Contradiction(what));
        if self.layers.is_empty() || self.layers.len() > MAX_LAYERS {
            return wrong(format!(
                "memory has {} files: 1 to {MAX_LAYERS} are possible",
                self.layers.len()
            ));
        }
        for (number, layer) in self.layers.iter().enumerate() {
            SavedRun::validate(&layer.runs, self.bytes, &layer.path.display().to_string())?;
            let held: u64 = layer.runs.iter().map(|run| run.len).sum();
            if number == 0 && held != self.bytes {
                return wrong(format!(
                    "{} holds {held:#x} of {:#x} bytes, and has nothing below it",
                    layer.path.display(),
                    self.bytes
                ));
            }
        }
        Ok(())
    }

    /// Opens the files, the uppermost at `top` if that is given, each as long as it has to be; and compares all
    /// checksums if `verify` says so.
    ///
    /// # Errors
    /// `Contradiction`, `File`, `Truncated`, `Damaged`.
    pub(crate) fn open(
        mut self,
        top: Option<&Path>,
        verify: bool,
    ) -> Result<OpenMemory, SnapshotError> {
        self.validate()?;
        let end = self.own_pages.end(self.bytes)?;
        if let (Some(path), Some(layer)) = (top, self.layers.last_mut()) {
            path.clone_into(&mut layer.path);
        }
        let mut files = Vec::with_capacity(self.layers.len());
        for (number, layer) in self.layers.iter().enumerate() {
            let is_top = number + 1 == self.layers.len();
            let expected = if is_top { end } else { self.bytes };
            let path = &layer.path;
            let file = File::open(path).map_err(SnapshotError::file("open", path))?;
            storage::lock::lock(&file, storage::OpenMode::ReadOnly)
                .map_err(|error| SnapshotError::file("lock", path)(std::io::Error::other(error)))?;
            let found = file
                .metadata()
                .map_err(SnapshotError::file("examine", path))?
                .len();
            if found < expected {
                return Err(SnapshotError::Truncated {
                    path: path.clone(),
                    found,
                    expected,
                });
            }
            if verify {
                for run in &layer.runs {
                    run.verify(run.offset, &file, path)?;
                }
            }
            if verify && is_top {
                self.own_pages.verify(self.bytes, &file, path)?;
            }
            files.push(Arc::new(file));
        }
        Ok(OpenMemory { state: self, files })
    }
}

/// Memory files that are open, and locked against writers.
pub struct OpenMemory {
    state: MemoryState,
    files: Vec<Arc<File>>,
}

impl OpenMemory {
    /// What it is.
    pub fn state(&self) -> &MemoryState {
        &self.state
    }

    /// Puts the one file, which holds all of it, in place of RAM that is the same, and makes it the base. The guest
    /// stands still.
    ///
    /// # Errors
    /// `Memory`.
    pub(crate) fn rebase(&self, memory: &SharedMemory) -> Result<(), SnapshotError> {
        for (layer, file) in self.state.layers.iter().zip(&self.files) {
            let shared = memory
                .files()
                .share(file)
                .map_err(|error| SnapshotError::file("share", &layer.path)(error.into()))?;
            memory.rebase(&shared).map_err(SnapshotError::Memory)?;
        }
        Ok(())
    }

    /// Lays what the guest had written to pmem devices in mode `cow` over their disks, which nobody has touched.
    ///
    /// # Errors
    /// `Contradiction` where the devices are others, `Memory`, `File`.
    pub(crate) fn lay<'a>(
        &self,
        memory: &SharedMemory,
        devices: impl Iterator<Item = (&'a str, &'a PmemMemory)> + Clone,
    ) -> Result<(), SnapshotError> {
        let MemoryState {
            bytes,
            layers,
            own_pages,
        } = &self.state;
        let (Some(layer), Some(file)) = (layers.last(), self.files.last()) else {
            return Ok(());
        };
        let shared = memory
            .files()
            .share(file)
            .map_err(|error| SnapshotError::file("share", &layer.path)(error.into()))?;
        let mapped = devices.clone().map(|(_, memory)| memory.figures());
        let budget = MapBudget::of_host().beside(mapped);
        own_pages.lay(*bytes, &shared, devices, budget)?;
        if !own_pages.is_empty() {
            memory.look_after(shared);
        }
        Ok(())
    }

    /// Maps the files into RAM that nobody has touched, and makes them its base.
    ///
    /// # Errors
    /// `Contradiction` where the RAM is of another size, `Memory`.
    pub fn map(&self, memory: &SharedMemory) -> Result<(), SnapshotError> {
        let present = memory.bytes();
        if present != self.state.bytes {
            return Err(SnapshotError::Contradiction(format!(
                "memory is {:#x} bytes, and the guest has {present:#x}",
                self.state.bytes
            )));
        }
        let mut left = memory.limits().runs;
        for (layer, file) in self.state.layers.iter().zip(&self.files) {
            let shared = memory
                .files()
                .share(file)
                .map_err(|error| SnapshotError::file("share", &layer.path)(error.into()))?;
            for run in &layer.runs {
                let mut start = 0;
                for region in memory.regions() {
                    let len = region.window.len();
                    let part = run.offset.max(start)..(run.offset + run.len).min(start + len);
                    if !part.is_empty() {
                        let (at, size) = (part.start - start, part.end - part.start);
                        if left > 0 {
                            left -= 1;
                            memory
                                .map_base(region.start + at, size, &shared, part.start)
                                .map_err(SnapshotError::Memory)?;
                        } else {
                            // Enough mappings: what is left is the guest's own copy.
                            copy(file, part.start, &region.window, at, size)
                                .map_err(SnapshotError::file("read", &layer.path))?;
                        }
                    }
                    start += len;
                }
            }
        }
        Ok(())
    }
}

fn copy(
    file: &File,
    mut offset: u64,
    window: &memshare::Window,
    mut at: u64,
    mut len: u64,
) -> std::io::Result<()> {
    let mut page = vec![0; PAGE_SIZE as usize];
    while len > 0 {
        file.read_exact_at(&mut page, offset)?;
        window.write(at, &page);
        (offset, at, len) = (offset + PAGE_SIZE, at + PAGE_SIZE, len - PAGE_SIZE);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use memshare::{Limits, Region, Window};
    use proptest::prelude::*;

    use super::*;

    const PAGES: u64 = 40;

    /// Two regions, as with RAM on both sides of the hole.
    fn memory(runs: usize) -> SharedMemory {
        let region = |start: u64, pages: u64| Region {
            start: start * PAGE_SIZE,
            window: Window::reserve(pages * PAGE_SIZE).unwrap(),
        };
        let limits = Limits {
            runs,
            ..Limits::of_host(5, false)
        };
        SharedMemory::new(vec![region(0, 30), region(100, PAGES - 30)], limits)
    }

    fn write(memory: &SharedMemory, path: &Path, diff: bool) -> Result<Layer, SnapshotError> {
        let new = NewFile::create(path)?;
        let layer = super::write(memory, &new, diff, &mut Blocks::new()?)?;
        new.finish(memory.bytes())?;
        new.name()?;
        Ok(layer)
    }

    fn put(memory: &SharedMemory, page: u64, byte: u8) {
        let (region, at) = if page < 30 { (0, page) } else { (1, page - 30) };
        memory.regions()[region]
            .window
            .write(at * PAGE_SIZE, &[byte; PAGE_SIZE as usize]);
    }

    fn bytes(memory: &SharedMemory) -> Vec<u8> {
        let mut all = Vec::new();
        for region in memory.regions() {
            for at in (0..region.window.len()).step_by(PAGE_SIZE as usize) {
                let mut page = [0; PAGE_SIZE as usize];
                region.window.read(at, &mut page);
                assert!(page.iter().all(|byte| *byte == page[0]));
                all.push(page[0]);
            }
        }
        all
    }

    fn state(layers: &[Layer]) -> MemoryState {
        MemoryState {
            bytes: PAGES * PAGE_SIZE,
            layers: layers.to_vec(),
            own_pages: AllOwnPages::default(),
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn each_of_a_chain_of_snapshots_comes_back_as_it_was(
            rounds in prop::collection::vec(
                prop::collection::vec((0..PAGES, any::<u8>(), any::<bool>()), 0..12), 1..5),
            runs in prop_oneof![Just(3usize), Just(1000)],
        ) {
            let folder = tempfile::tempdir().unwrap();
            let mut guest = memory(1000);
            let mut layers: Vec<Layer> = Vec::new();
            for (number, round) in rounds.iter().enumerate() {
                for (page, byte, give_back) in round {
                    if *give_back {
                        let gfn = if *page < 30 { *page } else { page + 70 };
                        guest.give_back(gfn * PAGE_SIZE, PAGE_SIZE).unwrap();
                    } else {
                        put(&guest, *page, *byte);
                    }
                }
                let expected = bytes(&guest);
                let path = folder.path().join(number.to_string());
                let layer = write(&guest, &path, number > 0).unwrap();
                layers.push(layer);
                let open = state(&layers).open(None, true).unwrap();
                let copy = memory(runs);
                open.map(&copy).unwrap();
                prop_assert_eq!(&bytes(&copy), &expected);
                // The next difference is to the copy, which goes on as the guest.
                guest = memory(1000);
                open.map(&guest).unwrap();
            }
        }
    }

    #[test]
    fn zeros_take_no_space_and_a_difference_only_what_has_changed() {
        use std::os::unix::fs::MetadataExt;
        let folder = tempfile::tempdir().unwrap();
        let guest = memory(1000);
        put(&guest, 3, 1);
        put(&guest, 4, 0);
        let layer = write(&guest, &folder.path().join("full"), false).unwrap();
        let metadata = std::fs::metadata(&layer.path).unwrap();
        assert_eq!(metadata.len(), PAGES * PAGE_SIZE);
        assert_eq!(metadata.blocks() * 512, PAGE_SIZE);
        let clone = memory(1000);
        let open = state(&[layer]).open(None, true).unwrap();
        open.map(&clone).unwrap();
        put(&clone, 5, 9);
        put(&clone, 39, 9);
        let layer = write(&clone, &folder.path().join("diff"), true).unwrap();
        let runs: Vec<_> = layer.runs.iter().map(|run| (run.offset, run.len)).collect();
        let page = |number| (number * PAGE_SIZE, PAGE_SIZE);
        assert_eq!(runs, [page(5), page(39)]);
    }

    #[test]
    fn cut_flipped_missing_and_contradictory_memory_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("memory");
        let guest = memory(1000);
        (0..PAGES).for_each(|page| put(&guest, page, 7));
        let layer = write(&guest, &path, false).unwrap();
        let whole = state(std::slice::from_ref(&layer));
        let open = |state: MemoryState| state.open(None, true).map(drop);
        open(whole.clone()).unwrap();
        let file = File::options().write(true).open(&path).unwrap();
        file.write_all_at(&[6], 17 * PAGE_SIZE + 3).unwrap();
        assert!(matches!(
            open(whole.clone()),
            Err(SnapshotError::Damaged { .. })
        ));
        whole.clone().open(None, false).map(drop).unwrap();
        file.set_len(PAGES * PAGE_SIZE - 1).unwrap();
        let cut = whole.clone().open(None, false).map(drop);
        assert!(matches!(cut, Err(SnapshotError::Truncated { .. })));
        std::fs::remove_file(&path).unwrap();
        let gone = open(whole.clone()).unwrap_err().to_string();
        assert!(gone.contains(path.to_str().unwrap()), "{gone}");

        let spoil: [fn(&mut MemoryState); 8] = [
            |state| state.layers.clear(),
            |state| state.layers[0].runs.clear(),
            |state| state.layers[0].runs[0].offset = 1,
            |state| state.layers[0].runs[0].offset = u64::MAX - 4095,
            |state| state.layers[0].runs[0].len += PAGE_SIZE,
            |state| state.layers[0].runs[0].len = 0,
            |state| state.layers[0].runs[0].checksums.clear(),
            |state| state.layers = vec![state.layers[0].clone(); MAX_LAYERS + 1],
        ];
        for (number, spoil) in spoil.into_iter().enumerate() {
            let mut state = whole.clone();
            spoil(&mut state);
            let refused = open(state);
            assert!(
                matches!(refused, Err(SnapshotError::Contradiction(_))),
                "{number}"
            );
        }
    }
}
