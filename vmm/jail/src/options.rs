//! What a process is asked to give away.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::cgroup::CgroupConfig;
use super::seccomp::SeccompMode;

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
