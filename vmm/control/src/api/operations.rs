//! The operations of a guest's REST API, in one table: the guest's process dispatches by it, the daemon passes requests
//! on by it and records what is kept, and the `OpenAPI` document is made of it.

use std::marker::PhantomData;

use super::context::Context;
use super::handler::{
    AddsDevice, Answers, AnswersFields, AnswersMetrics, Handler, MayTake, Takes, TakesFields,
};
use super::keep::{Keep, Sets, SetsFields, SetsMetadata, SetsNamed};
use super::operation::{DiskEffect, GuestOperation, LifeEffect, RequestMethod, Reservation};
use super::response::Fault;
use crate::control::{updated_drive, updated_interface, updated_pmem};
use config::bodies::{
    Action, ActionType, DriveCommit, DriveCompact, DriveResize, DriveSnapshot, HintingStop, JobEnd,
    JobUpdate, MachineUpdate, Metadata, Version, VmState, VmUpdate,
};
use config::{
    BalloonConfig, BalloonStatisticsUpdate, BalloonUpdate, BootSourceConfig, ConfiguredDevice,
    CpuConfig, DriveConfig, DriveUpdate, EntropyConfig, LoadSnapshot, LoggerConfig, MachineConfig,
    MetricsConfig, MmdsConfig, NetworkInterfaceConfig, NetworkInterfaceUpdate, PmemConfig,
    PmemUpdate, SerialConfig, SharingConfig, VmConfig, VsockConfig,
};

const fn get(
    path: &'static str,
    summary: &'static str,
    handler: &'static dyn Handler,
) -> GuestOperation {
    GuestOperation::new(RequestMethod::Get, path, summary, handler)
}

const fn put(
    path: &'static str,
    summary: &'static str,
    handler: &'static dyn Handler,
) -> GuestOperation {
    GuestOperation::new(RequestMethod::Put, path, summary, handler)
}

const fn patch(
    path: &'static str,
    summary: &'static str,
    handler: &'static dyn Handler,
) -> GuestOperation {
    GuestOperation::new(RequestMethod::Patch, path, summary, handler)
}

/// An operation that makes of the guest's process what it makes of settings.
const fn setting<S: Handler + Keep>(
    method: RequestMethod,
    path: &'static str,
    summary: &'static str,
    both: &'static S,
) -> GuestOperation {
    GuestOperation::new(method, path, summary, both).kept(both)
}

fn act(context: &Context, action: ActionType) -> Result<(), Fault> {
    let mut control = context.control();
    match action {
        ActionType::InstanceStart => {
            control.start(|config, origin| (context.launch)(config, origin))?;
        }
        ActionType::SendCtrlAltDel => control.send_ctrl_alt_del()?,
        ActionType::FlushMetrics => control.flush_metrics()?,
    }
    Ok(())
}

fn set_state(context: &Context, state: VmState) -> Result<(), Fault> {
    let mut control = context.control();
    match state {
        VmState::Paused => control.pause()?,
        VmState::Resumed => control.resume()?,
    }
    Ok(())
}

fn load(context: &Context, request: &LoadSnapshot) -> Result<(), Fault> {
    let launch = |config: &VmConfig, origin| (context.launch)(config, origin);
    Ok(context.control().load_snapshot(request, launch)?)
}

fn update_drive(context: &Context, name: &str, update: &DriveUpdate) -> Result<(), Fault> {
    if update.drive_id != name {
        return Err(Fault::OtherId);
    }
    Ok(context.control().update_drive(update)?)
}

fn update_pmem(context: &Context, name: &str, update: PmemUpdate) -> Result<(), Fault> {
    if update.id != name {
        return Err(Fault::OtherId);
    }
    Ok(context.control().update_pmem(update)?)
}

/// Gives a drive of the configuration another file, or other limits.
fn keep_drive(config: &mut VmConfig, name: &str, update: DriveUpdate) -> Result<(), Fault> {
    if update.drive_id != name {
        return Err(Fault::OtherId);
    }
    updated_drive(config, update)?.store(config);
    Ok(())
}

