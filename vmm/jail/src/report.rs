//! The layers of a jail: which of them are in force, and why the others are not.

use std::fmt::{self, Display};
use std::io;

use serde::Serialize;

use super::seccomp::SeccompMode;
use host::report::chain;

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
    /// Processes of its own; whoever starts the process makes this namespace.
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

/// A layer that is not in force.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, utoipa::ToSchema)]
#[schema(as = MissingLayer)]
pub struct Missing {
    /// The layer.
    pub layer: Layer,
    /// Why it is not in force.
    pub why: String,
}

/// The response to `GET /vm/jail`: the layers in force.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, utoipa::ToSchema)]
pub struct JailReport {
    /// Whether a jail was requested.
    pub jailed: bool,
    /// The layers that are in force.
    pub layers: Vec<Layer>,
    /// The layers that are not.
    pub missing: Vec<Missing>,
    /// What happens at a system call that is not in the policy.
    pub seccomp: SeccompMode,
    /// The user of the process.
    pub uid: u32,
    /// The group of the process.
    pub gid: u32,
}

impl JailReport {
    pub(super) fn has(&mut self, layer: Layer) {
        self.layers.push(layer);
    }

    pub(super) fn lacks(&mut self, layer: Layer, why: impl Into<String>) {
        let why = why.into();
        self.missing.push(Missing { layer, why });
    }

    /// Records whether a layer is in force.
    pub(super) fn record(&mut self, layer: Layer, made: io::Result<()>) {
        match made {
            Ok(()) => self.has(layer),
            Err(error) => self.lacks(layer, chain(&error).to_string()),
        }
    }

    /// Whether a layer is in force.
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
