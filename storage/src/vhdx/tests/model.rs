//! Random requests against a map of sectors.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::memory::Memory;
use super::{SECTOR, created, opened, value, write};
use crate::disk::{ByteRange, Disk, SectorSize};
use crate::lock::OpenMode;
use crate::vhdx::CreateOptions;
use crate::vhdx::format::MIB;

#[derive(Clone, Debug)]
enum Request {
    Write {
        sector: u64,
        count: u64,
    },
    Zero {
        sector: u64,
        count: u64,
        may_unmap: bool,
    },
    Discard {
        sector: u64,
        count: u64,
    },
    Flush,
    Close,
    Reopen,
    /// Opens what a kill at this moment leaves.
    Kill,
}

fn requests(sectors: u64) -> impl Strategy<Value = Vec<Request>> {
    // Near the ends of blocks, anywhere, and at the end of the disk.
    let place = prop_oneof![
        (0..sectors / 256).prop_map(|block| block * 256 + 254),
        0..sectors,
        Just(sectors - 1),
    ];
    // Now and then whole blocks.
    let len = prop_oneof![6 => 1..5_u64, 1 => 250..600_u64];
    let range = (place, len).prop_map(move |(sector, count)| (sector, count.min(sectors - sector)));
    let request = prop_oneof![
        8 => range.clone().prop_map(|(sector, count)| Request::Write { sector, count }),
        2 => (range.clone(), any::<bool>())
            .prop_map(|((sector, count), may_unmap)| Request::Zero { sector, count, may_unmap }),
        2 => range.prop_map(|(sector, count)| Request::Discard { sector, count }),
        2 => Just(Request::Flush),
        1 => Just(Request::Close),
        1 => Just(Request::Reopen),
        1 => Just(Request::Kill),
    ];
    prop::collection::vec(request, 1..60)
}

fn disks() -> impl Strategy<Value = (CreateOptions, Vec<Request>)> {
    let block = prop_oneof![Just(1_u32), Just(2), Just(8), Just(256)];
    let sector = prop_oneof![Just(SectorSize::B512), Just(SectorSize::B4096)];
    (block, sector, any::<bool>(), 1..3000_u64).prop_flat_map(
        |(block, logical_sector, fixed, extra)| {
            // Fixed disks are small; dynamic ones reach past the first page and some past the first chunk.
            let size = if fixed {
                3 * MIB + extra * SECTOR
            } else {
                extra * 2 * MIB + SECTOR
            };
            let options = CreateOptions {
                block_size: block << 20,
                logical_sector,
                fixed,
                ..CreateOptions::new(size)
            };
            requests(size / SECTOR).prop_map(move |requests| (options, requests))
        },
    )
}

fn range(sector: u64, count: u64) -> ByteRange {
    ByteRange::new(sector * SECTOR, count * SECTOR).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_disk_reads_as_a_map_of_its_sectors((options, requests) in disks()) {
        let mut memory = Memory::new(created(&options));
        let mut disk = opened(&memory, OpenMode::ReadWrite);
        let mut model: BTreeMap<u64, u32> = BTreeMap::new();
        // What a sector may hold after a kill: what was flushed, and all it was since. A kill keeps all writes that
        // reached the file, but not what was said of blocks, so a trimmed block may come back as it was last written.
        let mut flushed: BTreeMap<u64, Vec<u32>> = BTreeMap::new();
        for (request, stamp) in requests.into_iter().zip(1..) {
            if let Request::Write { sector, count } | Request::Zero { sector, count, .. } | Request::Discard { sector, count } = &request {
                for sector in *sector..sector + count {
                    let value = model.get(&sector).copied().unwrap_or(0);
                    flushed.entry(sector).or_default().push(value);
                }
            }
            match request {
                Request::Write { sector, count } => {
                    write(&disk, &memory, sector, count, stamp).unwrap();
                    model.extend((sector..sector + count).map(|sector| (sector, stamp)));
                }
                Request::Zero { sector, count, may_unmap } => {
                    disk.write_zeroes(range(sector, count), may_unmap).unwrap();
                    model.extend((sector..sector + count).map(|sector| (sector, 0)));
                }
                Request::Discard { sector, count } => {
                    disk.discard(range(sector, count)).unwrap();
                    // A dynamic disk in this file gives back at once, a fixed one keeps what it has.
                    if !options.fixed {
                        model.extend((sector..sector + count).map(|sector| (sector, 0)));
                    }
                }
                Request::Flush => {
                    disk.flush().unwrap();
                    flushed.clear();
                }
                Request::Close => {
                    disk.close().unwrap();
                    flushed.clear();
                }
                Request::Reopen => {
                    drop(disk);
                    disk = opened(&memory, OpenMode::ReadWrite);
                    flushed.clear();
                }
                Request::Kill => {
                    memory = Memory::new(memory.contents());
                    disk = opened(&memory, OpenMode::ReadWrite);
                    for (sector, written) in &mut model {
                        let found = value(&disk, &memory, *sector).unwrap();
                        let was = flushed.get(sector).is_some_and(|values| values.contains(&found));
                        prop_assert!(found == *written || was, "sector {sector} holds {found}, not {written}");
                        *written = found;
                    }
                    flushed.clear();
                }
            }
            for (sector, written) in &model {
                prop_assert_eq!(value(&disk, &memory, *sector).unwrap(), *written, "sector {}", sector);
            }
        }
        drop(disk);
        let disk = opened(&memory, OpenMode::ReadOnly);
        for (sector, written) in &model {
            prop_assert_eq!(value(&disk, &memory, *sector).unwrap(), *written, "sector {}", sector);
        }
    }
}
