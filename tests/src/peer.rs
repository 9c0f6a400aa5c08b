//! The peer of the benchmark: Debian's QEMU with its microvm machine, taken from this machine together with its libraries.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::result::Failure;

const BINARY: &str = "/usr/bin/qemu-system-x86_64-microvm";
const LOADER: &str = "/lib64/ld-linux-x86-64.so.2";
/// What it reads: firmware, and the code that enters a PVH kernel.
const SHARED: [&str; 3] = ["bios-microvm.bin", "linuxboot_dma.bin", "pvh.bin"];

/// Its files on this machine, and where they go on the lab disk.
pub fn files() -> Result<Vec<(PathBuf, String)>, Failure> {
    let mut files = vec![(PathBuf::from(BINARY), "peer/qemu".to_owned())];
    for name in SHARED {
        files.push((
            Path::new("/usr/share/qemu").join(name),
            format!("peer/share/{name}"),
        ));
    }
    let output = Command::new(LOADER)
        .args(["--list", BINARY])
        .output()
        .map_err(Failure::io("list the peer's libraries"))?;
    let list = String::from_utf8_lossy(&output.stdout).into_owned();
    // Lines are `name => path (address)`, and the loader without an arrow.
    let libraries = list
        .lines()
        .filter_map(|line| line.split_once(" => "))
        .filter_map(|(name, path)| Some((name.trim(), path.split(' ').next()?)));
    for (name, path) in libraries {
        files.push((PathBuf::from(path), format!("peer/lib/{name}")));
    }
    files.push((
        PathBuf::from(LOADER),
        "peer/lib/ld-linux-x86-64.so.2".to_owned(),
    ));
    Ok(files)
}
