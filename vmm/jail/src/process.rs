//! Processes that are the first of a PID namespace.

use std::io;
use std::process::{Child, Command};

use rustix::thread::{UnshareFlags, unshare_unsafe};

/// A process that was started.
#[derive(Debug)]
pub struct Spawned {
    /// The process.
    pub child: Child,
    /// Whether it is the first process of a PID namespace, and sees no other.
    pub own_processes: bool,
}

/// Starts a command as the first process of a PID namespace, or among all others where the host allows no namespace.
///
/// A thread unshares a PID namespace for its children, and can do so once. So a new thread does this, and ends
/// afterwards.
///
/// A command must not ask for a signal at the death of its parent (`PR_SET_PDEATHSIG`): its parent is that thread, so
/// it would get the signal at once.
///
/// # Errors
/// Where the host starts no thread or no process.
pub fn spawn(mut command: Command) -> io::Result<Spawned> {
    let thread = std::thread::Builder::new()
        .name("spawn".into())
        .spawn(move || {
            // SAFETY: no descriptor table is unshared.
            let own_processes = unsafe { unshare_unsafe(UnshareFlags::NEWPID) }.is_ok();
            let child = command.spawn()?;
            Ok(Spawned {
                child,
                own_processes,
            })
        })?;
    thread
        .join()
        .unwrap_or_else(|_| Err(io::Error::other("the thread panicked")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_the_first_of_its_namespace_where_that_can_be_had() {
        for _ in 0..2 {
            let mut command = Command::new("sh");
            command.args(["-c", "test $$ = 1"]);
            let Spawned {
                mut child,
                own_processes,
            } = spawn(command).unwrap();
            assert_eq!(child.wait().unwrap().success(), own_processes);
            assert_eq!(own_processes, rustix::process::geteuid().is_root());
        }
    }
}
