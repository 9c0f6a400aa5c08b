//! User, group, capabilities.
//!
//! Each is a property of a thread: to be changed while there is one.

use std::io;

use rustix::process::{DumpableBehavior, Gid, Uid, getegid, geteuid, set_dumpable_behavior};
use rustix::thread::{
    CapabilitiesSecureBits, CapabilitySet, CapabilitySets, capabilities_secure_bits,
    clear_ambient_capability_set, remove_capability_from_bounding_set, set_capabilities,
    set_capabilities_secure_bits, set_no_new_privs, set_thread_groups, set_thread_res_gid,
    set_thread_res_uid,
};

/// Becomes a user and a group, without any further group. Whether there is anything to become.
pub(super) fn become_user(uid: Option<u32>, gid: Option<u32>) -> io::Result<bool> {
    if uid.is_none() && gid.is_none() {
        return Ok(false);
    }
    // -1 is no user, and would mean that nothing changes.
    if uid == Some(u32::MAX) || gid == Some(u32::MAX) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let uid = uid.map_or_else(geteuid, Uid::from_raw);
    let gid = gid.map_or_else(getegid, Gid::from_raw);
    // The groups go before the right to change them does.
    match set_thread_groups(&[]) {
        // Without the right, one has to stay who one is.
        Err(_) if uid == geteuid() && gid == getegid() => return Ok(true),
        done => done?,
    }
    set_thread_res_gid(gid, gid, gid)?;
    set_thread_res_uid(uid, uid, uid)?;
    Ok(true)
}

/// Closes the ways to capabilities, as long as it has the right to: that a program that is executed has any, and that
/// root has all.
pub(super) fn close_ways_to_capabilities() {
    // Where there is no such right, no_new_privs does as much.
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

/// Gives all capabilities away.
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

/// Has the process's own folder of `/proc` belong to the user that it has become, as after a program of that user's was
/// executed: what its memory maps is told there, and sharing and snapshots look at it. There are no core dumps all the
/// same (`limits`).
pub(super) fn own_proc() -> io::Result<()> {
    Ok(set_dumpable_behavior(DumpableBehavior::Dumpable)?)
}

/// Nothing that is executed gains privileges.
pub(super) fn no_new_privs() -> io::Result<()> {
    Ok(set_no_new_privs(true)?)
}
