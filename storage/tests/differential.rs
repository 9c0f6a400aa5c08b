//! Random work, seen by other readers: what we wrote, read by QEMU and by libvhdi; what QEMU wrote, read by us and by
//! libvhdi; and chains, which QEMU does not know. `DIFFERENTIAL_SEED` asks for other work than a normal run does.

#![allow(clippy::unwrap_used, reason = "a test may end where it fails")]

mod support;

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use storage::vhdx::{ChildOptions, CreateOptions, Vhdx};
use storage::{ByteRange, Disk, OpenOptions, SectorSize};
use support::{GIB, MIB, arg, qemu_check, qemu_io, run};

/// Unit of the work, in bytes.
const UNIT: u64 = 4096;

struct Random(u64);

impl Random {
    fn new(salt: u64) -> Self {
        let seed = std::env::var("DIFFERENTIAL_SEED").map_or(1, |seed| seed.parse().unwrap());
        println!("DIFFERENTIAL_SEED={seed}");
        Self((seed * 1000 + salt).wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 16) % bound
    }
}

/// The expected content of a disk: a byte that fills each unit, zero where there is none.
type Model = BTreeMap<u64, u8>;

/// libvhdi, as an oracle.
struct Libvhdi {
    child: Child,
    input: ChildStdin,
    output: ChildStdout,
}

impl Libvhdi {
    /// Opens a chain, the top first.
    fn open(files: &[&Path]) -> Self {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/support/vhdi.py");
        // Debian's Python, whose package has the library.
        let mut child = Command::new("/usr/bin/python3")
            .arg(script)
            .args(files)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("python3: run resources/setup.sh");
        let (input, output) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        Self {
            child,
            input,
            output,
        }
    }

    fn read(&mut self, offset: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        writeln!(self.input, "{offset} {len}").expect("libvhdi: run resources/setup.sh");
        self.output
            .read_exact(&mut bytes)
            .expect("libvhdi: run resources/setup.sh");
        bytes
    }
}

