//! Bodies of requests that are not part of a configuration. The `OpenAPI` document of the daemon is made of the same
//! types.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{CpuTemplate, HugePageConfig};

/// The body of `PUT /actions`.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Action {
    /// What is to be done.
    pub action_type: ActionType,
}

/// What a guest can be told to do.
#[derive(Clone, Copy, Deserialize, ToSchema)]
pub enum ActionType {
    /// Write the counters.
    FlushMetrics,
    /// Start.
    InstanceStart,
    /// Press Ctrl-Alt-Del.
    SendCtrlAltDel,
}

/// The body of `PUT /drives/{id}/snapshot` and `PUT /pmem/{id}/snapshot`.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DriveSnapshot {
    /// A new file, in which the disk goes on.
    #[schema(value_type = String)]
    pub path_on_host: PathBuf,
}

/// The body of `PUT /drives/{id}/resize`.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DriveResize {
    /// The new size in bytes, no less than the old one.
    pub size: u64,
}

/// The body of `PUT /drives/{id}/compact`.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DriveCompact {
    /// Also gives back blocks that hold only zeros.
    #[serde(default)]
    pub find_zeros: bool,
}

/// The body of `PUT /drives/{id}/commit`: nothing can be said about it yet.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DriveCommit {}

/// The body of `PUT /drives/{id}/job`.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct JobUpdate {
    /// What is to become of the job.
    pub state: JobEnd,
}

/// What can be asked of a job.
#[derive(Clone, Copy, Deserialize, ToSchema)]
pub enum JobEnd {
    /// That it stops.
    Cancelled,
}

/// The body of `PATCH /vm`.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VmUpdate {
    /// What the vCPUs are to do.
    pub state: VmState,
}

/// Whether the vCPUs run.
#[derive(Clone, Copy, Deserialize, ToSchema)]
pub enum VmState {
    /// They stand still.
    Paused,
    /// They run.
    Resumed,
}

/// The body of `PATCH /balloon/hinting/stop`, where there is one.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct HintingStop {}

/// What `GET /version` answers. The name of the field is Firecracker's.
#[derive(Serialize, ToSchema)]
pub struct Version {
    /// The version of Coppice.
    pub firecracker_version: &'static str,
}

/// The body of `PUT /mmds` and of `PATCH /mmds`, and what `GET /mmds` answers: an object with anything in it.
///
/// It is read as it is by the metadata store, and not by way of this type.
#[derive(Serialize, Deserialize, ToSchema)]
#[allow(dead_code, reason = "the document is made from it")]
pub struct Metadata(std::collections::BTreeMap<String, serde_json::Value>);

/// The body of `PATCH /machine-config`: the fields that are to change, one at least.
///
/// It is read field by field into what is there ([`crate::MachineConfig::updated`]), and not by way of this type.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[allow(dead_code, reason = "the document is made from it")]
pub struct MachineUpdate {
    vcpu_count: Option<u8>,
    mem_size_mib: Option<u32>,
    smt: Option<bool>,
    cpu_template: Option<CpuTemplate>,
    track_dirty_pages: Option<bool>,
    huge_pages: Option<HugePageConfig>,
}
