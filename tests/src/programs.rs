//! The sources and the programs of this machine: Coppice as it was built for the lab, and programs that check a disk
//! that a guest has written.

use std::borrow::BorrowMut;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::result::Failure;

/// The target that the lab's programs are built for.
pub const TARGET: &str = "x86_64-unknown-linux-gnu";

/// The root of the sources.
pub fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap_or(Path::new("/"))
        .to_owned()
}

/// Runs a command whose failure is a failure of the lab.
pub fn command(mut command: impl BorrowMut<Command>) -> Result<(), Failure> {
    let command = command.borrow_mut();
    let output = command
        .stdin(Stdio::null())
        .output()
        .map_err(Failure::io(format!("{command:?}")))?;
    if output.status.success() {
        return Ok(());
    }
    let text = [output.stdout, output.stderr].concat();
    Failure::claim(format!(
        "{command:?}: {}\n{}",
        output.status,
        String::from_utf8_lossy(&text)
    ))
}

/// Runs Coppice on this machine.
pub fn coppice(arguments: &[&str]) -> Result<(), Failure> {
    let program = workspace()
        .join("target")
        .join(TARGET)
        .join("release/coppice");
    command(Command::new(program).args(arguments))
}

/// Checks a disk by `qemu-img check`, and converts it to raw.
pub fn to_raw(vhdx: &Path) -> Result<PathBuf, Failure> {
    command(
        Command::new("qemu-img")
            .args(["check", "-f", "vhdx"])
            .arg(vhdx),
    )?;
    let raw = vhdx.with_extension("raw");
    command(
        Command::new("qemu-img")
            .args(["convert", "-f", "vhdx", "-O", "raw"])
            .args([vhdx, &raw]),
    )?;
    Ok(raw)
}

/// Checks by `e2fsck` a file system that was unmounted.
pub fn fsck_clean(raw: &Path) -> Result<(), Failure> {
    command(Command::new("e2fsck").arg("-fn").arg(raw))
}

/// Replays the journal of a file system that was cut off, and checks it by `e2fsck`.
pub fn fsck_after_replay(raw: &Path) -> Result<(), Failure> {
    // The first run replays the journal; it exits with 1 for that.
    let replay = Command::new("e2fsck")
        .arg("-p")
        .arg(raw)
        .output()
        .map_err(Failure::io("e2fsck -p"))?;
    if !matches!(replay.status.code(), Some(0 | 1)) {
        return Failure::claim(format!(
            "e2fsck -p: {}",
            String::from_utf8_lossy(&replay.stdout)
        ));
    }
    fsck_clean(raw)
}

/// The MD5 of a file in the file system, as `md5sum` prints it.
pub fn md5_of(raw: &Path, file: &str) -> Result<String, Failure> {
    let copy = raw.with_extension("file");
    command(
        Command::new("debugfs")
            .args(["-R", &format!("dump {file} {}", copy.display())])
            .arg(raw),
    )?;
    let output = Command::new("md5sum")
        .arg(&copy)
        .output()
        .map_err(Failure::io("md5sum"))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    Ok(text.split(' ').next().unwrap_or_default().to_owned())
}