/// Gives a network interface of the configuration other limits.
#[allow(
    clippy::needless_pass_by_value,
    reason = "the shape of a change of settings"
)]
fn limit_interface(
    config: &mut VmConfig,
    name: &str,
    update: NetworkInterfaceUpdate,
) -> Result<(), Fault> {
    if update.iface_id != name {
        return Err(Fault::OtherId);
    }
    updated_interface(config, &update)?.store(config);
    Ok(())
}

/// Gives a pmem device of the configuration other limits.
fn keep_pmem(config: &mut VmConfig, name: &str, update: PmemUpdate) -> Result<(), Fault> {
    if update.id != name {
        return Err(Fault::OtherId);
    }
    updated_pmem(config, update)?.store(config);
    Ok(())
}

/// All operations. No path of one is that of another with the same method.
pub static GUEST_OPERATIONS: [GuestOperation; 49] = [
    get(
        "/",
        "The guest's state.",
        &Answers(|context, _| Ok(context.control().instance_info())),
    ),
    get(
        "/version",
        "The version of its VMM.",
        &Answers(|_, _| {
            let firecracker_version = env!("CARGO_PKG_VERSION");
            Ok(Version {
                firecracker_version,
            })
        }),
    ),
    get(
        "/vm/config",
        "All that is configured.",
        &Answers(|context, _| Ok(context.control().config().clone())),
    ),
    get(
        "/vm/sharing",
        "What of its memory is shared.",
        &Answers(|context, _| Ok(context.control().sharing()?)),
    ),
    get(
        "/vm/sharing/pages/{address}",
        "What backs the page of a guest physical address, in decimal or, behind 0x, in \
         hexadecimal.",
        &Answers(|context, address| Ok(context.control().page(address.parse()?)?)),
    ),
    get(
        "/vm/sharing/files/{page}",
        "The guest's pages that a page of a file backs, or may come to back: \
         DEVICE-INODE-OFFSET, in decimal.",
        &Answers(|context, page| Ok(context.control().pages_of(page.parse()?)?)),
    ),
    get(
        "/vm/jail",
        "The layers of its jail, and those that are missing.",
        &Answers(|context, _| Ok(context.control().jail().clone())),
    ),
    patch(
        "/vm",
        "Has its vCPUs stand still, or go on.",
        &Takes(|context, _, VmUpdate { state }| set_state(context, state)),
    )
    .life(LifeEffect::ChangesState),
    put(
        "/actions",
        "Has it start, or write its counters, or presses Ctrl-Alt-Del. A guest that waited \
         starts in a new process, with all that was configured.",
        &Takes(|context, _, Action { action_type }| act(context, action_type)),
    )
    .life(LifeEffect::CanStart),
    get(
        "/machine-config",
        "Memory and vCPUs.",
        &Answers(|context, _| Ok(context.control().config().machine_config.clone())),
    ),
    setting(
        RequestMethod::Put,
        "/machine-config",
        "Sets memory and vCPUs, before the start.",
        &Sets(|config, machine: MachineConfig| {
            config.set_machine(machine);
            Ok(())
        }),
    )
    .reserves(Reservation::Memory),
    setting(
        RequestMethod::Patch,
        "/machine-config",
        "Changes memory or vCPUs, before the start.",
        &SetsFields::<MachineUpdate>(VmConfig::update_machine, PhantomData),
    )
    .reserves(Reservation::Memory),
    setting(
        RequestMethod::Put,
        "/cpu-config",
        "Sets what the guest's CPU has otherwise than the host's, before the start. What the \
         host's KVM does not have of it is refused at the start.",
        &Sets(|config, template: CpuConfig| {
            config.set_cpu(template);
            Ok(())
        }),
    ),
    put(
        "/boot-source",
        "Sets the kernel, before the start.",
        &Takes(|context, _, body| Ok(context.control().set_boot_source(body)?)),
    )
    .kept(&Sets(|config, source: BootSourceConfig| {
        config.boot_source = Some(source);
        Ok(())
    })),
    setting(
        RequestMethod::Put,
        "/drives/{drive}",
        "Adds or replaces a drive, before the start.",
        &AddsDevice::<DriveConfig>(PhantomData),
    )
    .disk(DiskEffect::Changes),
    patch(
        "/drives/{drive}",
        "Gives a drive another file or other limits, after the start, and whenever the guest \
         starts again. A bucket of the limits that is left out stays as it is, and one of size 0 \
         is no limit.",
        &Takes(|context, name, update: DriveUpdate| update_drive(context, name, &update)),
    )
    .kept(&SetsNamed(keep_drive))
    .disk(DiskEffect::MayReplace),
    put(
        "/drives/{drive}/snapshot",
        "Has the disk of a drive go on in a new file. The old one stays as it is.",
        &Takes(|context, name, DriveSnapshot { path_on_host }| {
            Ok(context.control().snapshot_drive(name, &path_on_host)?)
        }),
    )
    .disk(DiskEffect::DriveChild),
    put(
        "/pmem/{pmem}/snapshot",
        "Has the disk of a pmem device go on in a new file. The old one stays as it is.",
        &Takes(|context, name, DriveSnapshot { path_on_host }| {
            Ok(context.control().snapshot_pmem(name, &path_on_host)?)
        }),
    )
    .disk(DiskEffect::PmemChild),
    get(
        "/drives/{drive}/parent",
        "What the disk of a drive stands on.",
        &Answers(|context, name| Ok(context.control().drive_parent(name)?)),
    ),
    put(
        "/drives/{drive}/resize",
        "Makes the disk of a drive larger, and tells the guest.",
        &Takes(|context, name, DriveResize { size }| {
            Ok(context.control().resize_drive(name, size)?)
        }),
    )
    .disk(DiskEffect::Changes),
    put(
        "/drives/{drive}/compact",
        "Starts a job that moves the blocks of a disk down and cuts its file.",
        &Takes(|context, name, DriveCompact { find_zeros }| {
            Ok(context.control().compact_drive(name, find_zeros)?)
        }),
    )
    .disk(DiskEffect::Changes),
    put(
        "/drives/{drive}/commit",
        "Starts a job that merges a disk into its parent while the guest goes on.",
        &Takes(|context, name, DriveCommit {}| Ok(context.control().commit_drive(name)?)),
    )
    .disk(DiskEffect::Merge),
    get(
        "/drives/{drive}/job",
        "The last job of a drive.",
        &Answers(|context, name| Ok(context.control().job(name)?)),
    ),
    put(
        "/drives/{drive}/job",
        "Stops the job of a drive.",
        &Takes(|context, name, JobUpdate { state }| match state {
            JobEnd::Cancelled => Ok(context.control().cancel_job(name)?),
        }),
    )
    .disk(DiskEffect::Changes),
    setting(
        RequestMethod::Put,
        "/pmem/{pmem}",
        "Adds or replaces a disk as memory, before the start.",
        &AddsDevice::<PmemConfig>(PhantomData),
    )
    .disk(DiskEffect::Changes),
    patch(
        "/pmem/{pmem}",
        "Gives a pmem device other limits, after the start, and whenever the guest starts again. \
         A bucket that is left out stays as it is, and one of size 0 is no limit.",
        &Takes(|context, name, update: PmemUpdate| update_pmem(context, name, update)),
    )
    .kept(&SetsNamed(keep_pmem)),
    setting(
        RequestMethod::Put,
        "/network-interfaces/{interface}",
        "Adds or replaces a network interface, before the start.",
        &AddsDevice::<NetworkInterfaceConfig>(PhantomData),
    )
    .reserves(Reservation::Network),
    patch(
        "/network-interfaces/{interface}",
        "Changes the rate limits of a network interface, after the start, and whenever the guest \
         starts again.",
        &Takes(|context, name, update: NetworkInterfaceUpdate| {
            if update.iface_id != name {
                return Err(Fault::OtherId);
            }
            Ok(context.control().update_interface(&update)?)
        }),
    )
    .kept(&SetsNamed(limit_interface)),
    setting(
        RequestMethod::Put,
        "/entropy",
        "Adds the entropy device, before the start.",
        &AddsDevice::<EntropyConfig>(PhantomData),
    ),
    setting(
        RequestMethod::Put,
        "/vsock",
        "Adds the socket device, before the start. What is left out is the guest's own: a \
         socket in its folder, and an identifier that no other guest has.",
        &AddsDevice::<VsockConfig>(PhantomData),
    )
    .reserves(Reservation::Cid),
    get(
        "/mmds",
        "What the guest is told of itself.",
        &AnswersFields::<Metadata>(|context| Ok(context.control().mmds().get()), PhantomData),
    ),
    put(
        "/mmds",
        "Sets what the guest is told of itself.",
        &TakesFields::<Metadata>(
            |context, data| Ok(context.control().set_metadata(data)?),
            PhantomData,
        ),
    )
    .kept(&SetsMetadata(|store, metadata| Ok(store.put(metadata)?))),
    patch(
        "/mmds",
        "Changes what the guest is told of itself: a JSON merge patch (RFC 7396).",
        &TakesFields::<Metadata>(
            |context, data| Ok(context.control().update_metadata(data)?),
            PhantomData,
        ),
    )
    .kept(&SetsMetadata(|store, patch| Ok(store.patch(patch)?))),
    setting(
        RequestMethod::Put,
        "/mmds/config",
        "Sets where the guest finds its metadata, before the start.",
        &Sets(|config, mmds: MmdsConfig| {
            config.mmds_config = Some(mmds);
            Ok(())
        }),
    ),
    setting(
        RequestMethod::Put,
        "/sharing",
        "Sets what is shared, before the start.",
        &Sets(|config, sharing: SharingConfig| {
            config.sharing = sharing;
            Ok(())
        }),
    ),
    setting(
        RequestMethod::Put,
        "/serial",
        "Sets where the serial console writes, and how much, before the start.",
        &Sets(|config, serial: SerialConfig| {
            config.serial = Some(serial);
            Ok(())
        }),
    ),
    put(
        "/logger",
        "Sets where the log goes and what is in it, before the start.",
        &Takes(|context, _, body| Ok(context.control().set_logger(&body)?)),
    )
    .kept(&Sets(|config, logger: LoggerConfig| {
        config.logger = Some(logger);
        Ok(())
    })),
    get("/metrics", "Its counters, for Prometheus.", &AnswersMetrics),
    put(
        "/metrics",
        "Sets where lines of counters go, before the start.",
        &Takes(|context, _, body| Ok(context.control().set_metrics(&body)?)),
    )
    .kept(&Sets(|config, metrics: MetricsConfig| {
        config.metrics = Some(metrics);
        Ok(())
    })),
    get(
        "/balloon",
        "The balloon.",
        &Answers(|context, _| Ok(context.control().balloon()?)),
    ),
    setting(
        RequestMethod::Put,
        "/balloon",
        "Adds the balloon, before the start.",
        &AddsDevice::<BalloonConfig>(PhantomData),
    ),
    patch(
        "/balloon",
        "Changes the amount of the balloon.",
        &Takes(|context, _, body| Ok(context.control().update_balloon(body)?)),
    )
    .kept(&Sets(|config, update: BalloonUpdate| {
        if let Some(balloon) = &mut config.balloon {
            balloon.amount_mib = update.amount_mib;
        }
        Ok(())
    })),
    get(
        "/balloon/statistics",
        "What the guest says of its memory, by name.",
        &Answers(|context, _| Ok(context.control().balloon_statistics()?)),
    ),
    patch(
        "/balloon/statistics",
        "Asks for the guest's statistics more or less often.",
        &Takes(|context, _, body| Ok(context.control().update_balloon_statistics(body)?)),
    )
    .kept(&Sets(|config, update: BalloonStatisticsUpdate| {
        if let Some(balloon) = &mut config.balloon {
            balloon.stats_polling_interval_s = update.stats_polling_interval_s;
        }
        Ok(())
    })),
    get(
        "/balloon/hinting/status",
        "How far the guest is with telling of its free memory.",
        &Answers(|context, _| Ok(context.control().hinting()?)),
    ),
    patch(
        "/balloon/hinting/start",
        "Has the guest tell of its free memory.",
        &MayTake(|context, start| Ok(context.control().start_hinting(start)?)),
    ),
    patch(
        "/balloon/hinting/stop",
        "Ends the guest's telling of its free memory.",
        &MayTake(|context, HintingStop {}| Ok(context.control().stop_hinting()?)),
    ),
    put(
        "/snapshot/create",
        "Saves the guest, which has to be paused, to files.",
        &Takes(|context, _, body| Ok(context.control().create_snapshot(&body)?)),
    ),
    put(
        "/snapshot/load",
        "Has the guest go on from a snapshot, before the start. The daemon refuses it: its \
         guests go on from templates, which `POST /vms` names.",
        &Takes(|context, _, request: LoadSnapshot| load(context, &request)),
    )
    .life(LifeEffect::Loads),
];

