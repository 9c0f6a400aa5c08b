//! What the tests of this folder share: a mover that does requests as an engine would, one at a time, and the peers.

#![allow(dead_code, reason = "each test crate uses its part")]
#![allow(clippy::unwrap_used, reason = "these are tests")]

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Output};

use storage::{ByteRange, Disk, ExtentKind};

/// One mebibyte.
pub const MIB: u64 = 1 << 20;
/// One gibibyte.
pub const GIB: u64 = 1 << 30;

/// Reads a range of a disk.
pub fn read(disk: &dyn Disk, offset: u64, len: usize) -> Vec<u8> {
    let mut extents = Vec::new();
    let id = disk
        .resolve_read(ByteRange::new(offset, len as u64).unwrap(), &mut extents)
        .unwrap();
    let mut bytes = vec![0xEE; len];
    let mut at = offset;
    for extent in extents {
        assert_eq!(extent.offset, at, "extents are in order, without gaps");
        let start = usize::try_from(extent.offset - offset).unwrap();
        let part = &mut bytes[start..start + usize::try_from(extent.len).unwrap()];
        match extent.kind {
            ExtentKind::Data { file, file_offset } => {
                file.read_exact_at(part, file_offset).unwrap();
            }
            ExtentKind::Zero | ExtentKind::Unmapped => part.fill(0),
        }
        at += extent.len;
    }
    assert_eq!(at, offset + len as u64, "extents cover the range");
    disk.finish(id, true);
    bytes
}

/// Writes a range of a disk.
pub fn write(disk: &dyn Disk, offset: u64, bytes: &[u8]) {
    let mut extents = Vec::new();
    let id = disk
        .resolve_write(
            ByteRange::new(offset, bytes.len() as u64).unwrap(),
            &mut extents,
        )
        .unwrap();
    let mut left = bytes;
    for extent in extents {
        let ExtentKind::Data { file, file_offset } = extent.kind else {
            panic!("a resolved write has space")
        };
        let (part, rest) = left.split_at(usize::try_from(extent.len).unwrap());
        file.write_all_at(part, file_offset).unwrap();
        left = rest;
    }
    assert!(left.is_empty(), "extents cover the range");
    disk.finish(id, true);
}

/// Bytes that tell where they belong: a pattern of the seed and the position.
pub fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// Runs a peer, and fails the test where it is missing or fails.
pub fn run(program: &str, args: &[&str]) -> String {
    let output = output(program, args);
    assert!(
        output.status.success(),
        "{program} {args:?}: {}",
        describe(&output)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Runs a peer, and returns its output.
pub fn output(program: &str, args: &[&str]) -> Output {
    Command::new(program)
        .args(args)
        .output()
        .unwrap_or_else(|e| panic!("{program} has to be installed (Debian: qemu-utils): {e}"))
}

/// The exit code and output of a peer, as text.
pub fn describe(output: &Output) -> String {
    format!(
        "{}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}

/// A path as an argument.
pub fn arg(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Lets `qemu-img` check a file without repairing anything.
pub fn qemu_check(path: &Path) {
    run("qemu-img", &["check", "-q", "-f", "vhdx", arg(path)]);
}

/// Lets `qemu-io` do commands on a file.
pub fn qemu_io(path: &Path, commands: &[&str]) -> String {
    let mut args = vec!["-f", "vhdx"];
    for command in commands {
        args.extend(["-c", command]);
    }
    args.push(arg(path));
    let printed = run("qemu-io", &args);
    assert!(!printed.contains("failed"), "{printed}");
    printed
}

/// The log identifier in the current header of a VHDX.
pub fn log_guid(path: &Path) -> [u8; 16] {
    let bytes = std::fs::File::open(path).unwrap();
    let header = |offset: u64| {
        let mut header = [0; 64];
        bytes.read_exact_at(&mut header, offset).unwrap();
        header
    };
    let sequence = |header: &[u8; 64]| u64::from_le_bytes(header[8..16].try_into().unwrap());
    let current = [64 << 10, 128 << 10]
        .map(header)
        .into_iter()
        .max_by_key(sequence)
        .unwrap();
    current[48..64].try_into().unwrap()
}

/// Copies a file with its holes.
pub fn copy(from: &Path, to: &Path) {
    run("cp", &["--sparse=always", arg(from), arg(to)]);
}
