//! The memory files of a snapshot, which are mapped as the RAM of guests.
//!
//! A memory file has the regions of RAM one after the other, with a hole wherever nothing was saved. The file of a full
//! snapshot is complete; the file of a difference holds a delta, and the files below it have the other pages. So a
//! guest's memory is a list of layers, the lowest first. The pages of pmem devices follow RAM, see `own_pages`. The
//! blocks of each run have checksums in the state.

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

/// The most layers: each is a file that is kept open and mapped.
const MAX_LAYERS: usize = 64;

/// The files that a guest's RAM is in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryState {
    /// Bytes of RAM.
    pub bytes: u64,
    /// The layers, the lowest first.
    pub layers: Vec<Layer>,
    /// Pages of pmem devices, which follow RAM in the uppermost file.
    #[serde(default, skip_serializing_if = "AllOwnPages::is_empty")]
    pub own_pages: AllOwnPages,
}

/// One of the files.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Layer {
    /// The file.
    pub path: PathBuf,
    /// The runs of pages that it holds, in the order of their offsets.
    pub runs: Vec<SavedRun>,
}

/// Writes `memory` to a new file: all of it, or the delta to its base where `diff` is set. The guest is paused.
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
        // A full snapshot is one run, even where pages are zeros.
        let delta = contents.iter().filter(|(_, c)| *c != Content::Base);
        let parts: Vec<Range<u64>> = if diff {
            delta.map(|(range, _)| range.clone()).collect()
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
    /// Checks the state by itself, so that a hostile one cannot have pages mapped outside the guest's RAM.
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

    /// Opens the files that are not `given`, checks the lengths of all, and compares all checksums if `verify` is set.
    ///
    /// # Errors
    /// `Contradiction`, `File`, `Truncated`, `Damaged`.
    pub(crate) fn open(
        mut self,
        given: GivenLayers,
        verify: bool,
    ) -> Result<OpenMemory, SnapshotError> {
        self.validate()?;
        let end = self.own_pages.end(self.bytes)?;
        let GivenLayers { lower, top } = given;
        let below = self.layers.len() - 1;
        if !lower.is_empty() && lower.len() != below {
            return Err(SnapshotError::Contradiction(format!(
                "memory has {below} files below the uppermost, and {} are given",
                lower.len()
            )));
        }
        let mut given: Vec<_> = lower.into_iter().map(Some).collect();
        given.resize_with(below, || None);
        given.push(top);
        let mut files = Vec::with_capacity(self.layers.len());
        for (number, (layer, given)) in self.layers.iter_mut().zip(given).enumerate() {
            let is_top = number == below;
            let expected = if is_top { end } else { self.bytes };
            let file = match given {
                Some(LayerFile { path, file }) => {
                    layer.path = path;
                    file
                }
                None => LayerFile::open(&layer.path)?.file,
            };
            let path = &layer.path;
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

/// A memory file that is open, and locked against writers. Nothing of it has been read.
#[derive(Debug)]
pub(crate) struct LayerFile {
    path: PathBuf,
    file: File,
}

impl LayerFile {
    /// Opens a file.
    ///
    /// # Errors
    /// `File`.
    pub(super) fn open(path: &Path) -> Result<Self, SnapshotError> {
        let file = File::open(path).map_err(SnapshotError::file("open", path))?;
        storage::lock::lock(&file, storage::OpenMode::ReadOnly)
            .map_err(|error| SnapshotError::file("lock", path)(std::io::Error::other(error)))?;
        let path = path.to_owned();
        Ok(Self { path, file })
    }
}

/// The memory files that whoever loads a snapshot has named, in place of those that the state names.
#[derive(Debug, Default)]
pub(crate) struct GivenLayers {
    /// All but the uppermost, the lowest first; or none.
    pub lower: Vec<LayerFile>,
    /// The uppermost.
    pub top: Option<LayerFile>,
}

/// Memory files that are open, and locked against writers.
pub struct OpenMemory {
    state: MemoryState,
    files: Vec<Arc<File>>,
}

impl OpenMemory {
    /// The state that the files belong to.
    pub fn state(&self) -> &MemoryState {
        &self.state
    }

    /// Maps the one file, which holds all of RAM, in place of RAM, which holds the same, and makes it the base. The
    /// guest is paused.
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

    /// Maps what the guest had written to pmem devices in mode `cow` over their disks. Nobody has touched the devices'
    /// memory yet.
    ///
    /// # Errors
    /// `Contradiction` where the devices are others, `Memory`, `File`.
    pub(crate) fn map_over<'a>(
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
        own_pages.map_over(*bytes, &shared, devices, budget)?;
        if !own_pages.is_empty() {
            memory.look_after(shared);
        }
        Ok(())
    }

    fn check_size(&self, memory: &SharedMemory) -> Result<(), SnapshotError> {
        let present = memory.bytes();
        if present != self.state.bytes {
            return Err(SnapshotError::Contradiction(format!(
                "memory is {:#x} bytes, and the guest has {present:#x}",
                self.state.bytes
            )));
        }
        Ok(())
    }

    /// Copies the files to RAM that nobody has touched yet and no file can be mapped to, as its pages of `page` bytes
    /// are larger than a file's. Pages of zeros stay untouched.
    ///
    /// # Errors
    /// `Contradiction` where the RAM is of another size, `File`.
    pub(crate) fn copy_to(&self, memory: &SharedMemory, page: u64) -> Result<(), SnapshotError> {
        self.check_size(memory)?;
        let layers = self.state.layers.iter().zip(&self.files);
        for (number, (layer, file)) in layers.enumerate() {
            for run in &layer.runs {
                let mut start = 0;
                for region in memory.regions() {
                    let len = region.window.len();
                    let part = run.offset.max(start)..(run.offset + run.len).min(start + len);
                    if !part.is_empty() {
                        let to = (&region.window, part.start - start);
                        // Nothing is below the first.
                        let how = (page, number == 0);
                        copy(file, part.start, to, part.end - part.start, how)
                            .map_err(SnapshotError::file("read", &layer.path))?;
                    }
                    start += len;
                }
            }
        }
        Ok(())
    }

    /// Maps the files as RAM, which nobody has touched yet, and makes them its base.
    ///
    /// # Errors
    /// `Contradiction` where the RAM is of another size, `Memory`.
    pub fn map(&self, memory: &SharedMemory) -> Result<(), SnapshotError> {
        self.check_size(memory)?;
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
                            // The limit of mappings is reached, so the rest is copied, and is the guest's own.
                            copy(
                                file,
                                part.start,
                                (&region.window, at),
                                size,
                                (PAGE_SIZE, false),
                            )
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

/// Copies a part of a file to a window, at most `block` bytes at a time. With `skip_zeros` a block of zeros is not
/// written, which leaves a page that nobody has touched without memory.
fn copy(
    file: &File,
    mut offset: u64,
    (window, mut at): (&memshare::Window, u64),
    mut len: u64,
    (block, skip_zeros): (u64, bool),
) -> std::io::Result<()> {
    let mut bytes = vec![0; block as usize];
    while len > 0 {
        // Blocks end where the window's pages do.
        let size = (block - at % block).min(len);
        let Some(bytes) = bytes.get_mut(..size as usize) else {
            break;
        };
        file.read_exact_at(bytes, offset)?;
        if !(skip_zeros && bytes.iter().all(|byte| *byte == 0)) {
            window.write(at, bytes);
        }
        (offset, at, len) = (offset + size, at + size, len - size);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use memshare::{Limits, Region, Window};
    use proptest::prelude::*;

    use super::*;

    const PAGES: u64 = 40;

    /// Two regions, as RAM has on both sides of the hole for devices.
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
                let open = state(&layers).open(GivenLayers::default(), true).unwrap();
                let copy = memory(runs);
                open.map(&copy).unwrap();
                prop_assert_eq!(&bytes(&copy), &expected);
                // The next difference is taken of a guest that was loaded from the layers.
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
        let open = state(&[layer]).open(GivenLayers::default(), true).unwrap();
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
        let open = |state: MemoryState| state.open(GivenLayers::default(), true).map(drop);
        open(whole.clone()).unwrap();
        let file = File::options().write(true).open(&path).unwrap();
        file.write_all_at(&[6], 17 * PAGE_SIZE + 3).unwrap();
        assert!(matches!(
            open(whole.clone()),
            Err(SnapshotError::Damaged { .. })
        ));
        whole
            .clone()
            .open(GivenLayers::default(), false)
            .map(drop)
            .unwrap();
        file.set_len(PAGES * PAGE_SIZE - 1).unwrap();
        let cut = whole.clone().open(GivenLayers::default(), false).map(drop);
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
