//! What carries out each operation of [`config::operations`].

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::context::Context;
use super::response::{Content, Fault, parse, to_json};
use crate::control::{Control, ControlError};
use config::bodies::{
    Action, ActionType, DriveCommit, DriveCompact, DriveResize, DriveSnapshot, HintingStop, JobEnd,
    JobUpdate, Version, VmState, VmUpdate,
};
use config::operations::OperationKind as Kind;
use config::{CreateSnapshot, LoadSnapshot};
use config::{DriveConfig, DriveUpdate, HintingStart, PmemConfig, VmConfig};

/// Carries out a request: of what, in the path, and with which body.
type Handler = fn(&Context, &str, &[u8]) -> Result<Content, Fault>;

/// Changes something by a body. It is read before the guest is locked.
fn change<T: DeserializeOwned>(
    context: &Context,
    body: &[u8],
    change: impl FnOnce(&mut Control, T) -> Result<(), ControlError>,
) -> Result<Content, Fault> {
    let asked = parse(body)?;
    change(&mut context.control(), asked)?;
    Ok(Content::Empty)
}

/// As [`change`], of something whose name is in the path and in the body.
fn change_named<T: DeserializeOwned>(
    context: &Context,
    (id, body): (&str, &[u8]),
    name: impl FnOnce(&T) -> &str,
    change: impl FnOnce(&mut Control, T) -> Result<(), ControlError>,
) -> Result<Content, Fault> {
    let asked: T = parse(body)?;
    if name(&asked) != id {
        return Err(Fault::OtherId);
    }
    change(&mut context.control(), asked)?;
    Ok(Content::Empty)
}

/// Answers what `ask` says, or refuses as it does.
fn ask<T: Serialize>(
    context: &Context,
    ask: impl FnOnce(&mut Control) -> Result<T, ControlError>,
) -> Result<Content, Fault> {
    to_json(ask(&mut context.control())?)
}

fn act(context: &Context, Action { action_type }: Action) -> Result<(), ControlError> {
    let mut control = context.control();
    match action_type {
        ActionType::InstanceStart => {
            control.start(|config, origin| (context.launch)(config, origin))
        }
        ActionType::SendCtrlAltDel => control.send_ctrl_alt_del(),
        ActionType::FlushMetrics => control.flush_metrics(),
    }
}

/// Carries out what is asked of a guest.
pub(super) fn carry_out(
    kind: Kind,
    context: &Context,
    id: &str,
    body: &[u8],
) -> Result<Content, Fault> {
    let handler = HANDLERS.iter().find(|(handled, _)| *handled == kind);
    // A test holds that each operation has one.
    let (_, handler) = handler.ok_or(Fault::NoHandler(kind))?;
    handler(context, id, body)
}

