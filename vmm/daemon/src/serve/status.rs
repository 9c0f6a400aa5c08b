//! What is told of a guest.

use std::collections::BTreeMap;
use std::fmt;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;

use super::identity::VsockStatus;
use super::spec::RestartPolicy;
use host::exit::EndReport;

/// Where a guest is in its life.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema,
)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// It is being made.
    Creating,
    /// Its process has just begun.
    Starting,
    /// Its process waits to be configured and started.
    NotStarted,
    /// Its vCPUs run.
    Running,
    /// Its vCPUs stand still.
    Paused,
    /// It has ended in good order, and has no process.
    Stopped,
    /// It has failed, and has no process.
    Failed,
    /// It has ended, and will be started again.
    Restarting,
    /// It is being deleted.
    Deleting,
}

impl State {
    /// All of them.
    pub const ALL: [Self; 9] = [
        Self::Creating,
        Self::Starting,
        Self::NotStarted,
        Self::Running,
        Self::Paused,
        Self::Stopped,
        Self::Failed,
        Self::Restarting,
        Self::Deleting,
    ];

    /// The word for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Creating => "creating",
            Self::Starting => "starting",
            Self::NotStarted => "not_started",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopped => "stopped",
            Self::Failed => "failed",
            Self::Restarting => "restarting",
            Self::Deleting => "deleting",
        }
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// How a guest ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Ended {
    /// Why.
    #[serde(flatten)]
    pub report: EndReport,
    /// When the daemon learnt of it, in ms since 1970.
    pub time_ms: u64,
}

/// Memory of a guest's process (`smaps_rollup`), in KiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[allow(
    clippy::struct_field_names,
    reason = "the unit is a part of the name in JSON"
)]
pub struct MemorySplit {
    /// Nobody else's.
    pub private_kib: u64,
    /// Others map it as well.
    pub shared_kib: u64,
    /// What is shared divided by those that map it.
    pub proportional_kib: u64,
}

/// A guest.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct VmStatus {
    /// Its name.
    pub id: String,
    /// Where it is in its life.
    pub state: State,
    /// Its process, where it has one.
    pub pid: Option<u32>,
    /// vCPUs.
    pub vcpus: u8,
    /// RAM.
    pub mem_size_mib: u32,
    /// When it was made, in ms since 1970.
    pub created_ms: u64,
    /// The user who made it.
    pub uid: u32,
    /// For how long its process has been there.
    pub uptime_s: Option<u64>,
    /// From the start of its process to its first instruction.
    pub start_ms: Option<u64>,
    /// When it is started again after its end.
    pub restart: RestartPolicy,
    /// How often it was.
    pub restarts: u32,
    /// Words to find it by.
    pub labels: BTreeMap<String, String>,
    /// How it ended the last time.
    pub end: Option<Ended>,
    /// Its memory: with `?stats`, where it has a process.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory: Option<MemorySplit>,
    /// CPU time so far: with `?stats`, where it has a process.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu_s: Option<f64>,
    /// The template that it is a clone of.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub template: Option<String>,
    /// Its vsock device, if it has one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vsock: Option<VsockStatus>,
    /// The user of the host that it runs as, in a jail with a user of its own: its disks have to be open to that one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub guest_uid: Option<u32>,
    /// Its configuration, as it was made, or as it was told since over its own API: of one guest alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<config::VmConfig>)]
    pub config: Option<Value>,
}

/// Now, in ms since 1970.
pub fn now_ms() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    u64::try_from(now.unwrap_or_default().as_millis()).unwrap_or(u64::MAX)
}
