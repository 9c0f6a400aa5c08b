//! What the fuzzers in `fuzz/` reach the files of a snapshot through: the file of a state, with its checksum made to
//! match, and the runs of pages that a state says its memory files hold.
//!
//! What must hold: nothing panics, memory stays bounded, and what is accepted is in the guest's RAM, page by page where
//! the state says it is.

#![allow(
    clippy::missing_panics_doc,
    reason = "a fuzzer ends where a property fails"
)]

use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use arbitrary::Arbitrary;
use memshare::{Limits, PAGE_SIZE, Region, SharedMemory, Window};

use host::report::chain;

use super::disks::DiskOf;
use super::memory::{GivenLayers, Layer, MemoryState};
use super::own_pages::{AllOwnPages, OwnPages};
use super::runs::SavedRun;
use super::state::GuestState;
use super::{SnapshotError, file};
use crate::pmem::PmemMemory;

/// Pages of RAM, in two regions as on both sides of the hole for devices.
const PAGES: u64 = 600;
const FIRST_PAGES: u64 = 400;
/// Pages of each pmem device, and the devices.
const DEVICE_PAGES: u64 = 512;
const DEVICES: [&str; 2] = ["p", "q"];
/// Pages of a memory file.
const FILE_PAGES: u64 = PAGES + 2 * DEVICE_PAGES;
/// Memory files, each with other bytes.
const FILES: usize = 3;
/// Bytes that share a checksum, in pages.
const BLOCK: u64 = 256;
/// Longest RAM that the state of a file is given.
const MOST_RAM: u64 = 64 << 20;

/// The files that states are loaded with, which no input changes.
struct Files {
    folder: tempfile::TempDir,
    /// What each memory file holds.
    contents: Vec<Vec<u8>>,
    /// A file of zeros with RAM of any size that a state is given.
    zeros: PathBuf,
    limits: Limits,
}

impl Files {
    fn get() -> &'static Self {
        static FILES_ONCE: OnceLock<Files> = OnceLock::new();
        FILES_ONCE.get_or_init(|| Self::make().expect("files in a folder of the host's"))
    }

    fn make() -> std::io::Result<Self> {
        let folder = tempfile::tempdir()?;
        let zeros = folder.path().join("zeros");
        File::create(&zeros)?.set_len(2 * MOST_RAM)?;
        let contents: Vec<Vec<u8>> = (0..FILES).map(content_of).collect();
        for (layer, content) in contents.iter().enumerate() {
            std::fs::write(folder.path().join(layer.to_string()), content)?;
        }
        let disk = vec![0xdd; (DEVICE_PAGES * PAGE_SIZE) as usize];
        std::fs::write(folder.path().join("disk"), disk)?;
        Ok(Self {
            folder,
            contents,
            zeros,
            limits: Limits::of_host(5, false),
        })
    }

    fn layer(&self, layer: usize) -> PathBuf {
        self.folder.path().join(layer.to_string())
    }
}

/// A memory file: each page has its place in it, again and again.
fn content_of(layer: usize) -> Vec<u8> {
    let words = PAGE_SIZE as usize / size_of::<u64>();
    let mut content = Vec::with_capacity((FILE_PAGES * PAGE_SIZE) as usize);
    for page in 0..FILE_PAGES {
        let place = (layer as u64 + 1) << 32 | page;
        content.extend_from_slice(&place.to_le_bytes().repeat(words));
    }
    content
}

/// Pages of a memory file.
fn pages_of(layer: usize, pages: Range<u64>) -> &'static [u8] {
    let bytes = (pages.start * PAGE_SIZE) as usize..(pages.end * PAGE_SIZE) as usize;
    &Files::get().contents[layer][bytes]
}

fn ram(pages: u64, first: u64, limits: Limits) -> std::io::Result<SharedMemory> {
    let region = |start: u64, pages: u64| -> std::io::Result<Region> {
        Ok(Region {
            start: start * PAGE_SIZE,
            window: Window::reserve(pages * PAGE_SIZE)?,
        })
    };
    let second = pages - first;
    let regions = [(0, first), (first + 100, second)].into_iter();
    let regions = regions.filter(|(_, pages)| *pages > 0);
    let regions = regions.map(|(start, pages)| region(start, pages));
    Ok(SharedMemory::new(
        regions.collect::<Result<_, _>>()?,
        limits,
    ))
}

