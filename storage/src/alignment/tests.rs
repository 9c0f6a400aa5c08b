//! Against what the makers of file systems and partition tables write, and against bytes that mean no good.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use proptest::prelude::*;

use super::*;
use crate::OpenOptions;
use crate::open::open;

const MIB: u64 = 1 << 20;

struct Image {
    folder: tempfile::TempDir,
}

impl Image {
    fn new(size: u64) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let image = Self { folder };
        File::create(image.path()).unwrap().set_len(size).unwrap();
        image
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("disk")
    }

    fn file(&self) -> File {
        File::options().write(true).open(self.path()).unwrap()
    }

    fn run(&self, program: &str, options: &str, input: &str) {
        let mut child = Command::new(program)
            .args(options.split_whitespace())
            .arg(self.path())
            .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap_or_else(|e| panic!("{program}: {e}: run resources/setup.sh"));
        child
            .stdin
            .take()
            .unwrap()
            .write_all(input.as_bytes())
            .unwrap();
        assert!(child.wait().unwrap().success(), "{program} {options}");
    }

    /// Copies another image to a place of this one.
    fn place(&self, other: &Self, offset: u64) {
        let bytes = std::fs::read(other.path()).unwrap();
        self.file().write_all_at(&bytes, offset).unwrap();
    }

    fn unshared(&self) -> Vec<Unshared> {
        unshared_of(&self.path())
    }
}

fn unshared_of(path: &Path) -> Vec<Unshared> {
    unshared(&*open(path, &OpenOptions::read_only()).unwrap()).unwrap()
}

fn blocks(partition: Option<u32>, file_system: &'static str, bytes: u64) -> Unshared {
    let reason = Reason::Blocks { file_system, bytes };
    Unshared { partition, reason }
}

/// A file system of a size, as `mke2fs` makes it.
fn ext(size: u64, options: &str) -> Image {
    let image = Image::new(size);
    image.run("mke2fs", &format!("-q -F {options}"), "");
    image
}

#[test]
fn an_ext_has_the_blocks_that_mke2fs_gave_it() {
    assert_eq!(ext(64 * MIB, "").unshared(), [blocks(None, "ext2", 1024)]);
    let found = ext(64 * MIB, "-t ext4 -b 2048").unshared();
    assert_eq!(found, [blocks(None, "ext4", 2048)]);
    assert!(
        found[0].to_string().contains("mke2fs -b 4096"),
        "{}",
        found[0]
    );
    assert_eq!(
        ext(64 * MIB, "-t ext3").unshared(),
        [blocks(None, "ext3", 1024)]
    );
    assert_eq!(ext(64 * MIB, "-t ext4 -b 4096").unshared(), []);
    assert_eq!(
        ext(600 * MIB, "-t ext4").unshared(),
        [],
        "the default of a larger one"
    );
    assert_eq!(Image::new(MIB).unshared(), [], "nothing");
}

#[test]
fn partitions_of_a_gpt_are_looked_into() {
    let image = Image::new(64 * MIB);
    let table = "label: gpt\nstart=2048, size=16M\nstart=40001, size=16M\nstart=80000, size=8M\n";
    image.run("sfdisk", "-q", table);
    let small = ext(8 * MIB, "");
    image.place(&small, 2048 * 512);
    image.place(&ext(8 * MIB, "-b 4096"), 40001 * 512);
    image.place(&ext(8 * MIB, "-b 4096"), 80000 * 512);
    let start = Unshared {
        partition: Some(2),
        reason: Reason::PartitionStart(40001 * 512),
    };
    assert_eq!(image.unshared(), [blocks(Some(1), "ext2", 1024), start]);
}

#[test]
fn partitions_of_a_boot_record_are_looked_into_and_logical_ones_too() {
    let image = Image::new(64 * MIB);
    let table = "label: dos\nstart=63, size=8M\nstart=32768, size=40M, type=5\nstart=34816, size=8M\nstart=61440, size=8M\n";
    image.run("sfdisk", "-q --force", table);
    image.place(&ext(8 * MIB, ""), 61440 * 512);
    let start = Unshared {
        partition: Some(1),
        reason: Reason::PartitionStart(63 * 512),
    };
    assert_eq!(image.unshared(), [start, blocks(Some(6), "ext2", 1024)]);
}

#[test]
fn a_disk_of_4096_byte_sectors_counts_its_partitions_in_them() {
    use crate::SectorSize;
    use crate::vhdx::{CreateOptions, Vhdx};
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.vhdx");
    let options = CreateOptions {
        logical_sector: SectorSize::B4096,
        ..CreateOptions::new(64 * MIB)
    };
    Vhdx::create(&path, &options).unwrap();
    let disk = Vhdx::open(&path, &OpenOptions::default()).unwrap();
    let mut head = [0; 4096];
    head[..8].copy_from_slice(b"EFI PART");
    head[72] = 2;
    head[80] = 1;
    head[84] = 128;
    blocking::write_at(&disk, &head, 4096).unwrap();
    let mut entry = [0; 4096];
    entry[0] = 1;
    entry[33] = 1;
    entry[41] = 16;
    blocking::write_at(&disk, &entry, 8192).unwrap();
    let small = std::fs::read(ext(8 * MIB, "").path()).unwrap();
    blocking::write_at(&disk, &small[..65536], 256 * 4096).unwrap();
    assert_eq!(unshared(&disk).unwrap(), [blocks(Some(1), "ext2", 1024)]);
}

