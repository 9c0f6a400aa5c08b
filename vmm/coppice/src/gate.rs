//! The gate of a process that the host daemon has started (`coppice run --held`): it does nothing before the daemon has
//! written down its number, and said how it is to begin.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;

use control::launch_spec::{LaunchSpec, LaunchSpecError};

/// Leaves the session of whoever started the process, and waits for the launch specification.
///
/// # Errors
/// [`LaunchSpecError`].
pub fn wait() -> Result<LaunchSpec, LaunchSpecError> {
    // A process that leads its group already is in a session of its own making.
    let _ = rustix::process::setsid();
    // The kernel calls it after the file by which it was started, which is /proc/self/exe.
    let _ = rustix::thread::set_name(c"coppice");
    // Without the buffer of `io::stdin`, which would stay with the process for ever.
    let input = io::stdin().as_fd().try_clone_to_owned();
    LaunchSpec::read(&mut File::from(input.map_err(LaunchSpecError::Read)?))
}
