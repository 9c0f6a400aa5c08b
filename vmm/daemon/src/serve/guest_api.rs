//! The guest's own API below `/vms/{id}/`, as the `OpenAPI` document shows it. The daemon passes these requests on
//! (`routes`), and the guest's process carries them out ([`control::api`]). This module only describes them, with the
//! types that the process reads. A test of `routes::openapi` checks that none is left out.

#![allow(
    dead_code,
    reason = "the document is made from these; nothing calls them"
)]

use super::fault::FaultBody;
use config::CreateSnapshot;
use config::bodies::{
    Action, DriveCommit, DriveCompact, DriveResize, DriveSnapshot, HintingStop, JobUpdate,
    MachineUpdate, Metadata, Version, VmUpdate,
};
use config::{
    BalloonConfig, BalloonStatisticsUpdate, BalloonUpdate, BootSourceConfig, DriveConfig,
    DriveUpdate, EntropyConfig, HintingStart, LoggerConfig, MachineConfig, MetricsConfig,
    MmdsConfig, PmemConfig, SerialConfig, SharingConfig, VmConfig, VsockConfig,
};
use control::{HintingState, InstanceInfo};
use jail::JailReport;
use machine::{DriveParent, FilePageReport, JobStatus, PageReport, SharingReport};

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
    info, get, "/vms/{id}/" => 200, InstanceInfo);
guest!(/// The version of its VMM.
    version, get, "/vms/{id}/version" => 200, Version);
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
guest!(/// Gives a drive another file, after the start, and whenever the guest starts again.
    update_drive, patch, "/vms/{id}/drives/{drive}", part = "drive", body = DriveUpdate => 204);
guest!(/// Has the disk of a drive go on in a new file. The old one stays as it is.
    snapshot_drive, put, "/vms/{id}/drives/{drive}/snapshot", part = "drive", body = DriveSnapshot => 204);
guest!(/// What the disk of a drive stands on.
    drive_parent, get, "/vms/{id}/drives/{drive}/parent", part = "drive" => 200, DriveParent);
guest!(/// Makes the disk of a drive larger, and tells the guest.
    resize_drive, put, "/vms/{id}/drives/{drive}/resize", part = "drive", body = DriveResize => 204);
guest!(/// Starts a job that moves the blocks of a disk down and cuts its file.
    compact_drive, put, "/vms/{id}/drives/{drive}/compact", part = "drive", body = DriveCompact => 204);
guest!(/// Starts a job that merges a disk into its parent while the guest goes on.
    commit_drive, put, "/vms/{id}/drives/{drive}/commit", part = "drive", body = DriveCommit => 204);
guest!(/// The last job of a drive.
    drive_job, get, "/vms/{id}/drives/{drive}/job", part = "drive" => 200, JobStatus);
guest!(/// Stops the job of a drive.
    cancel_drive_job, put, "/vms/{id}/drives/{drive}/job", part = "drive", body = JobUpdate => 204);
guest!(/// Adds or replaces a disk as memory, before the start.
    set_pmem, put, "/vms/{id}/pmem/{pmem}", part = "pmem", body = PmemConfig => 204);
guest!(/// Has the disk of a pmem device go on in a new file. The old one stays as it is.
    snapshot_pmem, put, "/vms/{id}/pmem/{pmem}/snapshot", part = "pmem", body = DriveSnapshot => 204);
guest!(/// Adds the entropy device, before the start.
    entropy, put, "/vms/{id}/entropy", body = EntropyConfig => 204);
guest!(/// Adds the socket device, before the start. What is left out is the guest's own: a socket in its folder, and an identifier that no other guest has.
    vsock, put, "/vms/{id}/vsock", body = VsockConfig => 204);
guest!(/// What the guest is told of itself.
    mmds, get, "/vms/{id}/mmds" => 200, Metadata);
guest!(/// Sets what the guest is told of itself.
    set_mmds, put, "/vms/{id}/mmds", body = Metadata => 204);
guest!(/// Changes what the guest is told of itself: a JSON merge patch (RFC 7396).
    update_mmds, patch, "/vms/{id}/mmds", body = Metadata => 204);
guest!(/// Sets where the guest finds its metadata, before the start.
    mmds_config, put, "/vms/{id}/mmds/config", body = MmdsConfig => 204);
guest!(/// Sets where the serial console writes, before the start.
    serial, put, "/vms/{id}/serial", body = SerialConfig => 204);