/// Reads a file as the state of a guest, and loads its memory from files of the host's. The header's checksum and
/// length are made to match.
pub fn state(bytes: &[u8]) {
    let mut bytes = bytes.to_vec();
    if let Some((header, json)) = bytes.split_at_mut_checked(24) {
        header[12..16].copy_from_slice(&crc32c::crc32c(json).to_le_bytes());
        header[16..24].copy_from_slice(&(json.len() as u64).to_le_bytes());
    }
    let files = Files::get();
    let path = files.folder.path().join("state");
    std::fs::write(&path, &bytes).expect("room for a file");
    let written = File::open(&path).expect("a file that was written");
    let Ok(mut state) = file::read::<GuestState>(written, &path, None) else {
        return;
    };
    let again = serde_json::to_vec(&state).expect("what was read can be written");
    serde_json::from_slice::<GuestState>(&again).expect("what was written can be read");
    let _ = state.config.validate();
    let disk = files.folder.path().join("disk");
    if let Ok(disk) = storage::open(&disk, &read_only()) {
        let drives: Vec<_> = state
            .drives
            .iter()
            .map(|drive| DiskOf::Drive(&drive.drive_id))
            .collect();
        let pmem = state.pmem.keys().map(|id| DiskOf::Pmem(id));
        for device in drives.into_iter().chain(pmem) {
            let _ = state.check_disk(device, &disk);
        }
    }
    // A path of a state may lead to a device of the host's, which is not what is shown here.
    for layer in &mut state.memory.layers {
        layer.path.clone_from(&files.zeros);
    }
    for verify in [true, false] {
        let Ok(open) = state.memory.clone().open(GivenLayers::default(), verify) else {
            continue;
        };
        let bytes = open.state().bytes;
        check_places(&open.state().layers, bytes);
        if bytes <= MOST_RAM {
            let pages = bytes / PAGE_SIZE;
            let memory = ram(pages, pages / 2, files.limits).expect("address space");
            open.map(&memory).expect("what was checked can be mapped");
        }
        let other = ram(PAGES, FIRST_PAGES, files.limits).expect("address space");
        let refused = open.map(&other);
        assert!(
            bytes == PAGES * PAGE_SIZE || matches!(refused, Err(SnapshotError::Contradiction(_)))
        );
        let _ = open.map_over(&other, std::iter::empty());
    }
}

fn read_only() -> storage::OpenOptions {
    storage::OpenOptions {
        read_only: true,
        format: Some(storage::Format::Raw),
        ..storage::OpenOptions::default()
    }
}

/// The runs of each layer are whole pages of RAM, none of which is there twice, and all of RAM is in the lowest one.
fn check_places(layers: &[Layer], bytes: u64) {
    for (number, layer) in layers.iter().enumerate() {
        assert!(are_pages(&layer.runs, bytes));
        let held: u128 = layer.runs.iter().map(|run| u128::from(run.len)).sum();
        assert!(number > 0 || held == u128::from(bytes));
    }
}

/// Whether runs are whole pages of `bytes`, one behind the other; said in other words than where they are refused.
fn are_pages(runs: &[SavedRun], bytes: u64) -> bool {
    let wide = |run: &SavedRun| {
        (
            u128::from(run.offset),
            u128::from(run.offset) + u128::from(run.len),
        )
    };
    let page = u128::from(PAGE_SIZE);
    runs.iter().map(wide).all(|(start, end)| {
        start < end && start % page == 0 && end % page == 0 && end <= u128::from(bytes)
    }) && runs
        .windows(2)
        .all(|pair| matches!(pair, [one, next] if wide(one).1 <= wide(next).0))
}

/// A run of pages.
#[derive(Arbitrary, Clone, Debug)]
enum Run {
    /// So many pages, so many behind the run before it.
    Behind(u8, u8),
    /// Pages anywhere.
    Pages(u16, u16),
    /// Any bytes.
    Any(u64, u64),
}

/// The runs of a file, and whether each has the checksums of what the file holds.
#[derive(Arbitrary, Clone, Debug)]
struct Runs {
    runs: Vec<Run>,
    wrong: Option<(u8, WrongSum)>,
}

/// How the checksums of a run are wrong.
#[derive(Arbitrary, Clone, Copy, Debug)]
enum WrongSum {
    Other(u32),
    Missing,
    Many,
}

/// The memory of a guest as a state says it is.
#[derive(Arbitrary, Clone, Debug)]
pub struct Index {
    /// Other than that of the guest.
    bytes: Option<u64>,
    /// Whether the lowest file is whole, whatever the runs say.
    is_whole: bool,
    layers: Vec<Runs>,
    own_pages: BTreeMap<u8, (Option<u64>, Runs)>,
    verify: bool,
    /// How many runs are mapped before pages are copied.
    mappings: u8,
}

