//! Namespaces: mounts, network, IPC, host name, and where they cannot be had otherwise, users.

use std::{fs, io};

use rustix::process::{getegid, geteuid};
use rustix::thread::{UnshareFlags, unshare_unsafe};

use super::{JailReport, Layer};

/// Each on its own: a host may allow one and not another.
const OWN: [(Layer, UnshareFlags); 4] = [
    (Layer::MountNamespace, UnshareFlags::NEWNS),
    (Layer::NetNamespace, UnshareFlags::NEWNET),
    (Layer::IpcNamespace, UnshareFlags::NEWIPC),
    (Layer::UtsNamespace, UnshareFlags::NEWUTS),
];

fn unshare(flags: UnshareFlags) -> io::Result<()> {
    // SAFETY: no descriptor table is unshared: the callers pass no `FILES`.
    Ok(unsafe { unshare_unsafe(flags) }?)
}

/// Leaves the host's namespaces as far as it may.
pub(super) fn enter(report: &mut JailReport) {
    if geteuid().is_root() {
        report.lacks(Layer::UserNamespace, "root does without, see uid=");
    } else {
        report.note(Layer::UserNamespace, own_users());
    }
    for (layer, flag) in OWN {
        report.note(layer, unshare(flag));
    }
    if std::process::id() == 1 {
        report.has(Layer::PidNamespace);
    } else {
        let why = "it is given by who starts the process";
        report.lacks(Layer::PidNamespace, why);
    }
}

/// A namespace in which the process is who it was, with all capabilities over what belongs to the namespace, and none over anything else.
fn own_users() -> io::Result<()> {
    let (uid, gid) = (geteuid().as_raw(), getegid().as_raw());
    unshare(UnshareFlags::NEWUSER)?;
    // Without a privilege outside, groups can only be mapped once they cannot be changed any more (user_namespaces(7)).
    fs::write("/proc/self/setgroups", "deny")?;
    fs::write("/proc/self/uid_map", format!("{uid} {uid} 1"))?;
    fs::write("/proc/self/gid_map", format!("{gid} {gid} 1"))
}
