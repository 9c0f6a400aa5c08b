//! The status of a guest, as the REST API shows it.

use std::collections::BTreeMap;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;
use serde_json::Value;
use utoipa::ToSchema;

use super::record::{Ended, RestartPolicy, State};

/// Memory of a guest's process (`smaps_rollup`), in KiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[allow(
    clippy::struct_field_names,
    reason = "the unit is a part of the name in JSON"
)]
pub struct MemorySplit {
    /// Pages that no other process maps.
    pub private_kib: u64,
    /// Pages that other processes map as well.
    pub shared_kib: u64,
    /// All its pages, each shared one divided by the number of processes that map it.
    pub proportional_kib: u64,
}

/// The vsock device of a guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct VsockStatus {
    /// Its context identifier, which no other guest of the daemon has.
    pub guest_cid: u32,
    /// The socket that programs of the host connect to; those that the guest connects to lie beside it.
    pub uds_path: String,
}

/// A template that is being made of a guest, which goes on while the files are copied.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct TemplateJob {
    /// The name of the template.
    pub id: String,
    /// Bytes that are copied.
    pub done: u64,
    /// Bytes in all.
    pub total: u64,
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
    /// Why its record cannot be read, where it cannot: then what is only known from there is a default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unreadable: Option<String>,
    /// How far the copies of its files are, while it becomes a template.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub template_job: Option<TemplateJob>,
    /// The user of the host that it runs as, in a jail with a user of its own: its disks have to be open to that one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub guest_uid: Option<u32>,
    /// Its configuration, as it was made, or as it was changed since over its own API. Only where one guest is asked
    /// for.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<config::VmConfig>)]
    pub config: Option<Value>,
}

/// Now, in ms since 1970.
pub fn now_ms() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    u64::try_from(now.unwrap_or_default().as_millis()).unwrap_or(u64::MAX)
}
