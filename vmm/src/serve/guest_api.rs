//! The guest's own API below `/vms/{id}/`, as the `OpenAPI` document shows it. These requests are passed on (`routes`), and done by the
//! guest's process ([`crate::api`]): here is only what they look like, with the types that the process reads.

#![allow(
    dead_code,
    reason = "the document is made from these; nothing calls them"
)]

use serde::Deserialize;
use utoipa::ToSchema;

use super::fault::FaultBody;
use crate::config::{
    BalloonConfig, BalloonUpdate, BootSourceConfig, DriveConfig, DriveUpdate, EntropyConfig,
    MachineConfig, PmemConfig, SerialConfig, SharingConfig, VmConfig,
};

/// The body of `PUT /actions`.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Action {
    action_type: ActionType,
}

/// What a guest can be told to do.
#[derive(Deserialize, ToSchema)]
pub(super) enum ActionType {
    /// Write the counters.
    FlushMetrics,
    /// Start.
    InstanceStart,
    /// Press Ctrl-Alt-Del.
    SendCtrlAltDel,
}

/// The body of `PATCH /vm`.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct VmUpdate {
    state: VmState,
}

/// Whether the vCPUs run.
#[derive(Deserialize, ToSchema)]
pub(super) enum VmState {
    /// They stand still.
    Paused,
    /// They run.
    Resumed,
}

/// The fields of `machine-config` that are to change.
#[derive(Deserialize, ToSchema)]
pub(super) struct MachineUpdate {
    vcpu_count: Option<u8>,
    mem_size_mib: Option<u32>,
}

/// A request of the guest's API: it is done with 204, or answered with 200.
macro_rules! guest {
    ($(#[doc = $doc:literal])* $name:ident, $method:ident, $path:literal $(, part = $part:literal)? $(, body = $body:ty)? => $done:literal $(, $answer:ty)?) => {
        $(#[doc = $doc])*
        #[utoipa::path($method, path = $path, tag = "the guest's own API",
            params(("id" = String, Path, description = "The guest.") $(, ($part = String, Path))?),
            $(request_body = $body,)?
            responses((status = $done, description = "Done." $(, body = $answer)?),
                (status = 400, body = FaultBody, description = "The guest's process refuses."),
                (status = 404, body = FaultBody, description = "There is no such guest."),
                (status = 409, body = FaultBody, description = "The guest has no process."),
                (status = 413, body = FaultBody),
                (status = 502, body = FaultBody),
                (status = 503, body = FaultBody),
                (status = 504, body = FaultBody),
                (status = 507, body = FaultBody, description = "There is no room for it.")))]
        pub(super) fn $name() {}
    };
}

guest!(/// The guest's state.
    info, get, "/vms/{id}/" => 200, Object);
guest!(/// The version of its VMM.
    version, get, "/vms/{id}/version" => 200, Object);
guest!(/// All that is configured.
    config, get, "/vms/{id}/vm/config" => 200, VmConfig);
guest!(/// Memory and vCPUs.
    machine, get, "/vms/{id}/machine-config" => 200, MachineConfig);
guest!(/// Sets memory and vCPUs, before the start.
    set_machine, put, "/vms/{id}/machine-config", body = MachineConfig => 204);
guest!(/// Changes memory or vCPUs, before the start.
    update_machine, patch, "/vms/{id}/machine-config", body = MachineUpdate => 204);
guest!(/// Sets the kernel, before the start.
    boot_source, put, "/vms/{id}/boot-source", body = BootSourceConfig => 204);
guest!(/// Adds or replaces a drive, before the start.
    set_drive, put, "/vms/{id}/drives/{drive}", part = "drive", body = DriveConfig => 204);
guest!(/// Gives a drive another file, after the start.
    update_drive, patch, "/vms/{id}/drives/{drive}", part = "drive", body = DriveUpdate => 204);
guest!(/// Adds or replaces a disk as memory, before the start.
    set_pmem, put, "/vms/{id}/pmem/{pmem}", part = "pmem", body = PmemConfig => 204);
guest!(/// Adds the entropy device, before the start.
    entropy, put, "/vms/{id}/entropy", body = EntropyConfig => 204);
guest!(/// Sets where the serial console writes, before the start.
    serial, put, "/vms/{id}/serial", body = SerialConfig => 204);
guest!(/// Sets what is shared, before the start.
    sharing, put, "/vms/{id}/sharing", body = SharingConfig => 204);
guest!(/// What of its memory is shared.
    shared, get, "/vms/{id}/vm/sharing" => 200, Object);
guest!(/// The balloon.
    balloon, get, "/vms/{id}/balloon" => 200, BalloonConfig);
guest!(/// Adds the balloon, before the start.
    set_balloon, put, "/vms/{id}/balloon", body = BalloonConfig => 204);
guest!(/// Changes the amount of the balloon.
    update_balloon, patch, "/vms/{id}/balloon", body = BalloonUpdate => 204);
guest!(/// Has it start, or write its counters, or presses Ctrl-Alt-Del.
    actions, put, "/vms/{id}/actions", body = Action => 204);
guest!(/// Has its vCPUs stand still, or go on.
    state, patch, "/vms/{id}/vm", body = VmUpdate => 204);

/// Its counters, for Prometheus.
#[utoipa::path(get, path = "/vms/{id}/metrics", tag = "the guest's own API", params(("id" = String, Path)), responses(
    (status = 200, content_type = "application/openmetrics-text", body = String),
    (status = 404, body = FaultBody), (status = 409, body = FaultBody)))]
pub(super) fn counters() {}
