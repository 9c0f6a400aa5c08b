//! User, group, capabilities.
//!
//! Each is a property of a thread, so all are changed while the process has one thread.

use std::io;

use rustix::process::{DumpableBehavior, Gid, Uid, getegid, geteuid, set_dumpable_behavior};
use rustix::thread::{
    CapabilitiesSecureBits, CapabilitySet, CapabilitySets, capabilities_secure_bits,
    clear_ambient_capability_set, remove_capability_from_bounding_set, set_capabilities,
    set_capabilities_secure_bits, set_no_new_privs, set_thread_groups, set_thread_res_gid,
    set_thread_res_uid,
};

/// Becomes a user and a group, without supplementary groups. Returns whether a user or group was given.
pub(super) fn become_user(uid: Option<u32>, gid: Option<u32>) -> io::Result<bool> {
    if uid.is_none() && gid.is_none() {
        return Ok(false);
    }
    // -1 is no user: the system call takes it as "no change".
    if uid == Some(u32::MAX) || gid == Some(u32::MAX) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let uid = uid.map_or_else(geteuid, Uid::from_raw);
    let gid = gid.map_or_else(getegid, Gid::from_raw);
    // The supplementary groups are dropped while the process still has the right to drop them.
    match set_thread_groups(&[]) {
        // A process without the right to drop groups can only keep its user and group.
        Err(_) if uid == geteuid() && gid == getegid() => return Ok(true),
        done => done?,
    }
    set_thread_res_gid(gid, gid, gid)?;
    set_thread_res_uid(uid, uid, uid)?;
    Ok(true)
}

/// Closes the ways to capabilities, if the process has the right to: executed programs get none, and root gets none for
/// being root.
pub(super) fn close_ways_to_capabilities() {
    // Where the process has no such right, no_new_privs has the same effect.
    for capability in CapabilitySet::all().iter() {
        let _ = remove_capability_from_bounding_set(capability);
    }
    let locked = CapabilitiesSecureBits::NO_ROOT
        | CapabilitiesSecureBits::NO_ROOT_LOCKED
        | CapabilitiesSecureBits::NO_SETUID_FIXUP
        | CapabilitiesSecureBits::NO_SETUID_FIXUP_LOCKED
        | CapabilitiesSecureBits::KEEP_CAPS_LOCKED
        | CapabilitiesSecureBits::NO_CAP_AMBIENT_RAISE
        | CapabilitiesSecureBits::NO_CAP_AMBIENT_RAISE_LOCKED;
    if let Ok(bits) = capabilities_secure_bits() {
        let _ = set_capabilities_secure_bits((bits - CapabilitiesSecureBits::KEEP_CAPS) | locked);
    }
}

/// Drops all capabilities.
pub(super) fn drop_capabilities() -> io::Result<()> {
    clear_ambient_capability_set()?;
    let none = CapabilitySets {
        effective: CapabilitySet::empty(),
        permitted: CapabilitySet::empty(),
        inheritable: CapabilitySet::empty(),
    };
    set_capabilities(None, none)?;
    Ok(())
}

/// Makes the process's folder in `/proc` belong to the user that it has become, as an execution of a program would:
/// sharing and snapshots read the process's mappings there. Core dumps stay disabled (`limits`).
pub(super) fn own_proc() -> io::Result<()> {
    Ok(set_dumpable_behavior(DumpableBehavior::Dumpable)?)
}

/// Keeps executed programs from gaining privileges.
pub(super) fn no_new_privs() -> io::Result<()> {
    Ok(set_no_new_privs(true)?)
}
