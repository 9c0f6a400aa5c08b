//! The jail of a guest process: what it can still reach when the first instruction of its guest runs.
//!
//! A guest process serves whatever its guest asks of its devices. Should one of them err, then what the guest gets is this process, so the process
//! gives away beforehand all that it does not need. The layers, in their order, each useful where another fails:
//!
//! ```text
//! cgroup ─> namespaces ─> tree (pivot_root) ─> limits ─> uid, gid ─> capabilities ─> no_new_privs ─> landlock ─> seccomp
//!  needs /sys  └── all before any other thread exists: each is a property of a thread, and is inherited ──┘
//! ```
//!
//! A user without privileges has a namespace of users made for the others, where the host allows that; what cannot be had is left out, and told
//! by [`JailReport`]. What was asked for by name (`uid`, `gid`, `cgroup`) is an error where it cannot be had, and so is everything with `require=all`.

mod cgroup;
mod credentials;
mod landlock;
mod limits;
mod namespaces;
mod needs;
mod process;
pub mod seccomp;
mod tree;

use std::fmt::{self, Display};
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use config::VmConfig;

pub use cgroup::{CgroupConfig, LimitHits, root as cgroup_root};
pub use needs::{Access, Need};
pub use process::{Spawned, spawn};
pub use seccomp::SeccompMode;

/// What a jail is to be, beyond what there is in any case.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JailConfig {
    /// The user that the process becomes; as it is where absent.
    pub uid: Option<u32>,
    /// The group that the process becomes; as it is where absent.
    pub gid: Option<u32>,
    /// The control group that the process joins.
    pub cgroup: Option<CgroupConfig>,
    /// Files and folders that the process may go on opening, and write to.
    pub allow: Vec<PathBuf>,
    /// A layer that cannot be had is an error.
    pub require_all: bool,
}

/// What a process gives away before its guest runs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Confinement {
    /// The jail, if there is to be one.
    pub jail: Option<JailConfig>,
    /// What becomes of system calls that it does not need.
    pub seccomp: SeccompMode,
}

/// A layer of the jail.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
#[schema(as = JailLayer)]
pub enum Layer {
    /// Limits of memory, CPU, processes and I/O, by a control group.
    Cgroup,
    /// Users of its own, in which it has no privileges outside; for a process without privileges alone.
    UserNamespace,
    /// Mounts of its own.
    MountNamespace,
    /// A network without devices.
    NetNamespace,
    /// System V IPC and message queues of its own.
    IpcNamespace,
    /// A host name of its own.
    UtsNamespace,
    /// Processes of its own: given by who starts it.
    PidNamespace,
    /// A root folder with nothing in it but what the guest needs.
    Tree,
    /// No core dump of the guest's memory, and so on.
    Limits,
    /// A user and a group of its own.
    Credentials,
    /// No capabilities, nor a way to them.
    Capabilities,
    /// No program that it executes gains privileges.
    NoNewPrivs,
    /// No files but those that the guest needs, no TCP, no signals to others.
    Landlock,
    /// No system calls but those that it needs.
    Seccomp,
}

impl Display for Layer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Cgroup => "cgroup",
            Self::UserNamespace => "user_namespace",
            Self::MountNamespace => "mount_namespace",
            Self::NetNamespace => "net_namespace",
            Self::IpcNamespace => "ipc_namespace",
            Self::UtsNamespace => "uts_namespace",
            Self::PidNamespace => "pid_namespace",
            Self::Tree => "tree",
            Self::Limits => "limits",
            Self::Credentials => "credentials",
            Self::Capabilities => "capabilities",
            Self::NoNewPrivs => "no_new_privs",
            Self::Landlock => "landlock",
            Self::Seccomp => "seccomp",
        })
    }
}

/// A layer that is not there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, utoipa::ToSchema)]
#[schema(as = MissingLayer)]
pub struct Missing {
    /// The layer.
    pub layer: Layer,
    /// Why it is not there.
    pub why: String,
}

/// What `GET /vm/jail` answers: the layers in force.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, utoipa::ToSchema)]
pub struct JailReport {
    /// Whether a jail was asked for.
    pub jailed: bool,
    /// Those that are there.
    pub layers: Vec<Layer>,
    /// Those that are not.
    pub missing: Vec<Missing>,
    /// What becomes of system calls that are not in the policy.
    pub seccomp: SeccompMode,
    /// The user of the process.
    pub uid: u32,
    /// The group of the process.
    pub gid: u32,
}

impl JailReport {
    fn has(&mut self, layer: Layer) {
        self.layers.push(layer);
    }

    fn lacks(&mut self, layer: Layer, why: impl Into<String>) {
        let why = why.into();
        self.missing.push(Missing { layer, why });
    }

    /// Notes whether a layer is there.
    fn note(&mut self, layer: Layer, made: io::Result<()>) {
        match made {
            Ok(()) => self.has(layer),
            Err(error) => self.lacks(layer, error.to_string()),
        }
    }

    /// Whether a layer is there.
    pub fn contains(&self, layer: Layer) -> bool {
        self.layers.contains(&layer)
    }
}

impl Display for JailReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, layer) in self.layers.iter().enumerate() {
            write!(f, "{}{layer}", if index == 0 { "" } else { " " })?;
        }
        for (index, Missing { layer, why }) in self.missing.iter().enumerate() {
            let before = if index == 0 { "; without" } else { "," };
            write!(f, "{before} {layer} ({why})")?;
        }
        Ok(())
    }
}

/// Why a process is not jailed as asked. It is in no defined state then, and has to end.
#[derive(Debug, thiserror::Error)]
pub enum JailError {
    /// A layer that was asked for cannot be had.
    #[error("--jail: {layer}: {why}")]
    Missing {
        /// The layer.
        layer: Layer,
        /// Why it cannot be had.
        why: String,
    },
    /// The filters of system calls.
    #[error("--seccomp: {0}")]
    Seccomp(io::Error),
    /// A file of the guest is closed to the user that the process has become.
    #[error(
        "--jail: user {uid} may not {access} {}, which is user {owner}'s, with mode {mode:o}: the guest's files have to be open to the user of its jail (chown or chmod; or no jail: for guests of a daemon, coppice serve --jail off)",
        path.display()
    )]
    Closed {
        /// The file.
        path: PathBuf,
        /// The user of the process.
        uid: u32,
        /// What it was to do with it.
        access: &'static str,
        /// The user that the file belongs to.
        owner: u32,
        /// The mode of the file.
        mode: u32,
    },
    /// What the guest needs cannot be found or made.
    #[error("--jail: {}: {source}", path.display())]
    Path {
        /// The path.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
}

fn required(layer: Layer) -> impl FnOnce(io::Error) -> JailError {
    move |error| JailError::Missing {
        layer,
        why: error.to_string(),
    }
}

/// Confines this process to what a guest of `config` needs, with its sockets at `sockets`. Called by the only thread of the process.
///
/// # Errors
/// [`JailError`].
pub fn enter(
    confinement: &Confinement,
    config: &VmConfig,
    sockets: &[&Path],
) -> Result<JailReport, JailError> {
    // What the kernel told the process at its start is looked up now; where the kernel is old, that takes a file that is to be out of reach.
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
        kvm::vm::keep_kvm_open();
    }
    namespaces::enter(report).map_err(required(Layer::UserNamespace))?;
    if report.contains(Layer::MountNamespace) {
        report.note(Layer::Tree, tree::enter(needs));
    } else {
        report.lacks(Layer::Tree, "it takes a mount namespace");
    }
    report.note(Layer::Limits, limits::enter());
    // Who is no longer root may not.
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
