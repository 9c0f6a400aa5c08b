//! The table of the crate's documentation: what each request makes of a block in each state, with and without a parent.

use super::memory::{Contents, Memory};
use super::{Family, SECTOR, created, family, filled, opened, value};
use crate::disk::{ByteRange, Disk};
use crate::lock::OpenMode;
use crate::medium::Medium;
use crate::vhdx::bat::{BlockState, Entry};
use crate::vhdx::format::MIB;
use crate::vhdx::{CreateOptions, Vhdx};

use BlockState::{FullyPresent, NotPresent, PartiallyPresent, Undefined, Unmapped, Zero};

const BLOCK: u64 = MIB / SECTOR;
/// The block that is looked at; the last one of the disk, so that a request that ends with the disk covers it.
const HERE: u64 = 3;
/// What the parent holds in all of its sectors.
const OLD: u32 = 7;
/// What was written before the request.
const OWN: u32 = 8;
/// What the request writes.
const NEW: u32 = 9;
/// The sectors of the block that are looked at: those that are written before the request in part, those that are
/// written by it in part, and one that neither touches.
const BEFORE: u64 = HERE * BLOCK + 10;
const TOUCHED: u64 = HERE * BLOCK + 20;
const ELSEWHERE: u64 = HERE * BLOCK + 200;

fn options() -> CreateOptions {
    CreateOptions {
        block_size: 1 << 20,
        ..CreateOptions::new(4 * MIB)
    }
}

fn sectors(first: u64, count: u64) -> ByteRange {
    ByteRange::new(first * SECTOR, count * SECTOR).unwrap()
}

fn block() -> ByteRange {
    sectors(HERE * BLOCK, BLOCK)
}

/// A disk, with or without a parent whose block is full.
enum Subject {
    Alone(Contents),
    Child(Contents, Contents),
}

/// An open subject.
enum Open {
    Alone(Vhdx, std::sync::Arc<Memory>),
    Child(Family),
}

impl Subject {
    fn open(&self, mode: OpenMode) -> Open {
        match self {
            Self::Alone(contents) => {
                let memory = Memory::new(contents.clone());
                Open::Alone(opened(&memory, mode), memory)
            }
            Self::Child(parent, child) => Open::Child(Family::open(parent, child, mode)),
        }
    }

    /// The subject with the block in a state. Present blocks hold `OWN`: all of them, or where they are partially
    /// present the sectors around `BEFORE`.
    fn in_state(with_parent: bool, state: BlockState) -> Self {
        let subject = if with_parent {
            let (parent, child) = family(&options(), &[(HERE * BLOCK, BLOCK, OLD)]);
            Self::Child(parent, child)
        } else {
            Self::Alone(created(&options()))
        };
        let open = subject.open(OpenMode::ReadWrite);
        match state {
            NotPresent => {}
            Undefined => {
                // No request leads here; Hyper-V writes it for space that a guest never used.
                let disk = open.disk();
                open.write(HERE * BLOCK, BLOCK, OWN);
                disk.flush().unwrap();
                disk.write_zeroes(block(), true).unwrap();
                disk.state.lock().set_block(HERE, Entry::absent(Undefined));
            }
            Zero => open.disk().write_zeroes(block(), true).unwrap(),
            Unmapped => {
                open.write(HERE * BLOCK, BLOCK, OWN);
                open.disk().discard(block()).unwrap();
            }
            FullyPresent => open.write(HERE * BLOCK, BLOCK, OWN),
            PartiallyPresent => open.write(BEFORE, 4, OWN),
        }
        if !with_parent && state == Zero {
            // Zeros without a parent need no entry that says so.
            open.write(HERE * BLOCK, BLOCK, OWN);
            open.disk().write_zeroes(block(), true).unwrap();
        }
        assert_eq!(open.state(), state, "with parent: {with_parent}");
        open.closed()
    }
}

impl Open {
    fn disk(&self) -> &Vhdx {
        match self {
            Self::Alone(disk, _) => disk,
            Self::Child(family) => &family.disk,
        }
    }

    fn write(&self, sector: u64, count: u64, value: u32) {
        match self {
            Self::Alone(disk, memory) => super::write(disk, memory, sector, count, value).unwrap(),
            Self::Child(family) => family.write(sector, count, value),
        }
    }