/// The operation that a request asks for, and the name in its path, empty where it has none. `None` where there is no
/// such operation.
pub fn find_operation<'p>(
    method: &str,
    path: &'p str,
) -> Option<(&'static GuestOperation, &'p str)> {
    GUEST_OPERATIONS
        .iter()
        .filter(|operation| operation.method.as_str() == method)
        .find_map(|operation| Some((operation, operation.name_in(path)?)))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn a_path_is_found_as_a_whole_and_its_name_with_it() {
        let found = |method: &str, path: &str| {
            let (known, id) = find_operation(method, path)?;
            Some((known.path, id.to_owned()))
        };
        let is = |path, id: &str| Some((path, id.to_owned()));
        assert_eq!(found("GET", "/"), is("/", ""));
        assert_eq!(found("GET", ""), is("/", ""));
        assert_eq!(found("PUT", "/drives/a"), is("/drives/{drive}", "a"));
        assert_eq!(
            found("GET", "/drives/job/job/"),
            is("/drives/{drive}/job", "job")
        );
        for path in ["/drives", "/drives/a/job/b", "/vm/configs", "//x", "/{id}"] {
            assert_eq!(found("PUT", path), None, "{path}");
        }
        assert_eq!(found("DELETE", "/drives/a"), None);
    }

    #[test]
    fn no_operation_hides_another() {
        for known in &GUEST_OPERATIONS {
            let (found, _) = find_operation(known.method.as_str(), known.path).unwrap();
            assert!(std::ptr::eq(found, known), "{}", known.path);
        }
    }

    #[test]
    fn what_changes_nothing_has_no_effect_and_no_body() {
        for known in GUEST_OPERATIONS.iter().filter(|known| !known.changes()) {
            assert!(
                !known.is_kept() && known.disk == DiskEffect::None,
                "{}",
                known.path
            );
            assert!(known.body().is_none(), "{}", known.path);
            assert_eq!(known.reservation, Reservation::None);
        }
    }

    #[test]
    fn a_change_has_a_body_and_all_but_two_need_it() {
        let changes = GUEST_OPERATIONS.iter().filter(|known| known.changes());
        let optional: BTreeSet<_> = changes
            .filter(|known| !known.body().unwrap().is_required)
            .map(|known| known.path)
            .collect();
        let expected = ["/balloon/hinting/start", "/balloon/hinting/stop"];
        assert_eq!(optional, expected.into());
    }

    #[test]
    fn what_configures_a_guest_is_kept_and_what_it_is_to_do_is_not() {
        let is_kept = |place: &str| {
            let changes = ["PUT", "PATCH"].into_iter();
            let mut found = changes.filter_map(|method| find_operation(method, place));
            found.any(|(operation, _)| operation.is_kept())
        };
        for place in ["drives/a", "balloon/statistics", "mmds", "mmds/config"] {
            assert!(is_kept(place), "{place}");
        }
        for place in ["drives/a/commit", "balloon/hinting/start", "vm", "actions"] {
            assert!(!is_kept(place), "{place}");
        }
    }
}
