//! Resource limits.

use std::io;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// The limit of descriptors: several times as many as a guest needs for all its devices, connections and layers of
/// disks.
const DESCRIPTORS: u64 = 2048;

/// Sets the limits: no core dumps, which would hold the guest's memory, no message queues, and descriptors for a guest.
pub(super) fn enter() -> io::Result<()> {
    for (resource, most) in [
        (Resource::Core, 0),
        (Resource::Msgqueue, 0),
        (Resource::Nofile, DESCRIPTORS),
    ] {
        let old = getrlimit(resource);
        let most = old.maximum.map_or(most, |maximum| maximum.min(most));
        setrlimit(
            resource,
            Rlimit {
                current: Some(most),
                maximum: Some(most),
            },
        )?;
    }
    Ok(())
}
