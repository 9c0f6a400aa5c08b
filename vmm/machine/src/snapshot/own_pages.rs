//! The pages that guests have written on pmem devices in mode `cow`, which no disk has. They follow RAM in the memory
//! file, one after the other.
//!
//! Each snapshot has all of them, a difference too, so the layers below its memory file are not needed for them.

use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use memshare::{PAGE_SIZE, SharedFile};
use serde::{Deserialize, Serialize};

use super::SnapshotError;
use super::file::NewFile;
use super::runs::{Blocks, SavedRun};
use crate::pmem::{MapBudget, PmemMemory};

/// The pages of a pmem device that differ from its disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OwnPages {
    /// Bytes of the device.
    pub bytes: u64,
    /// The pages, by their offsets in the device.
    pub runs: Vec<SavedRun>,
}

impl OwnPages {
    /// The bytes that they take of the file.
    fn len(&self) -> u64 {
        self.runs.iter().map(|run| run.len).sum()
    }

    /// Each run, and its offset in the file, where that of the first is `start`.
    fn placed(&self, start: u64) -> impl Iterator<Item = (&SavedRun, u64)> {
        self.runs.iter().scan(start, |next, run| {
            let at = *next;
            *next += run.len;
            Some((run, at))
        })
    }
}

/// The own pages of all devices in mode `cow`, by the id of the device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct AllOwnPages(BTreeMap<String, OwnPages>);

fn label(id: &str) -> String {
    format!("pmem {id}")
}

impl AllOwnPages {
    /// Whether no device is in mode `cow`.
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The own pages of these devices.
    #[cfg(feature = "fuzzing")]
    pub(super) fn of(pages: BTreeMap<String, OwnPages>) -> Self {
        Self(pages)
    }

    /// The first device, by id.
    pub(super) fn first(&self) -> Option<&str> {
        self.0.keys().next().map(String::as_str)
    }

    /// Writes the own pages of a guest that is paused, from `start` of the file on.
    ///
    /// # Errors
    /// `OwnPages`, `File`.
    pub(super) fn write<'a>(
        devices: impl Iterator<Item = (&'a str, &'a PmemMemory)>,
        new: &NewFile,
        start: u64,
        blocks: &mut Blocks,
    ) -> Result<Self, SnapshotError> {
        let (mut all, mut next) = (BTreeMap::new(), start);
        let mut devices: Vec<_> = devices.filter(|(_, memory)| memory.is_cow()).collect();
        // They are read back in the order of their ids.
        devices.sort_by_key(|(id, _)| *id);
        for (id, memory) in devices {
            let ranges = memory
                .own_pages()
                .map_err(|source| SnapshotError::OwnPages {
                    pmem: id.to_owned(),
                    source,
                })?;
            let mut runs = Vec::with_capacity(ranges.len());
            for range in ranges {
                let read = |range: Range<u64>, block: &mut [u8]| {
                    memory.window().read(range.start, block);
                };
                let run = blocks.write(new, next, range, read)?;
                next += run.len;
                runs.push(run);
            }
            let bytes = memory.window().len();
            all.insert(id.to_owned(), OwnPages { bytes, runs });
        }
        Ok(Self(all))
    }

    /// Where the file ends that has RAM up to `start`, and these pages after it.
    ///
    /// # Errors
    /// `Contradiction`, where Coppice cannot have written such runs.
    pub(super) fn end(&self, start: u64) -> Result<u64, SnapshotError> {
        let mut end = start;
        for (id, own) in &self.0 {
            if !own.bytes.is_multiple_of(PAGE_SIZE) {
                let what = format!("pmem {id} has {:#x} bytes: no whole pages", own.bytes);
                return Err(SnapshotError::Contradiction(what));
            }
            SavedRun::validate(&own.runs, own.bytes, &label(id))?;
            // The runs do not overlap, so they take no more bytes than the device has.
            end = end.checked_add(own.len()).ok_or_else(|| {
                SnapshotError::Contradiction(format!("pmem {id} ends past what a file can hold"))
            })?;
        }
        Ok(end)
    }

    /// Compares the checksums with the file.
    ///
    /// # Errors
    /// `File`, `Damaged`.
    pub(super) fn verify(&self, start: u64, file: &File, path: &Path) -> Result<(), SnapshotError> {
        let mut next = start;
        for own in self.0.values() {
            for (run, at) in own.placed(next) {
                run.verify(at, file, path)?;
            }
            next += own.len();
        }
        Ok(())
    }

    /// Maps the pages over the disks of the devices, as far as the `budget` of mappings goes, and copies the rest.
    ///
    /// # Errors
    /// `Contradiction` where the devices or their sizes are others, `Memory`, `File`.
    pub(super) fn map_over<'a>(
        &self,
        start: u64,
        file: &Arc<SharedFile>,
        devices: impl Iterator<Item = (&'a str, &'a PmemMemory)>,
        mut budget: MapBudget,
    ) -> Result<(), SnapshotError> {
        let wrong = |what: String| SnapshotError::Contradiction(what);
        let cow = devices.filter(|(_, memory)| memory.is_cow());
        let devices: BTreeMap<&str, &PmemMemory> = cow.collect();
        if let Some(id) = devices.keys().find(|id| !self.0.contains_key(**id)) {
            let what = format!("nothing of what the guest wrote to pmem {id}, whose mode is cow");
            return Err(wrong(what));
        }
        let mut next = start;
        for (id, own) in &self.0 {
            let memory = devices.get(&**id).ok_or_else(|| {
                wrong(format!(
                    "what the guest wrote to pmem {id}, which is none in mode cow"
                ))
            })?;
            let present = memory.window().len();
            if present != own.bytes {
                return Err(wrong(format!(
                    "pmem {id} is {:#x} bytes, and it has {present:#x}",
                    own.bytes
                )));
            }
            for (run, at) in own.placed(next) {
                if budget.take_one_inside() {
                    memory
                        .map_over(run.offset, run.len, file, at)
                        .map_err(SnapshotError::Memory)?;
                } else {
                    copy(file.file(), at, memory, run)
                        .map_err(SnapshotError::file("read", file.path()))?;
                }
            }
            next += own.len();
        }
        Ok(())
    }
}

