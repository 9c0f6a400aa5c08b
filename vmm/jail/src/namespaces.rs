//! Namespaces: mounts, network, IPC, host name, and users where the others cannot be entered without it.

use std::{fs, io};

use rustix::process::{getegid, geteuid};
use rustix::thread::{UnshareFlags, unshare_unsafe};

use super::report::{JailReport, Layer};

/// Each namespace is unshared by a call of its own, because a host may allow one and not another.
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

/// Leaves the host's namespaces, as far as the host allows.
///
/// # Errors
/// Where the process is in a new user namespace, and its user cannot be mapped.
pub(super) fn enter(report: &mut JailReport) -> io::Result<()> {
    if geteuid().is_root() {
        report.lacks(Layer::UserNamespace, "root does without, see uid=");
    } else {
        enter_user_namespace(report)?;
    }
    for (layer, flag) in OWN {
        report.record(layer, unshare(flag));
    }
    if std::process::id() == 1 {
        report.has(Layer::PidNamespace);
    } else {
        let why = "it is given by who starts the process";
        report.lacks(Layer::PidNamespace, why);
    }
    Ok(())
}

/// Enters a user namespace, in which the process keeps its user and group, and has all capabilities over what belongs
/// to the namespace, and none over anything else.
fn enter_user_namespace(report: &mut JailReport) -> io::Result<()> {
    let (uid, gid) = (geteuid().as_raw(), getegid().as_raw());
    let made = unshare(UnshareFlags::NEWUSER);
    let is_made = made.is_ok();
    report.record(Layer::UserNamespace, made);
    if !is_made {
        return Ok(());
    }
    // A process without privileges outside can map groups only after it has given up setgroups(2) (user_namespaces(7)).
    fs::write("/proc/self/setgroups", "deny")?;
    fs::write("/proc/self/uid_map", format!("{uid} {uid} 1"))?;
    fs::write("/proc/self/gid_map", format!("{gid} {gid} 1"))
}
