//! Which parent a guest's disk names. The daemon parses no disk: a process does that has this one file and no rights,
//! see [`jail::reader`].

use std::fs::File;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use jail::reader::{ParentLink, read_answer};

/// The parent that the disk in `file`, which lies in `folder`, names. The process that reads it is the user `uid`.
///
/// # Errors
/// The host's error; where the process gives no answer.
pub fn named_by(file: &File, folder: &Path, uid: Option<u32>) -> io::Result<Option<ParentLink>> {
    ask(file, folder, uid, None)
}

/// Has the disk in `file`, which is open for writing, name the path `place` from now on, and gives what it named
/// before. Where it names no parent, it stays as it is.
///
/// # Errors
/// As [`named_by`].
pub fn move_to(
    file: &File,
    folder: &Path,
    uid: Option<u32>,
    place: &Path,
) -> io::Result<Option<ParentLink>> {
    ask(file, folder, uid, Some(place))
}

fn ask(
    file: &File,
    folder: &Path,
    uid: Option<u32>,
    place: Option<&Path>,
) -> io::Result<Option<ParentLink>> {
    // The program of this daemon, even where its file has been replaced by another version.
    let mut command = Command::new("/proc/self/exe");
    command
        .arg0("coppice")
        .args(["disk-parent", "--folder"])
        .arg(folder);
    if let Some(uid) = uid {
        command.args(["--uid", &uid.to_string()]);
    }
    if let Some(place) = place {
        command.arg("--place").arg(place);
    }
    let mut reader = command
        .env_clear()
        .stdin(Stdio::from(file.try_clone()?))
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?;
    let answer = match reader.stdout.take() {
        Some(answer) => read_answer(answer.into()),
        None => Err(io::ErrorKind::BrokenPipe.into()),
    };
    // It has answered, or is not going to.
    let _ = reader.kill();
    reader.wait()?;
    Ok(serde_json::from_slice(&answer?)?)
}
