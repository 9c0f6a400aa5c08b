//! How a process is to be confined.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::cgroup::CgroupConfig;
use super::seccomp::SeccompMode;

/// The options of a jail, in addition to the layers that every jail has.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JailConfig {
    /// The user that the process becomes; it keeps its user where absent.
    pub uid: Option<u32>,
    /// The group that the process becomes; it keeps its group where absent.
    pub gid: Option<u32>,
    /// The control group that the process joins.
    pub cgroup: Option<CgroupConfig>,
    /// Files and folders that the process may go on opening, and write to.
    pub allow: Vec<PathBuf>,
    /// Whether a layer that cannot be entered is an error.
    pub require_all: bool,
    /// The file that says which files the guest only reads, as others may (JSON, an array of paths): made anew before
    /// the process has given up any right.
    pub shared: Option<PathBuf>,
}

/// How a process is confined before its guest runs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Confinement {
    /// The jail, if there is to be one.
    pub jail: Option<JailConfig>,
    /// What happens at a system call that it does not need.
    pub seccomp: SeccompMode,
}