impl Drop for Libvhdi {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Places to look at: all that was ever touched and what lies beside it, and some others.
fn places(model: &Model, size: u64, random: &mut Random) -> Vec<u64> {
    let last = size / UNIT - 1;
    let mut places: Vec<u64> = model
        .keys()
        .flat_map(|unit| [unit.saturating_sub(1), *unit, (unit + 1).min(last)])
        .collect();
    places.extend((0..20).map(|_| random.below(last + 1)));
    places.extend([0, last]);
    places.sort_unstable();
    places.dedup();
    places
}

fn expect(reader: &str, bytes: &[u8], unit: u64, model: &Model, context: &str) {
    let expected = model.get(&unit).copied().unwrap_or(0);
    assert!(
        bytes.iter().all(|byte| *byte == expected),
        "{context}: {reader} reads {:#x} at {:#x}, not {expected:#x}",
        bytes.iter().find(|byte| **byte != expected).unwrap(),
        unit * UNIT
    );
}

/// Random work by us, over several opens: writes, trims and zeros, in units.
fn work(path: &Path, random: &mut Random, model: &mut Model, rounds: u64, trim: bool) {
    for _ in 0..rounds {
        let disk = Vhdx::open(path, &OpenOptions::default()).unwrap();
        let size = disk.geometry().size;
        let units = size / UNIT;
        let block = disk.block_size() / UNIT;
        // A few homes, so that work meets work, at the ends of blocks and of the first chunk.
        let chunk = (1 << 23) * u64::from(disk.geometry().logical_sector.bytes()) / UNIT;
        let homes = [
            0,
            block - 2,
            3 * block - 1,
            chunk - 1,
            chunk + block,
            units - 3,
        ];
        for _ in 0..12 {
            let first = homes[random.below(6) as usize].min(units - 1);
            let count = (1 + random.below(5)).min(units - first);
            let whole = first / block * block;
            let blocks = (block * (1 + random.below(2))).min(units - whole);
            let range =
                |first: u64, count: u64| ByteRange::new(first * UNIT, count * UNIT).unwrap();
            match random.below(10) {
                0..=5 => {
                    let byte = 1 + random.below(250) as u8;
                    storage::blocking::write_at(
                        &disk,
                        &vec![byte; (count * UNIT) as usize],
                        first * UNIT,
                    )
                    .unwrap();
                    model.extend((first..first + count).map(|unit| (unit, byte)));
                }
                6 => {
                    // A whole block holds nothing afterwards. The last one may end with the disk.
                    if trim && blocks >= block {
                        disk.discard(range(whole, blocks / block * block)).unwrap();
                        let gone = whole..whole + blocks / block * block;
                        model
                            .iter_mut()
                            .filter(|(unit, _)| gone.contains(unit))
                            .for_each(|(_, byte)| *byte = 0);
                        model.extend([(whole, 0), (gone.end - 1, 0)]);
                    }
                }
                7..=8 => {
                    disk.write_zeroes(range(first, count), random.below(2) == 0)
                        .unwrap();
                    model.extend((first..first + count).map(|unit| (unit, 0)));
                }
                _ => disk.flush().unwrap(),
            }
        }
        disk.close().unwrap();
    }
}

/// Looks at a disk with libvhdi, and with our own eyes.
fn look(files: &[&Path], model: &Model, random: &mut Random, context: &str) {
    let disk = Vhdx::open(files[0], &OpenOptions::read_only()).unwrap();
    let mut peer = Libvhdi::open(files);
    for unit in places(model, disk.geometry().size, random) {
        let mut bytes = vec![0; UNIT as usize];
        storage::blocking::read_at(&disk, &mut bytes, unit * UNIT).unwrap();
        expect("we", &bytes, unit, model, context);
        let bytes = peer.read(unit * UNIT, UNIT as usize);
        expect("libvhdi", &bytes, unit, model, context);
    }
}

/// Looks at a disk as QEMU makes a raw one of it.
fn look_by_qemu(path: &Path, model: &Model, random: &mut Random, context: &str) {
    qemu_check(path);
    let raw = path.with_extension("raw");
    run(
        "qemu-img",
        &["convert", "-f", "vhdx", "-O", "raw", arg(path), arg(&raw)],
    );
    let file = std::fs::File::open(&raw).unwrap();
    let size = file.metadata().unwrap().len();
    for unit in places(model, size, random) {
        let mut bytes = vec![0; UNIT as usize];
        file.read_exact_at(&mut bytes, unit * UNIT).unwrap();
        expect("qemu", &bytes, unit, model, context);
    }
    std::fs::remove_file(raw).unwrap();
}

#[test]
fn what_we_write_is_read_by_qemu_and_libvhdi_in_every_geometry() {
    let folder = tempfile::tempdir().unwrap();
    let mut random = Random::new(1);
    for sector in [SectorSize::B512, SectorSize::B4096] {
        for block in [1_u32, 2, 4, 8, 16, 32, 64, 128, 256] {
            // Past the first chunk (4 GiB, or 32 GiB) for most, and not in whole blocks.
            let size = match block {
                128 | 256 => 3 * GIB + 8 * UNIT,
                _ => 33 * GIB + 3 * UNIT,
            };
            let context = format!("blocks of {block} MiB, sectors of {}", sector.bytes());
            let path = folder.path().join("disk.vhdx");
            let _ = std::fs::remove_file(&path);
            let options = CreateOptions {
                block_size: block << 20,
                logical_sector: sector,
                ..CreateOptions::new(size)
            };
            Vhdx::create(&path, &options).unwrap();
            let mut model = Model::new();
            work(&path, &mut random, &mut model, 3, true);
            look(&[&path], &model, &mut random, &context);
            // QEMU refuses logical sectors of 4096 bytes.
            if sector == SectorSize::B512 {
                look_by_qemu(&path, &model, &mut random, &context);
            }
        }
    }
}

#[test]
fn what_qemu_and_we_write_in_turns_is_read_by_all() {
    let folder = tempfile::tempdir().unwrap();
    let mut random = Random::new(2);
    for (subformat, block, size) in [
        ("dynamic", 1, 5 * GIB),
        ("dynamic", 8, 70 * GIB),
        ("dynamic", 256, 5 * GIB),
        ("fixed", 2, 40 * MIB),
    ] {
        let path = folder.path().join(format!("{subformat}{block}.vhdx"));
        let options = format!("subformat={subformat},block_size={}", block * MIB);
        run(
            "qemu-img",
            &[
                "create",
                "-q",
                "-f",
                "vhdx",
                "-o",
                &options,
                arg(&path),
                &size.to_string(),
            ],
        );
        let mut model = Model::new();
        for round in 0..3 {
            let context = format!("{subformat}, blocks of {block} MiB, round {round}");
            let mut commands = Vec::new();
            for _ in 0..10 {
                let units = size / UNIT;
                let first = random.below(units).min(units - 6);
                let (count, byte) = (1 + random.below(5), 1 + random.below(250) as u8);
                commands.push(format!("write -P {byte} {} {}", first * UNIT, count * UNIT));
                model.extend((first..first + count).map(|unit| (unit, byte)));
            }
            let commands: Vec<&str> = commands.iter().map(String::as_str).collect();
            qemu_io(&path, &commands);
            look(&[&path], &model, &mut random, &context);
            if subformat == "dynamic" {
                work(&path, &mut random, &mut model, 1, true);
            }
            look_by_qemu(&path, &model, &mut random, &context);
        }
        look(&[&path], &model, &mut random, subformat);
    }
}

#[test]
fn chains_are_read_by_libvhdi_as_by_us() {
    let mut random = Random::new(3);
    for sector in [SectorSize::B512, SectorSize::B4096] {
        let folder = tempfile::tempdir().unwrap();
        let name = |layer: usize| folder.path().join(format!("{layer}.vhdx"));
        // Past the first chunk, where the bitmaps have entries of their own between those of blocks.
        let options = CreateOptions {
            block_size: 2 << 20,
            logical_sector: sector,
            ..CreateOptions::new(if sector == SectorSize::B512 {
                9 * GIB
            } else {
                40 * GIB
            })
        };
        Vhdx::create(name(0), &options).unwrap();
        let mut model = Model::new();
        for layer in 0..4 {
            if layer > 0 {
                let options = ChildOptions {
                    block_size: Some(1 << (20 + random.below(4))),
                    ..ChildOptions::default()
                };
                Vhdx::create_child(name(layer), name(layer - 1), &options).unwrap();
            }
            // libvhdi reads unmapped and zero blocks of a child from the parent, where [MS-VHDX] 2.5.1.1 says that
            // their content is their own: so no block of a child is trimmed here.
            work(&name(layer), &mut random, &mut model, 2, layer == 0);
            let files: Vec<PathBuf> = (0..=layer).rev().map(name).collect();
            let files: Vec<&Path> = files.iter().map(PathBuf::as_path).collect();
            let context = format!("layer {layer}, sectors of {}", sector.bytes());
            look(&files, &model, &mut random, &context);
        }
    }
}

#[test]
fn the_largest_disk_is_read_at_both_ends_by_all() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.vhdx");
    let options = CreateOptions {
        block_size: 256 << 20,
        ..CreateOptions::new(64 << 40)
    };
    Vhdx::create(&path, &options).unwrap();
    let disk = Vhdx::open(&path, &OpenOptions::default()).unwrap();
    let mut model = Model::new();
    for (unit, byte) in [(0, 1), ((4 * GIB) / UNIT, 2), ((64 << 40) / UNIT - 1, 3)] {
        storage::blocking::write_at(&disk, &[byte; UNIT as usize], unit * UNIT).unwrap();
        model.insert(unit, byte);
    }
    drop(disk);
    let mut peer = Libvhdi::open(&[&path]);
    for (unit, byte) in &model {
        let bytes = peer.read(unit * UNIT, UNIT as usize);
        expect("libvhdi", &bytes, *unit, &model, "64 TiB");
        qemu_io(&path, &[&format!("read -P {byte} {} {UNIT}", unit * UNIT)]);
    }
}