static HANDLERS: [(Kind, Handler); 45] = [
    (Kind::InstanceInfo, |context, _, _| {
        to_json(context.control().instance_info())
    }),
    (Kind::Version, |_, _, _| {
        let firecracker_version = env!("CARGO_PKG_VERSION");
        to_json(Version {
            firecracker_version,
        })
    }),
    (Kind::Config, |context, _, _| {
        to_json(context.control().config())
    }),
    (Kind::Sharing, |context, _, _| {
        ask(context, Control::sharing)
    }),
    (Kind::SharedPage, |context, address, _| {
        let address = address.parse()?;
        ask(context, |control| control.page(address))
    }),
    (Kind::PagesOfFile, |context, page, _| {
        let page = page.parse()?;
        ask(context, |control| control.pages_of(page))
    }),
    (Kind::Jail, |context, _, _| {
        to_json(context.control().jail())
    }),
    (Kind::UpdateState, |context, _, body| {
        change(context, body, |control, VmUpdate { state }| match state {
            VmState::Paused => control.pause(),
            VmState::Resumed => control.resume(),
        })
    }),
    (Kind::Act, |context, _, body| {
        act(context, parse(body)?)?;
        Ok(Content::Empty)
    }),
    (Kind::MachineConfig, |context, _, _| {
        to_json(&context.control().config().machine_config)
    }),
    (Kind::SetMachineConfig, |context, _, body| {
        change(context, body, Control::set_machine_config)
    }),
    (Kind::UpdateMachineConfig, |context, _, body| {
        change(context, body, |control, update| {
            control.update_machine_config(&update)
        })
    }),
    (Kind::SetBootSource, |context, _, body| {
        change(context, body, Control::set_boot_source)
    }),
    (Kind::SetDrive, |context, id, body| {
        change_named(
            context,
            (id, body),
            |drive: &DriveConfig| &drive.drive_id,
            Control::set_drive,
        )
    }),
    (Kind::UpdateDrive, |context, id, body| {
        change_named(
            context,
            (id, body),
            |update: &DriveUpdate| &update.drive_id,
            |control, update| control.update_drive(&update),
        )
    }),
    (Kind::SnapshotDrive, |context, id, body| {
        change(context, body, |control, DriveSnapshot { path_on_host }| {
            control.snapshot_drive(id, &path_on_host)
        })
    }),
    (Kind::SnapshotPmem, |context, id, body| {
        change(context, body, |control, DriveSnapshot { path_on_host }| {
            control.snapshot_pmem(id, &path_on_host)
        })
    }),
    (Kind::DriveParent, |context, id, _| {
        ask(context, |control| control.drive_parent(id))
    }),
    (Kind::ResizeDrive, |context, id, body| {
        change(context, body, |control, DriveResize { size }| {
            control.resize_drive(id, size)
        })
    }),
    (Kind::CompactDrive, |context, id, body| {
        change(context, body, |control, DriveCompact { find_zeros }| {
            control.compact_drive(id, find_zeros)
        })
    }),
    (Kind::CommitDrive, |context, id, body| {
        change(context, body, |control, DriveCommit {}| {
            control.commit_drive(id)
        })
    }),
    (Kind::DriveJob, |context, id, _| {
        ask(context, |control| control.job(id))
    }),
    (Kind::UpdateDriveJob, |context, id, body| {
        change(context, body, |control, JobUpdate { state }| match state {
            JobEnd::Cancelled => control.cancel_job(id),
        })
    }),
    (Kind::SetPmem, |context, id, body| {
        change_named(
            context,
            (id, body),
            |pmem: &PmemConfig| &pmem.id,
            Control::set_pmem,
        )
    }),
    (Kind::SetEntropy, |context, _, body| {
        change(context, body, Control::set_entropy)
    }),
    (Kind::SetVsock, |context, _, body| {
        change(context, body, Control::set_vsock)
    }),
    (Kind::Metadata, |context, _, _| {
        to_json(context.control().mmds().get())
    }),
    (Kind::SetMetadata, |context, _, body| {
        change(context, body, Control::set_metadata)
    }),
    (Kind::UpdateMetadata, |context, _, body| {
        change(context, body, Control::update_metadata)
    }),
    (Kind::SetMmdsConfig, |context, _, body| {
        change(context, body, Control::set_mmds_config)
    }),
    (Kind::SetSharing, |context, _, body| {
        change(context, body, Control::set_sharing)
    }),
    (Kind::SetSerial, |context, _, body| {
        change(context, body, Control::set_serial)
    }),
    (Kind::SetLogger, |context, _, body| {
        change(context, body, |control, logger| control.set_logger(&logger))
    }),
    (Kind::Metrics, |context, _, _| {
        let scrape = context.control().scrape();
        Ok(Content::Metrics(scrape.encode()?))
    }),
    (Kind::SetMetrics, |context, _, body| {
        change(context, body, |control, metrics| {
            control.set_metrics(&metrics)
        })
    }),
    (Kind::Balloon, |context, _, _| {
        ask(context, |control| control.balloon())
    }),
    (Kind::SetBalloon, |context, _, body| {
        change(context, body, Control::set_balloon)
    }),
    (Kind::UpdateBalloon, |context, _, body| {
        change(context, body, Control::update_balloon)
    }),
    (Kind::BalloonStatistics, |context, _, _| {
        ask(context, Control::balloon_statistics)
    }),
    (Kind::UpdateBalloonStatistics, |context, _, body| {
        change(context, body, Control::update_balloon_statistics)
    }),
    (Kind::HintingStatus, |context, _, _| {
        ask(context, Control::hinting)
    }),
    (Kind::StartHinting, |context, _, body| {
        let start = match body {
            [] => HintingStart::default(),
            body => parse(body)?,
        };
        context.control().start_hinting(start)?;
        Ok(Content::Empty)
    }),
    (Kind::StopHinting, |context, _, body| {
        if !body.is_empty() {
            let HintingStop {} = parse(body)?;
        }
        context.control().stop_hinting()?;
        Ok(Content::Empty)
    }),
    (Kind::CreateSnapshot, |context, _, body| {
        change(context, body, |control, request: CreateSnapshot| {
            control.create_snapshot(&request)
        })
    }),
    (Kind::LoadSnapshot, |context, _, body| {
        change(context, body, |control, request: LoadSnapshot| {
            control.load_snapshot(&request, |config: &VmConfig, origin| {
                (context.launch)(config, origin)
            })
        })
    }),
];

#[cfg(test)]
mod tests {
    use config::operations::GUEST_OPERATIONS;

    use super::*;

    #[test]
    fn each_operation_has_one_handler() {
        for operation in &GUEST_OPERATIONS {
            let handlers = HANDLERS.iter().filter(|(kind, _)| *kind == operation.kind);
            assert_eq!(handlers.count(), 1, "{}", operation.path);
        }
        assert_eq!(HANDLERS.len(), GUEST_OPERATIONS.len());
    }
}