impl Runs {
    /// The runs as a state has them; whether each of their checksums is that of pages of the file `layer`, where the
    /// pages of the device follow each other from `own` on, or lie at their offsets where there is none.
    fn saved(&self, layer: usize, own: &mut Option<u64>) -> (Vec<SavedRun>, bool) {
        let (mut saved, mut end, mut is_right) = (Vec::new(), 0u64, true);
        for (number, run) in self.runs.iter().take(40).enumerate() {
            let (offset, len) = match run {
                Run::Behind(gap, pages) => (
                    end.saturating_add(u64::from(*gap) * PAGE_SIZE) / PAGE_SIZE * PAGE_SIZE,
                    (u64::from(*pages) + 1) * PAGE_SIZE,
                ),
                Run::Pages(at, pages) => {
                    (u64::from(*at) * PAGE_SIZE, u64::from(*pages) * PAGE_SIZE)
                }
                Run::Any(offset, len) => (*offset, *len),
            };
            end = offset.saturating_add(len);
            let first = own.unwrap_or(offset) / PAGE_SIZE;
            *own = own.map(|own| own.saturating_add(len));
            let mut checksums = sums(layer, first, len / PAGE_SIZE);
            if let Some((at, wrong)) = self.wrong
                && usize::from(at) == number
            {
                match wrong {
                    WrongSum::Other(sum) => {
                        is_right &= checksums.first().is_none_or(|right| *right == sum);
                        checksums.iter_mut().take(1).for_each(|right| *right = sum);
                    }
                    WrongSum::Missing => drop(checksums.pop()),
                    WrongSum::Many => checksums.resize(1000, 0),
                }
            }
            saved.push(SavedRun {
                offset,
                len,
                checksums,
            });
        }
        (saved, is_right)
    }

    fn has_as_many_sums(runs: &[SavedRun]) -> bool {
        let blocks = |run: &SavedRun| run.len.div_ceil(BLOCK * PAGE_SIZE);
        runs.iter()
            .all(|run| run.checksums.len() as u64 == blocks(run))
    }
}

/// The checksums of pages of a file; none where the file has no such pages.
fn sums(layer: usize, first: u64, pages: u64) -> Vec<u32> {
    let Some(end) = first.checked_add(pages).filter(|end| *end <= FILE_PAGES) else {
        return Vec::new();
    };
    let starts = (first..end).step_by(BLOCK as usize);
    let block = |start: u64| pages_of(layer, start..end.min(start + BLOCK));
    starts.map(|start| crc32c::crc32c(block(start))).collect()
}

/// Loads memory by an index.
pub fn memory_index(input: &Index) {
    let files = Files::get();
    let bytes = input.bytes.unwrap_or(PAGES * PAGE_SIZE);
    let (mut layers, mut is_right) = (Vec::new(), true);
    for (number, runs) in input.layers.iter().take(FILES).enumerate() {
        let (mut saved, are_right) = runs.saved(number, &mut None);
        if number == 0 && input.is_whole {
            let checksums = sums(0, 0, PAGES);
            saved = vec![SavedRun {
                offset: 0,
                len: PAGES * PAGE_SIZE,
                checksums,
            }];
        } else {
            is_right &= are_right;
        }
        layers.push(Layer {
            path: files.layer(number),
            runs: saved,
        });
    }
    let top = layers.len().saturating_sub(1);
    let (mut own_pages, mut next) = (BTreeMap::new(), Some(bytes));
    // The pages of the devices follow each other in the order of their ids.
    let devices = input.own_pages.iter().map(|(device, own)| {
        let known = DEVICES.get(usize::from(*device));
        let id = known.map_or_else(|| device.to_string(), ToString::to_string);
        (id, own)
    });
    for (id, (bytes, runs)) in devices.collect::<BTreeMap<_, _>>() {
        let (runs, are_right) = runs.saved(top, &mut next);
        is_right &= are_right;
        let bytes = bytes.unwrap_or(DEVICE_PAGES * PAGE_SIZE);
        own_pages.insert(id, OwnPages { bytes, runs });
    }
    let expected = is_sound(bytes, &layers, &own_pages);
    let state = MemoryState {
        bytes,
        layers,
        own_pages: AllOwnPages::of(own_pages.clone()),
    };
    let opened = state.clone().open(GivenLayers::default(), input.verify);
    let fits = expected && (is_right || !input.verify);
    let open = match opened {
        Ok(open) => open,
        Err(error) => {
            assert!(!fits, "a sound index is refused: {}", chain(&error));
            return;
        }
    };
    assert!(
        expected,
        "an index is accepted that leads elsewhere: {state:?}"
    );
    let limits = Limits {
        runs: usize::from(input.mappings),
        ..files.limits
    };
    let memory = ram(PAGES, FIRST_PAGES, limits).expect("address space");
    let mapped = open.map(&memory);
    assert_eq!(mapped.is_ok(), bytes == PAGES * PAGE_SIZE);
    if mapped.is_err() {
        return;
    }
    check_ram(&memory, &state.layers);
    check_devices(
        &open,
        &memory,
        &own_pages,
        &files.folder.path().join("disk"),
    );
}