/// Copies a run, for which the budget has no mapping left.
fn copy(file: &File, at: u64, memory: &PmemMemory, run: &SavedRun) -> std::io::Result<()> {
    let mut page = [0; PAGE_SIZE as usize];
    for offset in (0..run.len).step_by(PAGE_SIZE as usize) {
        file.read_exact_at(&mut page, at + offset)?;
        memory.window().write(run.offset + offset, &page);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use memshare::{Limits, Region, SharedMemory, Window};

    use super::super::memory::{GivenLayers, Layer, MemoryState};
    use super::*;

    const RAM: u64 = 4 * PAGE_SIZE;

    fn disk(folder: &Path, name: &str) -> PathBuf {
        let path = folder.join(name);
        std::fs::write(&path, vec![5; 64 * PAGE_SIZE as usize]).unwrap();
        path
    }

    fn ram() -> SharedMemory {
        let window = Window::reserve(RAM).unwrap();
        SharedMemory::new(vec![Region { start: 0, window }], Limits::of_host(5, false))
    }

    /// Saves the devices of a guest whose RAM is all zeros.
    fn save(path: &Path, devices: &[(&str, &PmemMemory)]) -> MemoryState {
        let new = NewFile::create(path).unwrap();
        let mut blocks = Blocks::new().unwrap();
        let devices = devices.iter().copied();
        let own_pages = AllOwnPages::write(devices, &new, RAM, &mut blocks).unwrap();
        new.finish(own_pages.end(RAM).unwrap()).unwrap();
        new.name().unwrap();
        let zeros = SavedRun {
            offset: 0,
            len: RAM,
            checksums: vec![crc32c::crc32c(&[0; RAM as usize])],
        };
        MemoryState {
            bytes: RAM,
            layers: vec![Layer {
                path: path.to_owned(),
                runs: vec![zeros],
            }],
            own_pages,
        }
    }

    fn load(state: &MemoryState, devices: &[(&str, &PmemMemory)]) -> Result<(), SnapshotError> {
        let state = serde_json::from_str(&serde_json::to_string(state).unwrap()).unwrap();
        let open = MemoryState::open(state, GivenLayers::default(), true)?;
        open.map_over(&ram(), devices.iter().copied())
    }

    fn page(memory: &PmemMemory, page: u64) -> u8 {
        let mut bytes = [0; PAGE_SIZE as usize];
        memory.window().read(page * PAGE_SIZE, &mut bytes);
        assert!(bytes.iter().all(|byte| *byte == bytes[0]));
        bytes[0]
    }

    fn put(memory: &PmemMemory, page: u64, byte: u8) {
        let bytes = [byte; PAGE_SIZE as usize];
        memory.window().write(page * PAGE_SIZE, &bytes);
    }

    #[test]
    fn pages_of_two_devices_come_back_through_three_snapshots_and_zeros_among_them() {
        let folder = tempfile::tempdir().unwrap();
        let paths = ["b", "a"].map(|name| disk(folder.path(), name));
        let devices = || paths.each_ref().map(|path| PmemMemory::cow(path));
        let mut now = devices();
        let mut expected = [vec![5; 70], vec![5; 70]];
        for pages in &mut expected {
            // The memory reads as zeros past the end of the disk.
            pages[64..].fill(0);
        }
        for round in 0..3 {
            let writes = [(0, round, 0), (0, 40, round), (1, 2 * round, 7), (1, 66, 9)];
            for (device, at, byte) in writes {
                put(&now[device], at as u64, byte as u8);
                expected[device][at] = byte as u8;
            }
            let file = folder.path().join(round.to_string());
            let state = save(&file, &[("b", &now[0]), ("a", &now[1])]);
            let len = std::fs::metadata(&file).unwrap().len();
            assert_eq!(len, RAM + (2 + 2 * (round as u64 + 1)) * PAGE_SIZE);
            let loaded = devices();
            load(&state, &[("b", &loaded[0]), ("a", &loaded[1])]).unwrap();
            for (memory, expected) in loaded.iter().zip(&expected) {
                let found: Vec<u8> = (0..70).map(|at| page(memory, at)).collect();
                assert_eq!(&found, expected);
            }
            now = loaded;
        }
    }

    #[test]
    fn beyond_the_budget_of_mappings_pages_are_copied() {
        let folder = tempfile::tempdir().unwrap();
        let path = disk(folder.path(), "disk");
        let memory = PmemMemory::cow(&path);
        (0..10).for_each(|at| put(&memory, 2 * at, 6));
        let state = save(&folder.path().join("memory"), &[("d", &memory)]);
        let file = File::open(folder.path().join("memory")).unwrap();
        let file = memshare::FileRegistry::default()
            .share(&Arc::new(file))
            .unwrap();
        let loaded = PmemMemory::cow(&path);
        let devices = [("d", &loaded)].into_iter();
        let budget = MapBudget::new(5);
        state
            .own_pages
            .map_over(RAM, &file, devices, budget)
            .unwrap();
        let kinds = loaded.window().page_kinds(0, 20 * PAGE_SIZE).unwrap();
        let copied = kinds
            .iter()
            .filter(|kind| **kind == memshare::PageKind::Private);
        assert_eq!(copied.count(), 8);
        assert!((0..20).all(|at| page(&loaded, at) == if at % 2 == 0 { 6 } else { 5 }));
    }

    #[test]
    fn pages_that_are_damaged_contradictory_or_of_another_device_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = disk(folder.path(), "disk");
        let memory = PmemMemory::cow(&path);
        put(&memory, 3, 6);
        let saved = folder.path().join("memory");
        let whole = save(&saved, &[("d", &memory)]);
        let try_load = |state: &MemoryState, id: &str| {
            let loaded = PmemMemory::cow(&path);
            let done = load(state, &[(id, &loaded)]);
            assert!(done.is_ok() || page(&loaded, 3) == 5);
            done
        };
        try_load(&whole, "d").unwrap();
        let mut without = whole.clone();
        without.own_pages = AllOwnPages::default();
        for refused in [
            try_load(&whole, "e"),
            load(&whole, &[]),
            try_load(&without, "d"),
        ] {
            assert!(matches!(refused, Err(SnapshotError::Contradiction(_))));
        }
        let spoil: [fn(&mut OwnPages); 9] = [
            |own| own.bytes += PAGE_SIZE,
            |own| own.bytes = 1,
            |own| own.runs[0].offset = own.bytes,
            |own| own.runs[0].offset = u64::MAX - 4095,
            |own| own.runs[0].offset += 1,
            |own| own.runs[0].len = u64::MAX - 4095,
            |own| own.runs[0].len = 0,
            |own| own.runs[0].checksums.clear(),
            |own| own.runs.push(own.runs[0].clone()),
        ];
        for (number, spoil) in spoil.into_iter().enumerate() {
            let mut state = whole.clone();
            spoil(state.own_pages.0.get_mut("d").unwrap());
            let refused = try_load(&state, "d");
            let expected = matches!(refused, Err(SnapshotError::Contradiction(_)));
            assert!(expected, "{number}: {refused:?}");
        }
        let file = File::options().write(true).open(&saved).unwrap();
        file.write_all_at(b"!", RAM + 9).unwrap();
        let damaged = try_load(&whole, "d");
        assert!(matches!(
            damaged,
            Err(SnapshotError::Damaged { offset: RAM, .. })
        ));
        file.set_len(RAM + PAGE_SIZE - 1).unwrap();
        let cut = try_load(&whole, "d");
        assert!(matches!(cut, Err(SnapshotError::Truncated { .. })));
    }
}