    fn value(&self, sector: u64) -> u32 {
        match self {
            Self::Alone(disk, memory) => value(disk, memory, sector).unwrap(),
            Self::Child(family) => family.value(sector),
        }
    }

    fn state(&self) -> BlockState {
        self.disk()
            .with_state(|state| Ok(state.block(HERE)?.state))
            .unwrap()
    }

    fn closed(self) -> Subject {
        self.disk().close().unwrap();
        self.contents()
    }

    fn contents(&self) -> Subject {
        match self {
            Self::Alone(_, memory) => Subject::Alone(memory.contents()),
            Self::Child(family) => {
                Subject::Child(family.parent.contents(), family.child.contents())
            }
        }
    }

    /// What the sectors around `BEFORE`, `TOUCHED` and `ELSEWHERE` hold.
    fn values(&self) -> [u32; 3] {
        [BEFORE, TOUCHED, ELSEWHERE].map(|sector| self.value(sector))
    }
}

/// A request: its name, and what it does.
type Request = (&'static str, fn(&Open));

const REQUESTS: [Request; 8] = [
    ("read", |open| {
        open.values();
    }),
    ("write a part", |open| {
        open.write(TOUCHED, 4, NEW);
    }),
    ("write the block", |open| {
        open.write(HERE * BLOCK, BLOCK, NEW);
    }),
    ("trim a part", |open| {
        open.disk().discard(sectors(TOUCHED, 4)).unwrap();
    }),
    ("trim the block", |open| {
        open.disk().discard(block()).unwrap();
    }),
    ("zero a part", |open| {
        open.disk().write_zeroes(sectors(TOUCHED, 4), true).unwrap();
    }),
    ("zero the block", |open| {
        open.disk().write_zeroes(block(), true).unwrap();
    }),
    ("zero the block and keep its space", |open| {
        open.disk().write_zeroes(block(), false).unwrap();
    }),
];

/// A cell: the state that the block has afterwards, and what the sectors around `BEFORE`, `TOUCHED` and `ELSEWHERE`
/// hold.
type Cell = (BlockState, [u32; 3]);

/// The cells of a state, in the order of `REQUESTS`.
fn expected(with_parent: bool, state: BlockState) -> [Cell; 8] {
    let zeros = [0; 3];
    let all_new = (FullyPresent, [NEW; 3]);
    let empty = (state, zeros);
    match (state, with_parent) {
        (NotPresent, true) => [
            (NotPresent, [OLD; 3]),
            (PartiallyPresent, [OLD, NEW, OLD]),
            all_new,
            (NotPresent, [OLD; 3]),
            (Unmapped, zeros),
            (PartiallyPresent, [OLD, 0, OLD]),
            (Zero, zeros),
            (Zero, zeros),
        ],
        (Undefined | Unmapped, _) => [
            empty,
            (FullyPresent, [0, NEW, 0]),
            all_new,
            empty,
            empty,
            (Zero, zeros),
            (Zero, zeros),
            (Zero, zeros),
        ],
        (NotPresent, false) | (Zero, _) => [
            empty,
            (FullyPresent, [0, NEW, 0]),
            all_new,
            empty,
            empty,
            empty,
            empty,
            empty,
        ],
        (FullyPresent, _) => [
            (FullyPresent, [OWN; 3]),
            (FullyPresent, [OWN, NEW, OWN]),
            all_new,
            (FullyPresent, [OWN, 0, OWN]),
            (Unmapped, zeros),
            (FullyPresent, [OWN, 0, OWN]),
            (Zero, zeros),
            (FullyPresent, zeros),
        ],
        (PartiallyPresent, _) => [
            (PartiallyPresent, [OWN, OLD, OLD]),
            (PartiallyPresent, [OWN, NEW, OLD]),
            all_new,
            (PartiallyPresent, [OWN, OLD, OLD]),
            (Unmapped, zeros),
            (PartiallyPresent, [OWN, 0, OLD]),
            (Zero, zeros),
            (FullyPresent, zeros),
        ],
    }
}

/// All states that a block can have.
fn states(with_parent: bool) -> impl Iterator<Item = BlockState> {
    [
        NotPresent,
        Undefined,
        Zero,
        Unmapped,
        FullyPresent,
        PartiallyPresent,
    ]
    .into_iter()
    .filter(move |state| with_parent || *state != PartiallyPresent)
}

#[test]
fn every_request_does_to_every_state_what_the_table_says() {
    for with_parent in [false, true] {
        for state in states(with_parent) {
            let subject = Subject::in_state(with_parent, state);
            for ((name, request), (after, values)) in
                REQUESTS.into_iter().zip(expected(with_parent, state))
            {
                let context = format!("{name}: {state:?}, with parent: {with_parent}");
                let open = subject.open(OpenMode::ReadWrite);
                request(&open);
                assert_eq!((open.state(), open.values()), (after, values), "{context}");
                // After a flush and a kill.
                open.disk().flush().unwrap();
                let cut = open.contents().open(OpenMode::ReadOnly);
                assert_eq!(
                    (cut.state(), cut.values()),
                    (after, values),
                    "{context}, cut"
                );
                // After a close.
                let closed = open.closed().open(OpenMode::ReadOnly);
                assert_eq!(
                    (closed.state(), closed.values()),
                    (after, values),
                    "{context}, closed"
                );
            }
        }
    }
}

#[test]
fn what_a_request_leaves_as_it_is_does_not_change_the_file() {
    for with_parent in [false, true] {
        for state in states(with_parent) {
            let subject = Subject::in_state(with_parent, state);
            let before = subject.open(OpenMode::ReadWrite);
            for ((name, request), (after, values)) in
                REQUESTS.into_iter().zip(expected(with_parent, state))
            {
                let changes_nothing =
                    after == state && values == before.values() && !after.is_present();
                if name != "read" && !changes_nothing {
                    continue;
                }
                let open = subject.open(OpenMode::ReadWrite);
                request(&open);
                let context = format!("{name}: {state:?}, with parent: {with_parent}");
                match (open.closed(), &subject) {
                    (Subject::Alone(after), Subject::Alone(before))
                    | (Subject::Child(_, after), Subject::Child(_, before)) => {
                        assert_eq!(&after, before, "{context}");
                    }
                    (Subject::Alone(_) | Subject::Child(..), _) => unreachable!(),
                }
            }
        }
    }
}

#[test]
fn a_sector_written_in_flight_shows_the_parent_until_it_is_there() {
    let (parent, child) = family(&options(), &[(HERE * BLOCK, BLOCK, OLD)]);
    let family = Family::open(&parent, &child, OpenMode::ReadWrite);
    let mut extents = Vec::new();
    let range = sectors(TOUCHED, 1);
    let first = family.disk.resolve_write(range, &mut extents).unwrap();
    assert_eq!(family.value(TOUCHED), OLD);
    family.disk.flush().unwrap();
    let killed = Family::open(
        &family.parent.contents(),
        &family.child.contents(),
        OpenMode::ReadOnly,
    );
    assert_eq!(killed.value(TOUCHED), OLD);
    // The transfer fails: as if it had never been.
    family.disk.finish(first, false);
    assert_eq!(family.value(TOUCHED), OLD);
    let second = family.disk.resolve_write(range, &mut extents).unwrap();
    if let crate::disk::ExtentKind::Data { file_offset, .. } = extents[1].kind {
        family
            .child
            .write_all_at(&filled(NEW, SECTOR), file_offset)
            .unwrap();
    }
    assert_eq!(family.value(TOUCHED), OLD);
    family.disk.finish(second, true);
    assert_eq!(family.value(TOUCHED), NEW);
    let again = family.reopened(true, OpenMode::ReadOnly);
    assert_eq!(again.value(TOUCHED), NEW);
    assert_eq!(again.value(ELSEWHERE), OLD);
}

#[test]
fn a_block_whose_last_sector_comes_is_fully_present() {
    let (parent, child) = family(&options(), &[(HERE * BLOCK, BLOCK, OLD)]);
    let family = Family::open(&parent, &child, OpenMode::ReadWrite);
    for sector in (0..BLOCK).rev() {
        assert_eq!(family.value(HERE * BLOCK + sector), OLD);
        family.write(HERE * BLOCK + sector, 1, NEW);
    }
    let state = |disk: &Vhdx| {
        disk.with_state(|state| Ok(state.block(HERE)?.state))
            .unwrap()
    };
    assert_eq!(state(&family.disk), FullyPresent);
    let again = family.reopened(true, OpenMode::ReadOnly);
    assert_eq!(state(&again.disk), FullyPresent);
    assert!((0..BLOCK).all(|sector| again.value(HERE * BLOCK + sector) == NEW));
}