guest!(/// Sets where the log goes and what is in it, before the start.
    logger, put, "/vms/{id}/logger", body = LoggerConfig => 204);
guest!(/// Sets where lines of counters go, before the start.
    set_metrics, put, "/vms/{id}/metrics", body = MetricsConfig => 204);
guest!(/// Sets what is shared, before the start.
    sharing, put, "/vms/{id}/sharing", body = SharingConfig => 204);
guest!(/// What of its memory is shared.
    shared, get, "/vms/{id}/vm/sharing" => 200, SharingReport);
guest!(/// What backs the page of a guest physical address, in decimal or, behind 0x, in hexadecimal.
    page, get, "/vms/{id}/vm/sharing/pages/{address}", part = "address" => 200, PageReport);
guest!(/// The guest's pages that a page of a file backs, or may come to back: DEVICE-INODE-OFFSET, in decimal.
    pages_of_file, get, "/vms/{id}/vm/sharing/files/{page}", part = "page" => 200, FilePageReport);
guest!(/// The layers of its jail, and those that are missing.
    jail, get, "/vms/{id}/vm/jail" => 200, JailReport);
guest!(/// The balloon.
    balloon, get, "/vms/{id}/balloon" => 200, BalloonConfig);
guest!(/// Adds the balloon, before the start.
    set_balloon, put, "/vms/{id}/balloon", body = BalloonConfig => 204);
guest!(/// Changes the amount of the balloon.
    update_balloon, patch, "/vms/{id}/balloon", body = BalloonUpdate => 204);
guest!(/// What the guest says of its memory, by name.
    balloon_statistics, get, "/vms/{id}/balloon/statistics" => 200, BTreeMap<String, u64>);
guest!(/// Asks for the guest's statistics more or less often.
    update_balloon_statistics, patch, "/vms/{id}/balloon/statistics", body = BalloonStatisticsUpdate => 204);
guest!(/// Has the guest tell of its free memory.
    start_hinting, patch, "/vms/{id}/balloon/hinting/start", body = Option<HintingStart> => 204);
guest!(/// Ends the guest's telling of its free memory.
    stop_hinting, patch, "/vms/{id}/balloon/hinting/stop", body = Option<HintingStop> => 204);
guest!(/// How far the guest is with telling of its free memory.
    hinting, get, "/vms/{id}/balloon/hinting/status" => 200, HintingState);
guest!(/// Saves the guest, which has to be paused, to files.
    create_snapshot, put, "/vms/{id}/snapshot/create", body = CreateSnapshot => 204);
guest!(/// Has its vCPUs stand still, or go on.
    state, patch, "/vms/{id}/vm", body = VmUpdate => 204);

/// Has it start, or write its counters, or presses Ctrl-Alt-Del. A guest that waited starts in a new process, with all
/// that it was told.
#[utoipa::path(put, path = "/vms/{id}/actions", tag = "the guest's own API", params(("id" = String, Path)), request_body = Action,
    responses((status = 204, description = "Done."),
        (status = 400, body = FaultBody, description = "The guest's process refuses."),
        (status = 404, body = FaultBody, description = "There is no such guest."),
        (status = 409, body = FaultBody, description = "The guest has no process."),
        (status = 413, body = FaultBody),
        (status = 422, body = FaultBody, description = "It could not start, and waits as before."),
        (status = 502, body = FaultBody),
        (status = 503, body = FaultBody),
        (status = 504, body = FaultBody),
        (status = 507, body = FaultBody, description = "There is no room for it.")))]
pub(super) fn actions() {}

/// Its counters, for Prometheus.
#[utoipa::path(get, path = "/vms/{id}/metrics", tag = "the guest's own API", params(("id" = String, Path)), responses(
    (status = 200, content_type = "application/openmetrics-text", body = String),
    (status = 404, body = FaultBody), (status = 409, body = FaultBody)))]
pub(super) fn counters() {}

/// Is refused: a guest of the daemon goes on from a template, which `POST /vms` names.
#[utoipa::path(put, path = "/vms/{id}/snapshot/load", tag = "the guest's own API", params(("id" = String, Path)),
    request_body = Object, responses(
    (status = 404, body = FaultBody), (status = 409, body = FaultBody, description = "Use a template."),
    (status = 413, body = FaultBody)))]
pub(super) fn load_snapshot() {}
