//! Fields that somebody chose, with checksums that are right: opening ends, without panic and without write where it
//! refuses.

use proptest::prelude::*;

use super::memory::{Contents, Memory};
use super::{SECTOR, created, opened, write};
use crate::disk::{ByteRange, Disk};
use crate::lock::OpenMode;
use crate::vhdx::format::{KIB, MIB, checksum};
use crate::vhdx::{CreateOptions, Vhdx};

/// A structure: where it lies, how long it is, how much of it holds fields, and whether it has a checksum.
#[derive(Clone, Copy, Debug)]
struct Structure {
    offset: u64,
    len: usize,
    fields: usize,
    summed: bool,
}

const STRUCTURES: [Structure; 9] = [
    Structure {
        offset: 64 * KIB,
        len: 4096,
        fields: 80,
        summed: true,
    },
    Structure {
        offset: 128 * KIB,
        len: 4096,
        fields: 80,
        summed: true,
    },
    Structure {
        offset: 192 * KIB,
        len: 65536,
        fields: 80,
        summed: true,
    },
    Structure {
        offset: 256 * KIB,
        len: 65536,
        fields: 80,
        summed: true,
    },
    // The two entries of the log that describe a sector each.
    Structure {
        offset: MIB + 4096,
        len: 8192,
        fields: 96,
        summed: true,
    },
    Structure {
        offset: MIB + 3 * 4096,
        len: 8192,
        fields: 96,
        summed: true,
    },
    Structure {
        offset: 2 * MIB,
        len: 4096,
        fields: 192,
        summed: false,
    },
    Structure {
        offset: 2 * MIB + 64 * KIB,
        len: 4096,
        fields: 40,
        summed: false,
    },
    Structure {
        offset: 3 * MIB,
        len: 4096,
        fields: 256,
        summed: false,
    },
];

/// A disk as a kill leaves it after two flushes.
fn killed() -> Contents {
    let memory = Memory::new(created(&CreateOptions::new(64 * MIB)));
    let disk = opened(&memory, OpenMode::ReadWrite);
    for sector in [0, 4000] {
        write(&disk, &memory, sector, 2, 7).unwrap();
        disk.flush().unwrap();
    }
    memory.contents()
}

fn field() -> impl Strategy<Value = (Structure, usize, usize, u64)> {
    let value = prop_oneof![
        Just(0),
        Just(u64::MAX),
        Just(1_u64 << 63),
        any::<u64>(),
        0..64_u64,
        (0..64_u32).prop_map(|bit| 1 << bit),
        (0..16_u64, 0..8_u64).prop_map(|(mib, low)| (mib << 20) | low),
        (0..400_u64).prop_map(|sectors| sectors * 4096),
        (0..16_u64).prop_map(|mib| (mib << 20).wrapping_neg()),
    ];
    (
        0..STRUCTURES.len(),
        prop_oneof![Just(2_usize), Just(4), Just(8)],
        any::<prop::sample::Index>(),
        value,
    )
        .prop_map(|(structure, width, place, value)| {
            let structure = STRUCTURES[structure];
            (
                structure,
                place.index(structure.fields / width) * width,
                width,
                value,
            )
        })
}

fn set(contents: &mut Contents, structure: Structure, at: usize, width: usize, value: u64) {
    let mut bytes = vec![0; structure.len];
    contents.read(&mut bytes, structure.offset).unwrap();
    bytes[at..at + width].copy_from_slice(&value.to_le_bytes()[..width]);
    if structure.summed {
        let sum = checksum(&bytes).to_le_bytes();
        bytes[4..8].copy_from_slice(&sum);
    }
    contents.write(&bytes, structure.offset);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1500, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn chosen_fields_end_in_a_disk_or_an_error(fields in prop::collection::vec(field(), 1..5)) {
        thread_local!(static KILLED: Contents = killed());
        let mut contents = KILLED.with(Clone::clone);
        for (structure, at, width, value) in fields {
            set(&mut contents, structure, at, width, value);
        }
        for mode in [OpenMode::ReadOnly, OpenMode::ReadWrite] {
            let memory = Memory::new(contents.clone());
            match Vhdx::from_medium(Box::new(std::sync::Arc::clone(&memory)), mode, None) {
                Ok(disk) => {
                    let size = disk.geometry().size / SECTOR * SECTOR;
                    for offset in [0, size / SECTOR / 2 * SECTOR, size.saturating_sub(SECTOR)] {
                        let range = ByteRange::new(offset, SECTOR.min(size)).unwrap();
                        let _ = disk.resolve_read(range, &mut Vec::new());
                        let _ = disk.resolve_write(range, &mut Vec::new());
                    }
                    let _ = disk.flush();
                }
                Err(error) => {
                    prop_assert!(!report::chain(&error).to_string().contains('\n'));
                    // Replay and the headers after it are the last that can fail, and nothing fails here.
                    prop_assert_eq!(memory.count(), 0, "{}", report::chain(&error));
                }
            }
        }
    }
}
