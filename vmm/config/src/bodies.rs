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

/// The actions of a guest.
#[derive(Clone, Copy, Deserialize, ToSchema)]
pub enum ActionType {
    /// Write all counters to the file of `metrics`.
    FlushMetrics,
    /// Start the guest.
    InstanceStart,
    /// Press Ctrl-Alt-Del.
    SendCtrlAltDel,
}

/// The body of `PUT /drives/{id}/snapshot` and `PUT /pmem/{id}/snapshot`.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DriveSnapshot {
    /// A new file, which is the guest's disk from then on.
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

/// The body of `PUT /drives/{id}/commit`, which has no fields yet.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DriveCommit {}

/// The body of `PUT /drives/{id}/job`.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct JobUpdate {
    /// The new state of the job.
    pub state: JobEnd,
}

/// The states that a request can bring a job to.
#[derive(Clone, Copy, Deserialize, ToSchema)]
pub enum JobEnd {
    /// The job stops.
    Cancelled,
}

/// The body of `PATCH /vm`.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VmUpdate {
    /// The new state of the vCPUs.
    pub state: VmState,
}

/// Whether the vCPUs run.
#[derive(Clone, Copy, Deserialize, ToSchema)]
pub enum VmState {
    /// They are paused.
    Paused,
    /// They run.
    Resumed,
}

/// The body of `PATCH /balloon/hinting/stop`, where there is one.
#[derive(Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct HintingStop {}

/// The response to `GET /version`. The name of the field is Firecracker's.
#[derive(Serialize, ToSchema)]
pub struct Version {
    /// The version of Coppice.
    pub firecracker_version: &'static str,
}

/// The body of `PUT /mmds` and of `PATCH /mmds`, and the response to `GET /mmds`: an object with any content.
///
/// The metadata store reads the JSON itself, and does not use this type.
#[derive(Serialize, Deserialize, ToSchema)]
#[allow(dead_code, reason = "the document is made from it")]
pub struct Metadata(std::collections::BTreeMap<String, serde_json::Value>);

/// The body of `PATCH /machine-config`: the fields that are to change, one at least.
///
/// The fields are applied to the present configuration ([`crate::MachineConfig::updated`]), without this type.
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
