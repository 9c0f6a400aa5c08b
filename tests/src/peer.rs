//! Programs of Debian that benchmarks need in the lab's host, which is no Debian: they are copied from this machine
//! together with their libraries. They are the peer, QEMU with its microvm machine, fio, and nft.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::result::Failure;

const BINARY: &str = "/usr/bin/qemu-system-x86_64-microvm";
const NFT: &str = "/usr/sbin/nft";
const FIO: &str = "/usr/bin/fio";
const LOADER: &str = "/lib64/ld-linux-x86-64.so.2";
/// The files that QEMU reads: firmware, and the code that enters a PVH kernel.
const SHARED: [&str; 3] = ["bios-microvm.bin", "linuxboot_dma.bin", "pvh.bin"];

/// The peer's files on this machine, and their paths on the lab disk.
pub fn files() -> Result<Vec<(PathBuf, String)>, Failure> {
    let mut files = vec![(PathBuf::from(BINARY), "peer/qemu".to_owned())];
    for name in SHARED {
        files.push((
            Path::new("/usr/share/qemu").join(name),
            format!("peer/share/{name}"),
        ));
    }
    files.extend(libraries(BINARY, "peer/lib")?);
    Ok(files)
}

/// fio's files on this machine, and their paths on a disk of its own.
pub fn fio() -> Result<Vec<(PathBuf, String)>, Failure> {
    let mut files = vec![(PathBuf::from(FIO), "fio".to_owned())];
    files.extend(libraries(FIO, "lib")?);
    Ok(files)
}

/// nft's files on this machine, and their paths on the lab disk.
pub fn nft() -> Result<Vec<(PathBuf, String)>, Failure> {
    let mut files = vec![(PathBuf::from(NFT), "nft/nft".to_owned())];
    files.extend(libraries(NFT, "nft/lib")?);
    Ok(files)
}

/// The libraries of a program, and the loader, which gets the path of their folder.
fn libraries(program: &str, folder: &str) -> Result<Vec<(PathBuf, String)>, Failure> {
    let output = Command::new(LOADER)
        .args(["--list", program])
        .output()
        .map_err(Failure::io("list a program's libraries"))?;
    if !output.status.success() {
        return Failure::claim(format!(
            "{program} is needed (Debian: qemu-system-x86, fio, nftables): {}",
            String::from_utf8_lossy(&output.stderr).trim()
        ));
    }
    let list = String::from_utf8_lossy(&output.stdout).into_owned();
    // Lines are `name => path (address)`; the line of the loader has no arrow.
    let mut files: Vec<(PathBuf, String)> = list
        .lines()
        .filter_map(|line| line.split_once(" => "))
        .filter_map(|(name, path)| Some((name.trim(), path.split(' ').next()?)))
        .map(|(name, path)| (PathBuf::from(path), format!("{folder}/{name}")))
        .collect();
    files.push((
        PathBuf::from(LOADER),
        format!("{folder}/ld-linux-x86-64.so.2"),
    ));
    Ok(files)
}
