//! The jail of a guest process: what it can still reach when the first instruction of its guest runs.
//!
//! A guest process serves whatever its guest asks of its devices. Should one of them err, then what the guest gets is
//! this process, so the process gives away beforehand all that it does not need. The layers, in their order, each
//! useful where another fails:
//!
//! ```text
//! cgroup (needs /sys) ─> namespaces ─> tree (pivot_root) ─> limits ─> uid, gid ─> capabilities
//!                     ─> no_new_privs ─> landlock ─> seccomp
//! ```
//!
//! All of them are entered before any other thread exists, because each is a property of a thread, which the threads
//! that it starts inherit.
//!
//! A user without privileges has a namespace of users made for the others, where the host allows that; what cannot be
//! had is left out, and told by [`JailReport`]. What was asked for by name (`uid`, `gid`, `cgroup`) is an error where
//! it cannot be had, and so is everything with `require=all`.

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
mod report;
pub mod seccomp;
mod tree;

use std::path::Path;

use config::VmConfig;

pub use cgroup::{CgroupConfig, LimitHits, root as cgroup_root};
pub use error::JailError;
pub use need::{Access, Need};
pub use options::{Confinement, JailConfig};
pub use process::{Spawned, spawn};
pub use report::{JailReport, Layer, Missing};
pub use seccomp::SeccompMode;

use error::required;

/// Confines this process to what a guest of `config` needs, with its sockets at `sockets`. Called by the only thread of
/// the process.
///
/// # Errors
/// [`JailError`].
pub fn enter(
    confinement: &Confinement,
    config: &VmConfig,
    sockets: &[&Path],
) -> Result<JailReport, JailError> {
    // What the kernel told the process at its start is looked up now; where the kernel is old, that takes a file that
    // is to be out of reach.
    rustix::param::page_size();
    let _ = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    let mut report = JailReport {
        jailed: confinement.jail.is_some(),
        seccomp: confinement.seccomp,
        ..JailReport::default()
    };
    if let Some(jail) = &confinement.jail {
        let needs = needs::of(config, sockets, jail)?;
        enter_with(jail, &needs, &mut report)?;
    }
    if confinement.seccomp == SeccompMode::Off {
        report.lacks(Layer::Seccomp, "--seccomp off");
    } else {
        if confinement.jail.is_none() {
            report.note(Layer::NoNewPrivs, credentials::no_new_privs());
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

/// Gives a file that this process has made, before it is jailed, to the user that it is about to become.
///
/// # Errors
/// `Path`.
pub fn give(confinement: &Confinement, path: &Path) -> Result<(), JailError> {
    match &confinement.jail {
        Some(jail) => needs::give(path, jail),
        None => Ok(()),
    }
}

/// All layers but the filters of system calls.
fn enter_with(jail: &JailConfig, needs: &[Need], report: &mut JailReport) -> Result<(), JailError> {
    match &jail.cgroup {
        Some(group) => {
            group.join().map_err(required(Layer::Cgroup))?;
            report.has(Layer::Cgroup);
        }
        None => report.lacks(Layer::Cgroup, "no cgroup= was given"),
    }
    if jail.uid.is_some() || jail.gid.is_some() {
        // Its device may be for root alone.
        kvm::vm::open_kvm_early();
    }
    namespaces::enter(report).map_err(required(Layer::UserNamespace))?;
    if report.contains(Layer::MountNamespace) {
        report.note(Layer::Tree, tree::enter(needs));
    } else {
        report.lacks(Layer::Tree, "it takes a mount namespace");
    }
    report.note(Layer::Limits, limits::enter());
    // First, as only root may do this, and the process may be about to become another user.
    credentials::close_ways_to_capabilities();
    match credentials::become_user(jail.uid, jail.gid) {
        Ok(true) => report.has(Layer::Credentials),
        Ok(false) => report.lacks(Layer::Credentials, "no uid= was given"),
        Err(error) => return Err(required(Layer::Credentials)(error)),
    }
    report.note(Layer::Capabilities, credentials::drop_capabilities());
    report.note(Layer::NoNewPrivs, credentials::no_new_privs());
    let in_tree = report.contains(Layer::Tree);
    if jail.uid.is_some() {
        credentials::own_proc().map_err(required(Layer::Credentials))?;
        needs::are_open(needs, in_tree)?;
    }
    report.note(Layer::Landlock, landlock::enter(needs, in_tree));
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