/// Whether an index is one that Coppice can have written, for files of these lengths.
fn is_sound(bytes: u64, layers: &[Layer], own_pages: &BTreeMap<String, OwnPages>) -> bool {
    let layers_fit = layers
        .iter()
        .all(|layer| are_pages(&layer.runs, bytes) && Runs::has_as_many_sums(&layer.runs));
    let Some(lowest) = layers.first() else {
        return false;
    };
    let held: u128 = lowest.runs.iter().map(|run| u128::from(run.len)).sum();
    let own_fit = own_pages.values().all(|own| {
        own.bytes % PAGE_SIZE == 0
            && are_pages(&own.runs, own.bytes)
            && Runs::has_as_many_sums(&own.runs)
    });
    let own = own_pages
        .values()
        .flat_map(|own| &own.runs)
        .map(|run| u128::from(run.len));
    let end = u128::from(bytes) + own.sum::<u128>();
    layers_fit && own_fit && held == u128::from(bytes) && end <= u128::from(FILE_PAGES * PAGE_SIZE)
}

/// Each page of RAM is that of the uppermost file that holds it.
fn check_ram(memory: &SharedMemory, layers: &[Layer]) {
    let mut expected = vec![0; PAGES as usize];
    for (number, layer) in layers.iter().enumerate() {
        for run in &layer.runs {
            let pages = run.offset / PAGE_SIZE..(run.offset + run.len) / PAGE_SIZE;
            pages.for_each(|page| expected[page as usize] = number);
        }
    }
    let mut page = [0; PAGE_SIZE as usize];
    let places = memory.regions().iter().flat_map(|region| {
        (0..region.window.len())
            .step_by(PAGE_SIZE as usize)
            .map(move |at| (region, at))
    });
    for (number, (region, at)) in places.enumerate() {
        region.window.read(at, &mut page);
        let place = number as u64;
        let expected = pages_of(expected[number], place..place + 1);
        assert!(page == expected, "page {number}");
    }
}

/// What the guest had written is on the devices, and all else is their disk's.
fn check_devices(
    open: &super::OpenMemory,
    memory: &SharedMemory,
    own_pages: &BTreeMap<String, OwnPages>,
    disk: &Path,
) {
    let devices = DEVICES.map(|id| (id, PmemMemory::cow(disk)));
    let top = open.state().layers.len() - 1;
    let fit = DEVICES.iter().all(|id| own_pages.contains_key(*id))
        && own_pages.len() == DEVICES.len()
        && own_pages
            .values()
            .all(|own| own.bytes == DEVICE_PAGES * PAGE_SIZE);
    let given = devices.iter().map(|(id, memory)| (*id, memory));
    assert_eq!(open.map_over(memory, given).is_ok(), fit);
    if !fit {
        return;
    }
    let mut next = PAGES;
    for (id, device) in &devices {
        let mut expected = vec![None; DEVICE_PAGES as usize];
        for run in own_pages.get(*id).into_iter().flat_map(|own| &own.runs) {
            for page in run.offset / PAGE_SIZE..(run.offset + run.len) / PAGE_SIZE {
                expected[page as usize] = Some(next);
                next += 1;
            }
        }
        let mut bytes = [0; PAGE_SIZE as usize];
        for (page, expected) in (0..).zip(expected) {
            device.window().read(page * PAGE_SIZE, &mut bytes);
            match expected {
                Some(place) => {
                    let expected = pages_of(top, place..place + 1);
                    assert!(bytes == expected, "page {page} of {id}");
                }
                None => assert_eq!(bytes, [0xdd; PAGE_SIZE as usize], "page {page} of {id}"),
            }
        }
    }
}
