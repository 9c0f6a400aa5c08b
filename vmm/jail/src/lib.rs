//! The jail of a guest process, which limits what it can reach before the first instruction of its guest runs.
//!
//! A guest process serves the requests of its guest to its devices. If a device has a defect, the guest may take over
//! the process, so the process gives up all rights that it does not need beforehand. These are the layers in their
//! order, each of which is useful where another fails:
//!
//! ```text
//! cgroup (needs /sys) ─> namespaces ─> tree (pivot_root) ─> limits ─> uid, gid ─> capabilities
//!                     ─> no_new_privs ─> landlock ─> seccomp
//! ```
//!
//! All of them are entered before any other thread exists, because each is a property of a thread, which the threads
//! that it starts inherit.
//!
//! For a user without privileges, a user namespace is made for the other namespaces, where the host allows that. A
//! layer that cannot be entered is left out, and [`JailReport`] lists it. A layer that was requested by name (`uid`,
//! `gid`, `cgroup`) is an error where it cannot be entered, and so is every layer with `require=all`.

mod cgroup;
mod credentials;
mod error;
mod landlock;
mod limits;
mod namespaces;
mod need;
mod needs;
mod options;
mod process;
pub mod reader;
mod report;
pub mod seccomp;
mod tree;

use std::io;
use std::path::Path;

use config::{LoadSnapshot, VmConfig};

pub use cgroup::{CgroupConfig, LimitHits, root as cgroup_root};
pub use error::JailError;
pub use need::{Access, Need};
pub use options::{Confinement, JailConfig};
pub use process::{Spawned, spawn};
pub use report::{JailReport, Layer, Missing};
pub use seccomp::SeccompMode;

use error::required;

/// Confines this process to what a guest of `config` needs, which goes on from the snapshot `restored` if that is
/// given, with its sockets at `sockets`. To be called by the only thread of the process.
///
/// # Errors
/// [`JailError`].
pub fn enter(
    confinement: &Confinement,
    config: &VmConfig,
    restored: Option<&LoadSnapshot>,
    sockets: &[&Path],
) -> Result<JailReport, JailError> {
    // The page size is looked up now: with an old kernel, the lookup reads a file (`/proc/self/auxv`) that the jail
    // puts out of reach.
    rustix::param::page_size();
    let _ = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    let mut report = JailReport {
        jailed: confinement.jail.is_some(),
        seccomp: confinement.seccomp,
        ..JailReport::default()
    };
    if let Some(jail) = &confinement.jail {
        let needs = needs::of(config, restored, sockets, jail)?;
        enter_with(jail, &needs, &mut report)?;
    }
    if confinement.seccomp == SeccompMode::Off {
        report.lacks(Layer::Seccomp, "--seccomp off");
    } else {
        if confinement.jail.is_none() {
            report.record(Layer::NoNewPrivs, credentials::no_new_privs());
        }
        seccomp::enter(confinement.seccomp).map_err(JailError::Seccomp)?;
        report.has(Layer::Seccomp);
    }
    report.uid = rustix::process::geteuid().as_raw();
    report.gid = rustix::process::getegid().as_raw();
    if let Some(JailConfig {
        require_all: true, ..
    }) = &confinement.jail
        && let Some(Missing { layer, why }) = report
            .missing
            .iter()
            .find(|missing| missing.layer != Layer::UserNamespace)
    {
        return Err(JailError::Missing {
            layer: *layer,
            why: why.clone(),
        });
    }
    Ok(report)
}

/// Enters all layers but the filters of system calls.
fn enter_with(jail: &JailConfig, needs: &[Need], report: &mut JailReport) -> Result<(), JailError> {
    match &jail.cgroup {
        Some(group) => {
            group.join().map_err(required(Layer::Cgroup))?;
            report.has(Layer::Cgroup);
        }
        None => report.lacks(Layer::Cgroup, "no cgroup= was given"),
    }
    if jail.uid.is_some() || jail.gid.is_some() {
        // `/dev/kvm` may be open to root alone.
        kvm::vm::open_kvm_early();
    }
    namespaces::enter(report).map_err(required(Layer::UserNamespace))?;
    let tree = if report.contains(Layer::MountNamespace) {
        tree::enter(needs)
    } else {
        Err(io::Error::other("it takes a mount namespace"))
    };
    if jail.uid.is_some() {
        // A process with a user of its own is to see its guest's files alone: it does not start with those of the host.
        tree.map_err(required(Layer::Tree))?;
        report.has(Layer::Tree);
    } else {
        report.record(Layer::Tree, tree);
    }
    report.record(Layer::Limits, limits::enter());
    // This comes first, as only root may do it, and the process may be about to become another user.
    credentials::close_ways_to_capabilities();
    match credentials::become_user(jail.uid, jail.gid) {
        Ok(true) => report.has(Layer::Credentials),
        Ok(false) => report.lacks(Layer::Credentials, "no uid= was given"),
        Err(error) => return Err(required(Layer::Credentials)(error)),
    }
    report.record(Layer::Capabilities, credentials::drop_capabilities());
    report.record(Layer::NoNewPrivs, credentials::no_new_privs());
    let in_tree = report.contains(Layer::Tree);
    if jail.uid.is_some() {
        credentials::own_proc().map_err(required(Layer::Credentials))?;
        needs::check_access(needs, in_tree)?;
    }
    report.record(Layer::Landlock, landlock::enter(needs, in_tree));
    Ok(())
}

#[cfg(test)]
mod tests {
    use utoipa::PartialSchema;

    use super::*;

    #[test]
    fn the_reference_of_jail_layers_is_current() {
        let schema = serde_json::to_value(Layer::schema()).unwrap();
        let layers = schema["enum"].as_array().unwrap().iter();
        let layers = layers.map(|name| name.as_str().unwrap());
        let page = include_str!("../../../docs/reference/jail-layers.md");
        let rows = page.lines().filter_map(|line| line.strip_prefix("| `"));
        let documented = rows.map(|row| row.split('`').next().unwrap());
        assert_eq!(documented.collect::<Vec<_>>(), layers.collect::<Vec<_>>());
    }
}
