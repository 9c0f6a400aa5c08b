//! Namespaces: mounts, network, IPC, host name, and where they cannot be had otherwise, users.

use std::{fs, io};

use rustix::process::{getegid, geteuid};
use rustix::thread::{UnshareFlags, unshare_unsafe};

use super::report::{JailReport, Layer};

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
///
/// # Errors
/// Where the process is in a namespace of users in which it is nobody.
pub(super) fn enter(report: &mut JailReport) -> io::Result<()> {
    if geteuid().is_root() {
        report.lacks(Layer::UserNamespace, "root does without, see uid=");
    } else {
        own_users(report)?;
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
    Ok(())
}

/// A namespace in which the process is who it was, with all capabilities over what belongs to the namespace, and none
/// over anything else.
fn own_users(report: &mut JailReport) -> io::Result<()> {
    let (uid, gid) = (geteuid().as_raw(), getegid().as_raw());
    let made = unshare(UnshareFlags::NEWUSER);
    let is_made = made.is_ok();
    report.note(Layer::UserNamespace, made);
    if !is_made {
        return Ok(());
    }
    // Without a privilege outside, groups can only be mapped once they cannot be changed any more (user_namespaces(7)).
    fs::write("/proc/self/setgroups", "deny")?;
    fs::write("/proc/self/uid_map", format!("{uid} {uid} 1"))?;
    fs::write("/proc/self/gid_map", format!("{gid} {gid} 1"))
}
