//! The manager with a guest that is a thread, or no more than a model.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, RwLock};
use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::*;
use crate::merge::Progress;

const PAGES: u64 = 64;
const START: u64 = 0x10_0000;
const PAGE: usize = PAGE_SIZE as usize;

/// A guest whose writes and holds exclude each other.
#[derive(Default)]
struct Gate {
    running: RwLock<()>,
    /// A device is at work on this page.
    busy: Option<u64>,
    refuses: bool,
}

impl StandStill for Gate {
    fn cpu_time(&self) -> Duration {
        Duration::ZERO
    }

    fn hold(&self, work: &mut dyn FnMut(&IsBusy<'_>)) -> bool {
        if self.refuses {
            return false;
        }
        let _held = self.running.write().unwrap();
        work(&|address, len| {
            self.busy
                .is_some_and(|page| (address..address + len).contains(&(START + page * PAGE_SIZE)))
        });
        true
    }
}

fn limits() -> Limits {
    Limits {
        cpu_percent: 100,
        burst: Duration::from_secs(10),
        runs: 1000,
        zeros: false,
        base: false,
        huge_pages: false,
    }
}

fn memory(limits: Limits) -> SharedMemory {
    let window = Window::reserve(PAGES * PAGE_SIZE).unwrap();
    SharedMemory::new(
        vec![Region {
            start: START,
            window,
        }],
        limits,
    )
}

fn window(memory: &SharedMemory) -> (&Window, u64) {
    let first = START / PAGE_SIZE;
    memory.locate(&(first..first + PAGES)).unwrap()
}

/// A file in which every page is another.
fn file(seed: u8) -> Arc<File> {
    let mut file = tempfile::tempfile().unwrap();
    for page in 0..PAGES as u8 {
        let mut bytes = vec![seed; PAGE];
        bytes[PAGE - 1] = page;
        file.write_all(&bytes).unwrap();
    }
    Arc::new(file)
}

fn content(seed: u8, page: u64) -> Vec<u8> {
    let mut bytes = vec![seed; PAGE];
    bytes[PAGE - 1] = page as u8;
    bytes
}

/// What a device does for a read of whole pages.
fn read(memory: &SharedMemory, page: u64, count: u64, file: &Arc<File>, seed: u8, from: u64) {
    for index in 0..count {
        window(memory)
            .0
            .write((page + index) * PAGE_SIZE, &content(seed, from + index));
    }
    memory.note_read(
        START + page * PAGE_SIZE,
        count * PAGE_SIZE,
        file,
        from * PAGE_SIZE,
    );
}

/// Merges all there is, however young it is.
fn merge(memory: &SharedMemory, gate: &Gate) -> Progress {
    for run in memory.candidates() {
        if let PageState::Candidate { early_writes, .. } = run.backing.state {
            let aged = PageState::Candidate {
                since: 0,
                early_writes,
            };
            memory.state().candidates.set_state(run, aged);
        }
    }
    let mut progress = memory.merge(gate, || false);
    // A slow machine does not get all done in one hold.
    for _ in 0..100 {
        let more = gate.busy.is_none() && !gate.refuses;
        if progress == Progress::Done || !more {
            break;
        }
        progress = memory.merge(gate, || false);
    }
    progress
}

#[derive(Clone, Debug)]
enum Step {
    Read(u64, u64, bool, u64),
    Place(u64, u64, bool, u64),
    Zero(u64, u64),
    Write(u64, u8),
    Merge,
    GiveBack(u64, u64),
    Unshare(bool),
    Refresh,
    GiveZerosBack,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let range = || (0..PAGES - 16, 1..16u64);
    prop::collection::vec(
        prop_oneof![
            4 => (range(), any::<bool>(), 0..PAGES - 16)
                .prop_map(|((page, count), file, from)| Step::Read(page, count, file, from)),
            2 => (range(), any::<bool>(), 0..PAGES - 16)
                .prop_map(|((page, count), file, from)| Step::Place(page, count, file, from)),
            1 => range().prop_map(|(page, count)| Step::Zero(page, count)),
            4 => (0..PAGES, any::<u8>()).prop_map(|(page, byte)| Step::Write(page, byte)),
            4 => Just(Step::Merge),
            1 => range().prop_map(|(page, count)| Step::GiveBack(page, count)),
            1 => any::<bool>().prop_map(Step::Unshare),
            1 => Just(Step::Refresh),
            1 => Just(Step::GiveZerosBack),
        ],
        0..40,
    )
}

proptest! {
    #[test]
    fn a_guest_reads_what_it_was_given_and_what_it_wrote_whatever_is_shared(steps in steps()) {
        let (memory, gate) = (memory(limits()), Gate::default());
        let files = [(file(1), 1), (file(2), 2)];
        let mut model = vec![vec![0; PAGE]; PAGES as usize];
        for step in steps {
            match step {
                Step::Read(page, count, which, from) | Step::Place(page, count, which, from) => {
                    let (file, seed) = &files[usize::from(which)];
                    let placed = matches!(step, Step::Place(..))
                        && memory.place(START + page * PAGE_SIZE, count * PAGE_SIZE, file, from * PAGE_SIZE);
                    if !placed {
                        read(&memory, page, count, file, *seed, from);
                    }
                    for index in 0..count {
                        model[(page + index) as usize] = content(*seed, from + index);
                    }
                }
                Step::Zero(page, count) => {
                    let done = memory.zero(START + page * PAGE_SIZE, count * PAGE_SIZE);
                    prop_assert_eq!(done.end - done.start, count * PAGE_SIZE);
                    for index in 0..count {
                        model[(page + index) as usize] = vec![0; PAGE];
                    }
                }
                Step::Write(page, byte) => {
                    window(&memory).0.write(page * PAGE_SIZE + 7, &[byte]);
                    model[page as usize][7] = byte;
                }
                Step::Merge => prop_assert_eq!(merge(&memory, &gate), Progress::Done),
                Step::GiveBack(page, count) => {
                    memory.give_back(START + page * PAGE_SIZE, count * PAGE_SIZE).unwrap();
                    for index in 0..count {
                        model[(page + index) as usize] = vec![0; PAGE];
                    }
                }
                Step::Unshare(which) => {
                    let identity = memory.files().share(&files[usize::from(which)].0).unwrap().identity();
                    memory.unshare(identity, &gate).unwrap();
                    prop_assert!(memory.mapped().iter().all(|run| run.backing.file.identity() != identity));
                }
                Step::Refresh => memory.refresh(),
                Step::GiveZerosBack => memory.give_zeros_back(&gate, || false),
            }
            for (page, expected) in model.iter().enumerate() {
                prop_assert!(window(&memory).0.holds(page as u64 * PAGE_SIZE, expected), "page {}", page);
            }
        }
        for (file, seed) in &files {
            for page in 0..PAGES {
                let mut bytes = vec![0; PAGE];
                FileExt::read_exact_at(&**file, &mut bytes, page * PAGE_SIZE).unwrap();
                prop_assert_eq!(bytes, content(*seed, page), "no file ever changes");
            }
        }
    }
}

#[test]
fn equal_pages_are_shared_and_those_that_the_guest_changed_are_not() {
    let (memory, file) = (memory(limits()), file(7));
    read(&memory, 0, 32, &file, 7, 3);
    window(&memory).0.write(9 * PAGE_SIZE, &[1]);
    assert_eq!(merge(&memory, &Gate::default()), Progress::Done);
    let stats = memory.stats();
    assert_eq!(stats.merged.load(Ordering::Relaxed), 31);
    assert_eq!(stats.refused(Refusal::Differs), 1);
    let kinds = window(&memory).0.page_kinds(0, 32 * PAGE_SIZE).unwrap();
    assert_eq!(
        kinds
            .iter()
            .filter(|kind| **kind == PageKind::Private)
            .count(),
        1
    );
    assert!(memory.backing(START + 9 * PAGE_SIZE).is_none());
    let backing = memory.backing(START + 10 * PAGE_SIZE + 5).unwrap();
    assert_eq!(backing.offset, 13 * PAGE_SIZE);
    assert_eq!(
        memory.pages_of(backing.file.identity(), 13 * PAGE_SIZE),
        [START + 10 * PAGE_SIZE]
    );
    // A guest that writes has a copy, and the table learns of it.
    window(&memory).0.write(10 * PAGE_SIZE, &[1]);
    memory.refresh();
    let state = memory.backing(START + 10 * PAGE_SIZE).unwrap().state;
    assert!(matches!(state, PageState::Copied { .. }));
    assert_eq!(stats.copied.load(Ordering::Relaxed), 1);
}

#[test]
fn pages_that_a_device_is_at_work_on_or_a_guest_that_cannot_be_held_wait() {
    let (memory, file) = (memory(limits()), file(7));
    read(&memory, 4, 8, &file, 7, 0);
    let mut gate = Gate {
        busy: Some(6),
        refuses: true,
        ..Gate::default()
    };
    let later = Progress::Later(Duration::ZERO);
    assert_eq!(merge(&memory, &gate), later);
    gate.refuses = false;
    assert_eq!(merge(&memory, &gate), later);
    assert_eq!(memory.stats().merged.load(Ordering::Relaxed), 0);
    gate.busy = None;
    assert_eq!(merge(&memory, &gate), Progress::Done);
    assert_eq!(memory.stats().merged.load(Ordering::Relaxed), 8);
}

#[test]
fn reads_that_do_not_fill_whole_pages_are_counted_and_left_alone() {
    let (memory, file) = (memory(limits()), file(7));
    memory.note_read(START + 512, PAGE_SIZE, &file, 0);
    memory.note_read(START, 512, &file, 0);
    memory.note_read(START + 512, 3 * PAGE_SIZE, &file, 512);
    let stats = memory.stats();
    assert_eq!(stats.refused(Refusal::Unaligned), 1);
    assert_eq!(stats.refused(Refusal::Partial), 3);
    let runs = memory.candidates();
    assert_eq!(runs.len(), 1);
    assert_eq!((runs[0].gfn, runs[0].pages), (START / PAGE_SIZE + 1, 2));
    assert_eq!(runs[0].backing.offset, PAGE_SIZE);
}

#[test]
fn what_is_given_back_reads_as_zeros_whatever_it_was_and_nothing_else_does() {
    let (memory, file) = (memory(limits()), file(7));
    for page in 0..8 {
        window(&memory).0.write(page * PAGE_SIZE, &[9]);
    }
    read(&memory, 2, 2, &file, 7, 0);
    merge(&memory, &Gate::default());
    // Whole pages alone, and of the range what is memory.
    memory
        .give_back(START + PAGE_SIZE - 1, 3 * PAGE_SIZE)
        .unwrap();
    let first = |page: u64| {
        let mut byte = [0];
        window(&memory).0.read(page * PAGE_SIZE, &mut byte);
        byte[0]
    };
    assert_eq!([0, 1, 2, 3, 4].map(first), [9, 0, 0, 7, 9]);
    memory.give_back(0, START + PAGE_SIZE).unwrap();
    memory
        .give_back(START + (PAGES - 1) * PAGE_SIZE, u64::MAX)
        .unwrap();
    assert_eq!([0, 4].map(first), [0, 9]);
    let given = memory.stats().given_back.load(Ordering::Relaxed);
    assert_eq!(given, 4 * PAGE_SIZE);
}

#[test]
fn a_page_that_is_overwritten_soon_is_shared_more_and_more_rarely_and_then_no_more() {
    let (memory, file) = (memory(limits()), file(7));
    for _ in 0..20 {
        read(&memory, 0, 1, &file, 7, 0);
        merge(&memory, &Gate::default());
        window(&memory).0.write(0, &[1]);
    }
    let merged = memory.stats().merged.load(Ordering::Relaxed);
    assert_eq!(merged, 5, "once, and after each of four early writes");
    assert_eq!(memory.stats().refused(Refusal::Rewritten), 15);
}

#[test]
fn the_number_of_runs_is_bounded_and_the_guest_goes_on_unshared() {
    let memory = memory(Limits {
        runs: 8,
        ..limits()
    });
    let file = file(7);
    for page in 0..PAGES / 2 {
        read(&memory, 2 * page, 1, &file, 7, 2 * page);
    }
    assert_eq!(merge(&memory, &Gate::default()), Progress::Done);
    // Short runs take no more than half of what there is.
    assert_eq!(memory.stats().merged.load(Ordering::Relaxed), 4);
    assert_eq!(memory.stats().refused(Refusal::MapLimit), PAGES / 2 - 4);
    read(&memory, 0, 16, &file, 7, 40);
    assert_eq!(merge(&memory, &Gate::default()), Progress::Done);
    assert_eq!(
        memory.stats().merged.load(Ordering::Relaxed),
        20,
        "a long one has room"
    );
    for page in 8..PAGES / 2 {
        assert!(
            window(&memory)
                .0
                .holds(2 * page * PAGE_SIZE, &content(7, 2 * page))
        );
    }
}

#[test]
fn a_file_that_has_changed_is_shared_no_more_and_a_cut_one_is_named() {
    let named = tempfile::NamedTempFile::new().unwrap();
    named.as_file().write_all(&vec![7; 16 * PAGE]).unwrap();
    let file = Arc::new(named.reopen().unwrap());
    let memory = memory(limits());
    window(&memory).0.write(0, &[7; 2 * PAGE]);
    memory.note_read(START, 2 * PAGE_SIZE, &file, 0);
    assert_eq!(merge(&memory, &Gate::default()), Progress::Done);
    assert!(memory.changed_files().is_empty() && memory.lost_page().is_none());
    named.as_file().set_len(PAGE_SIZE).unwrap();
    memory.note_read(START + 4 * PAGE_SIZE, PAGE_SIZE, &file, 0);
    assert_eq!(merge(&memory, &Gate::default()), Progress::Done);
    assert_eq!(memory.stats().merged.load(Ordering::Relaxed), 2);
    assert_eq!(memory.stats().refused(Refusal::FileChanged), 1);
    let changed = memory.changed_files();
    assert_eq!(changed[0].1, FileChange::Truncated { len: PAGE_SIZE });
    let lost = LostPage {
        address: START + PAGE_SIZE,
        file: named.path().to_owned(),
        offset: PAGE_SIZE,
        change: Some(FileChange::Truncated { len: PAGE_SIZE }),
    };
    assert_eq!(memory.lost_page(), Some(lost.clone()));
    assert!(lost.to_string().ends_with("it was cut to 4096 bytes"));
}

#[test]
fn each_kind_of_change_is_reported_once_and_only_while_the_file_backs_pages() {
    let named = tempfile::NamedTempFile::new().unwrap();
    named.as_file().write_all(&[7; 2 * PAGE]).unwrap();
    let file = Arc::new(named.reopen().unwrap());
    let memory = memory(limits());
    let reported = Arc::new(std::sync::Mutex::new(Vec::new()));
    let changes = reported.clone();
    memory.on_change(Box::new(move |file, change| {
        changes
            .lock()
            .unwrap()
            .push((file.path().to_owned(), change));
    }));
    let shared = memory.files().share(&file).unwrap();
    memory.map(START, 2 * PAGE_SIZE, &shared, 0).unwrap();
    memory.look_at_files();
    named
        .as_file()
        .set_modified(std::time::SystemTime::UNIX_EPOCH)
        .unwrap();
    for _ in 0..2 {
        memory.look_at_files();
    }
    named.as_file().set_len(PAGE_SIZE + 1).unwrap();
    for _ in 0..2 {
        memory.look_at_files();
    }
    let cut = FileChange::Truncated { len: PAGE_SIZE + 1 };
    let expected = [FileChange::Written, cut].map(|change| (named.path().to_owned(), change));
    assert_eq!(*reported.lock().unwrap(), expected);
    assert_eq!(memory.stats().changed_files.load(Ordering::Relaxed), 1);
    let lost = memory.lost_page().unwrap();
    assert_eq!(lost.address, START + PAGE_SIZE, "a page that is cut inside");
    memory.zero(START, 2 * PAGE_SIZE);
    assert!(memory.changed_files().is_empty(), "nothing is its any more");
}

#[test]
fn a_merger_that_may_map_nothing_leaves_every_byte_as_it_is() {
    let limits = Limits {
        runs: 0,
        ..limits()
    };
    let (memory, file) = (Arc::new(memory(limits)), file(6));
    let merger = Merger::start(memory.clone(), Arc::new(Gate::default())).unwrap();
    read(&memory, 0, 16, &file, 6, 0);
    while !memory.candidates().is_empty() {
        std::thread::sleep(Duration::from_millis(20));
    }
    drop(merger);
    assert_eq!(memory.stats().merged.load(Ordering::Relaxed), 0);
    assert_eq!(memory.stats().refused(Refusal::MapLimit), 16);
    for page in 0..16 {
        assert!(window(&memory).0.holds(page * PAGE_SIZE, &content(6, page)));
    }
}

#[test]
fn a_reference_takes_the_place_of_pages_that_are_equal() {
    let (memory, reference) = (memory(limits()), tempfile::tempfile().unwrap());
    for page in 0..16 {
        reference
            .write_all_at(&content(3, page), START + page * PAGE_SIZE)
            .unwrap();
    }
    memory.add_reference(&Arc::new(reference)).unwrap();
    for page in 0..16 {
        let mut bytes = content(if page % 4 == 1 { 4 } else { 3 }, page);
        // One that no sample tells.
        if page % 4 == 3 {
            bytes[1] = 9;
        }
        window(&memory).0.write(page * PAGE_SIZE, &bytes);
    }
    memory.note_compared();
    assert_eq!(merge(&memory, &Gate::default()), Progress::Done);
    assert_eq!(memory.stats().merged.load(Ordering::Relaxed), 8);
    assert_eq!(memory.stats().refused(Refusal::Differs), 4);
}

#[test]
fn what_is_again_as_in_the_snapshot_goes_back_to_it() {
    let memory = memory(Limits {
        base: true,
        ..limits()
    });
    let base = memory.files().share(&file(3)).unwrap();
    memory.map_base(START, PAGES * PAGE_SIZE, &base, 0).unwrap();
    for page in 8..16 {
        let seed = if page == 12 { 4 } else { 3 };
        window(&memory)
            .0
            .write(page * PAGE_SIZE, &content(seed, page));
    }
    // What was given back has no mapping of the file any more.
    memory.give_back(START + 30 * PAGE_SIZE, PAGE_SIZE).unwrap();
    window(&memory).0.write(30 * PAGE_SIZE, &content(3, 30));
    let mappings = || std::fs::read_to_string("/proc/self/maps").unwrap();
    let mapped = || {
        mappings()
            .matches(&base.path().display().to_string())
            .count()
    };
    let before = mapped();
    assert_eq!(memory.usage().unwrap().private, 9);
    memory.note_compared();
    assert_eq!(merge(&memory, &Gate::default()), Progress::Done);
    assert_eq!(memory.usage().unwrap().private, 1);
    assert_eq!(memory.stats().refused(Refusal::Differs), 1);
    assert_eq!(
        mapped(),
        before - 1,
        "page 30 has joined its neighbours, and nothing else was mapped"
    );
    for page in 0..PAGES {
        let seed = if page == 12 { 4 } else { 3 };
        assert!(
            window(&memory)
                .0
                .holds(page * PAGE_SIZE, &content(seed, page))
        );
    }
}

#[test]
fn zeros_that_a_guest_holds_take_no_memory() {
    let (memory, file) = (memory(limits()), file(7));
    for page in 0..32 {
        window(&memory)
            .0
            .write(page * PAGE_SIZE + 4095, &[u8::from(page % 4 == 3)]);
    }
    read(&memory, 40, 2, &file, 7, 0);
    merge(&memory, &Gate::default());
    window(&memory).0.write(40 * PAGE_SIZE, &[0; PAGE]);
    let gate = Gate {
        busy: Some(1),
        ..Gate::default()
    };
    let zeroed = || memory.stats().zeroed.load(Ordering::Relaxed);
    // On a busy machine a hold ends after `LONGEST_HOLD`, and the runs that are left have their turn in the next.
    for _ in 0..1000 {
        if zeroed() >= 22 {
            break;
        }
        memory.give_zeros_back(&gate, || false);
    }
    let kinds = window(&memory).0.page_kinds(0, PAGES * PAGE_SIZE).unwrap();
    let private = kinds
        .iter()
        .filter(|kind| **kind == PageKind::Private)
        .count();
    // Every fourth, and the three that a device is at work on.
    assert_eq!(private, 8 + 3);
    assert!(window(&memory).0.holds(40 * PAGE_SIZE, &[0; PAGE]));
    assert!(window(&memory).0.holds(41 * PAGE_SIZE, &content(7, 1)));
    assert!(memory.backing(START + 40 * PAGE_SIZE).is_none());
    assert_eq!(zeroed(), 22);
}

#[test]
fn no_write_is_lost_while_pages_are_merged() {
    let (memory, file) = (Arc::new(memory(limits())), file(5));
    let (gate, ended) = (Arc::new(Gate::default()), Arc::new(AtomicBool::new(false)));
    let merger = Merger::start(memory.clone(), gate.clone()).unwrap();
    let writers: Vec<_> = (0..2)
        .map(|writer| {
            let (memory, gate, ended) = (memory.clone(), gate.clone(), ended.clone());
            let file = file.clone();
            std::thread::spawn(move || {
                let (window, at) = window(&memory);
                let mut round = 0u64;
                while !ended.load(Ordering::Relaxed) {
                    for page in (writer..PAGES).step_by(2) {
                        let offset = at + page * PAGE_SIZE;
                        // A device's read, then a write by the guest to every other page, at any moment of a merge.
                        {
                            let _running = gate.running.read().unwrap();
                            read(&memory, page, 1, &file, 5, page);
                        }
                        let mut expected = content(5, page);
                        if (page + round).is_multiple_of(3) {
                            let _running = gate.running.read().unwrap();
                            expected[11] = round as u8;
                            window.write(offset + 11, &[round as u8]);
                        }
                        assert!(
                            window.holds(offset, &expected),
                            "page {page} in round {round}"
                        );
                    }
                    round += 1;
                    if round.is_multiple_of(64) {
                        std::thread::sleep(Duration::from_millis(300));
                        for page in (writer..PAGES).step_by(2) {
                            window.write(at + page * PAGE_SIZE + 11, &[5]);
                            let expected = content(5, page);
                            assert!(window.holds(at + page * PAGE_SIZE, &expected));
                        }
                    }
                }
            })
        })
        .collect();
    let begun = Instant::now();
    let has_merged = || memory.stats().merged.load(Ordering::Relaxed) > 0;
    while begun.elapsed() < Duration::from_secs(3)
        || !has_merged() && begun.elapsed() < Duration::from_mins(1)
    {
        std::thread::sleep(Duration::from_millis(20));
    }
    ended.store(true, Ordering::Relaxed);
    for writer in writers {
        writer.join().unwrap();
    }
    drop(merger);
    assert!(has_merged(), "something was merged");
    assert!(memory.stats().cpu_nanoseconds.load(Ordering::Relaxed) > 0);
}

#[test]
fn a_file_that_is_not_admitted_is_read_and_not_shared() {
    let (memory, own, foreign) = (memory(limits()), file(1), file(2));
    let admitted = own.clone();
    memory
        .files()
        .admit_by(Box::new(move |file| Arc::ptr_eq(file, &admitted)));
    read(&memory, 0, 4, &own, 1, 0);
    read(&memory, 8, 4, &foreign, 2, 0);
    assert!(!memory.place(START + 16 * PAGE_SIZE, PAGE_SIZE, &foreign, 0));
    assert_eq!(merge(&memory, &Gate::default()), Progress::Done);
    assert_eq!(memory.stats().merged.load(Ordering::Relaxed), 4);
    assert_eq!(memory.stats().refused(Refusal::Domain), 4);
    assert!(window(&memory).0.holds(8 * PAGE_SIZE, &content(2, 0)));
}
