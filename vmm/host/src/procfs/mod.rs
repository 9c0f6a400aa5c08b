//! Processes in `/proc`: their memory, the files that they map, and their CPU time.
//!
//! `stat` is read with the crate `procfs`. `maps` and `smaps` are not: for each mapping of `smaps` the crate makes a
//! map of two dozen strings, which is 20 MiB for a guest whose memory is in 10,000 pieces where this module takes 0.7;
//! and it panics at a file whose name begins with `/SYSV`, which a guest's process may map. A guest's process reads its
//! own `smaps_rollup`.

mod cpu;
mod maps;
mod smaps;

use std::path::{Path, PathBuf};
use std::{fs, io};

pub use cpu::{of_merger, of_process, start_of};
pub use maps::{MappedFile, mapped_files};
pub use smaps::{Mapping, Usage, guest_ram, parse, split};

/// Why a process cannot be examined.
#[derive(Debug, thiserror::Error)]
pub enum ProcError {
    /// The process has ended, or is another user's.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The host's error.
        source: io::Error,
    },
    /// A file of the kernel is not as expected.
    #[error("{}: expected {expected}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What should be in it.
        expected: &'static str,
    },
}

fn failed(path: &Path) -> impl FnOnce(io::Error) -> ProcError {
    let path = path.to_owned();
    move |source| ProcError::Read { path, source }
}

/// Reads a file of a process, by its name in the process's folder.
///
/// # Errors
/// `Read`.
pub fn read(pid: u32, name: &str) -> Result<String, ProcError> {
    let path = PathBuf::from(format!("/proc/{pid}/{name}"));
    fs::read_to_string(&path).map_err(failed(&path))
}

/// The mappings of a process.
///
/// # Errors
/// `Read`.
pub fn mappings(pid: u32) -> Result<Vec<Mapping>, ProcError> {
    Ok(parse(&read(pid, "smaps")?))
}

/// The memory of a process, all mappings together.
///
/// # Errors
/// `Read`.
pub fn memory(pid: u32) -> Result<Usage, ProcError> {
    Ok(Usage::of_rollup(&read(pid, "smaps_rollup")?))
}