/// A disk of 1 MiB with bytes at some places.
fn with(places: &[(u64, &[u8])]) -> Vec<Unshared> {
    let image = Image::new(MIB);
    for (offset, bytes) in places {
        image.file().write_all_at(bytes, *offset).unwrap();
    }
    image.unshared()
}

#[test]
fn other_file_systems_are_known_by_their_superblocks() {
    let xfs = |block: u32| with(&[(0, b"XFSB"), (4, &block.to_be_bytes())]);
    assert_eq!(
        (xfs(4096), xfs(1024)),
        (vec![], vec![blocks(None, "XFS", 1024)])
    );
    assert_eq!(xfs(3000), [], "not a block size");
    let btrfs = |block: u32| with(&[(65600, b"_BHRfS_M"), (65680, &block.to_le_bytes())]);
    assert_eq!(
        (btrfs(4096), btrfs(2048)),
        (vec![], vec![blocks(None, "btrfs", 2048)])
    );
    let erofs = |power| with(&[(1024, b"\xe2\xe1\xf5\xe0"), (1036, &[power])]);
    assert_eq!(
        (erofs(12), erofs(9)),
        (vec![], vec![blocks(None, "EROFS", 512)])
    );
    assert_eq!(erofs(255), []);
    assert_eq!(
        with(&[(32768, b"\x01CD001\x01"), (32896, &[0, 8])]),
        [blocks(None, "ISO 9660", 2048)]
    );
    let squashfs = with(&[(0, b"hsqs")]);
    assert!(matches!(
        squashfs[..],
        [Unshared {
            reason: Reason::Packed { .. },
            ..
        }]
    ));
    let boot = |name: &[u8], rest: &[(u64, &[u8])]| {
        let ends: [(u64, &[u8]); 3] = [(510, &[0x55, 0xAA]), (11, &[0, 2]), (3, name)];
        with(&[&ends, rest].concat())
    };
    assert_eq!(boot(b"NTFS    ", &[(13, &[8])]), []);
    assert_eq!(
        boot(b"NTFS    ", &[(13, &[1])]),
        [blocks(None, "NTFS", 512)]
    );
    assert_eq!(
        boot(b"NTFS    ", &[(13, &[0x80])]),
        [],
        "128 sectors are 64 KiB"
    );
    assert_eq!(
        boot(b"NTFS    ", &[(13, &[0x81])]),
        [],
        "2^127 sectors are none"
    );
    // Reserved sectors, two tables, the root of 512 entries, tables of this many sectors.
    let fat = |cluster: u8, reserved: u8, table: u8| {
        boot(
            b"mkfs.fat",
            &[
                (13, &[cluster, reserved, 0, 2, 0, 2]),
                (22, &[table]),
                (54, b"FAT16   "),
            ],
        )
    };
    assert_eq!(fat(8, 8, 8), []);
    assert_eq!(fat(4, 8, 8), [blocks(None, "FAT", 2048)]);
    let reason = Reason::BlocksStart {
        file_system: "FAT",
        offset: (1 + 2 * 8 + 32) * 512,
    };
    assert_eq!(
        fat(8, 1, 8),
        [Unshared {
            partition: None,
            reason
        }]
    );
    let exfat = |heap: u8| boot(b"EXFAT   ", &[(88, &[heap, 1]), (108, &[9, 3])]);
    assert_eq!(exfat(0), []);
    assert_eq!(exfat(1).len(), 1);
}

#[test]
fn a_chain_of_logical_partitions_that_leads_back_ends() {
    let record = |next: u32| {
        let mut record = vec![0; 512];
        record[510..].copy_from_slice(&[0x55, 0xAA]);
        record[446 + 4] = 0x83;
        record[446 + 8] = 1;
        record[446 + 12] = 1;
        record[462 + 4] = 5;
        record[462 + 8..462 + 12].copy_from_slice(&next.to_le_bytes());
        record[462 + 12] = 8;
        record
    };
    // The first names the extended partition at sector 8; of that, the second record names the first again.
    let found = with(&[(0, &record(8)), (4096, &record(8)), (8192, &record(0))]);
    let starts: Vec<_> = found.iter().map(|found| found.partition).collect();
    assert_eq!(starts, [Some(1), Some(5), Some(6)]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn no_bytes_make_it_read_much_or_panic(
        mut bytes in proptest::collection::vec(any::<u8>(), 8192..20000),
        is_gpt: bool,
        is_record: bool,
        sector in prop_oneof![Just(512_u64), Just(4096)],
    ) {
        if is_gpt {
            bytes[sector as usize..][..8].copy_from_slice(b"EFI PART");
            bytes[sector as usize + 84..][..4].copy_from_slice(&128_u32.to_le_bytes());
            bytes[sector as usize + 72..][..8].copy_from_slice(&1_u64.to_le_bytes());
        }
        if is_record {
            bytes[510..512].copy_from_slice(&[0x55, 0xAA]);
            for at in [446, 462, 478, 494] {
                bytes[at] = 0;
            }
        }
        let mut reads = 0;
        let mut window = Window {
            size: bytes.len() as u64,
            read: &mut |buffer, offset| {
                reads += 1;
                let start = offset as usize;
                buffer.copy_from_slice(&bytes[start..start + buffer.len()]);
                Ok::<(), ()>(())
            },
        };
        look(&mut window, sector).unwrap();
        prop_assert!(reads <= 4000, "{reads}");
    }
}
