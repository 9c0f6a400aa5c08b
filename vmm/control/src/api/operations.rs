//! Every request that the API knows, in one table: what is served is found here, and the daemon's `OpenAPI` document is held to it.

use hyper::Method;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::Context;
use super::routes::{Answer, Fault, control, parse, tell};
use crate::control::{Control, ControlError};
use config::bodies::{
    Action, ActionType, DriveCommit, DriveCompact, DriveResize, DriveSnapshot, HintingStop, JobEnd,
    JobUpdate, Version, VmState, VmUpdate,
};
use config::{CreateSnapshot, LoadSnapshot};
use config::{DriveConfig, DriveUpdate, HintingStart, PmemConfig, VmConfig};

/// The part of a path that is the name of something.
const ID: &str = "{id}";

/// Does a request: of what, in the path, and with which body.
type Run = fn(&Context, &str, &[u8]) -> Result<Answer, Fault>;

/// A request that the API knows.
pub(super) struct Operation {
    pub(super) method: Method,
    /// With `{id}` for a name.
    pub(super) path: &'static str,
    /// As with Firecracker: a change has a body, but for two.
    pub(super) needs_body: bool,
    pub(super) run: Run,
}

impl Operation {
    const fn get(path: &'static str, run: Run) -> Self {
        Self {
            method: Method::GET,
            path,
            needs_body: false,
            run,
        }
    }

    const fn put(path: &'static str, run: Run) -> Self {
        Self {
            method: Method::PUT,
            path,
            needs_body: true,
            run,
        }
    }

    const fn patch(path: &'static str, run: Run) -> Self {
        Self {
            method: Method::PATCH,
            path,
            needs_body: true,
            run,
        }
    }

    const fn patch_as_is(path: &'static str, run: Run) -> Self {
        Self {
            method: Method::PATCH,
            path,
            needs_body: false,
            run,
        }
    }

    /// The name in a path, empty where it has none; nothing where the path is another one.
    fn id_in<'p>(&self, segments: &[&'p str]) -> Option<&'p str> {
        let mut id = "";
        let mut own = segments_of(self.path);
        for segment in segments {
            match own.next()? {
                ID => id = segment,
                same if same == *segment => {}
                _ => return None,
            }
        }
        own.next().is_none().then_some(id)
    }
}

pub(super) fn segments_of(path: &str) -> impl Iterator<Item = &str> {
    path.trim_start_matches('/').split_terminator('/')
}

/// The operation that a request asks for, and the name in its path.
pub(super) fn find<'p>(
    method: &Method,
    segments: &[&'p str],
) -> Option<(&'static Operation, &'p str)> {
    OPERATIONS
        .iter()
        .filter(|operation| operation.method == *method)
        .find_map(|operation| Some((operation, operation.id_in(segments)?)))
}

/// Method and path of each operation, with `{id}` for a name.
pub fn all() -> impl Iterator<Item = (&'static Method, &'static str)> {
    OPERATIONS.iter().map(|known| (&known.method, known.path))
}

/// Changes something by a body. It is read before the guest is locked.
fn change<T: DeserializeOwned>(
    context: &Context,
    body: &[u8],
    change: impl FnOnce(&mut Control, T) -> Result<(), ControlError>,
) -> Result<Answer, Fault> {
    let asked = parse(body)?;
    change(&mut control(context), asked)?;
    Ok(Answer::Done)
}

/// As [`change`], of something whose name is in the path and in the body.
fn change_named<T: DeserializeOwned>(
    context: &Context,
    (id, body): (&str, &[u8]),
    name: impl FnOnce(&T) -> &str,
    change: impl FnOnce(&mut Control, T) -> Result<(), ControlError>,
) -> Result<Answer, Fault> {
    let asked: T = parse(body)?;
    if name(&asked) != id {
        return Err(Fault::OtherId);
    }
    change(&mut control(context), asked)?;
    Ok(Answer::Done)
}

/// Answers what `ask` says, or refuses as it does.
fn ask<T: Serialize>(
    context: &Context,
    ask: impl FnOnce(&mut Control) -> Result<T, ControlError>,
) -> Result<Answer, Fault> {
    tell(ask(&mut control(context))?)
}

fn act(context: &Context, Action { action_type }: Action) -> Result<(), ControlError> {
    let mut control = control(context);
    match action_type {
        ActionType::InstanceStart => {
            control.start(|config, origin| (context.launch)(config, origin))
        }
        ActionType::SendCtrlAltDel => control.send_ctrl_alt_del(),
        ActionType::FlushMetrics => control.flush_metrics(),
    }
}

static OPERATIONS: [Operation; 45] = [
    Operation::get("/", |context, _, _| tell(control(context).instance_info())),
    Operation::get("/version", |_, _, _| {
        let firecracker_version = env!("CARGO_PKG_VERSION");
        tell(Version {
            firecracker_version,
        })
    }),
    Operation::get("/vm/config", |context, _, _| {
        tell(control(context).config())
    }),
    Operation::get("/vm/sharing", |context, _, _| {
        ask(context, Control::sharing)
    }),
    Operation::get("/vm/sharing/pages/{id}", |context, address, _| {
        let address = address.parse()?;
        ask(context, |control| control.page(address))
    }),
    Operation::get("/vm/sharing/files/{id}", |context, page, _| {
        let page = page.parse()?;
        ask(context, |control| control.pages_of(page))
    }),
    Operation::get("/vm/jail", |context, _, _| tell(control(context).jail())),
    Operation::patch("/vm", |context, _, body| {
        change(context, body, |control, VmUpdate { state }| match state {
            VmState::Paused => control.pause(),
            VmState::Resumed => control.resume(),
        })
    }),
    Operation::put("/actions", |context, _, body| {
        act(context, parse(body)?)?;
        Ok(Answer::Done)
    }),
    Operation::get("/machine-config", |context, _, _| {
        tell(&control(context).config().machine_config)
    }),
    Operation::put("/machine-config", |context, _, body| {
        change(context, body, Control::set_machine_config)
    }),
    Operation::patch("/machine-config", |context, _, body| {
        change(context, body, |control, update| {
            control.update_machine_config(&update)
        })
    }),
    Operation::put("/boot-source", |context, _, body| {
        change(context, body, Control::set_boot_source)
    }),
    Operation::put("/drives/{id}", |context, id, body| {
        change_named(
            context,
            (id, body),
            |drive: &DriveConfig| &drive.drive_id,
            Control::set_drive,
        )
    }),
    Operation::patch("/drives/{id}", |context, id, body| {
        change_named(
            context,
            (id, body),
            |update: &DriveUpdate| &update.drive_id,
            |control, update| control.update_drive(&update),
        )
    }),
    Operation::put("/drives/{id}/snapshot", |context, id, body| {
        change(context, body, |control, DriveSnapshot { path_on_host }| {
            control.snapshot_drive(id, &path_on_host)
        })
    }),
    Operation::put("/pmem/{id}/snapshot", |context, id, body| {
        change(context, body, |control, DriveSnapshot { path_on_host }| {
            control.snapshot_pmem(id, &path_on_host)
        })
    }),
    Operation::get("/drives/{id}/parent", |context, id, _| {
        ask(context, |control| control.drive_parent(id))
    }),
    Operation::put("/drives/{id}/resize", |context, id, body| {
        change(context, body, |control, DriveResize { size }| {
            control.resize_drive(id, size)
        })
    }),
    Operation::put("/drives/{id}/compact", |context, id, body| {
        change(context, body, |control, DriveCompact { find_zeros }| {
            control.compact_drive(id, find_zeros)
        })
    }),
    Operation::put("/drives/{id}/commit", |context, id, body| {
        change(context, body, |control, DriveCommit {}| {
            control.commit_drive(id)
        })
    }),
    Operation::get("/drives/{id}/job", |context, id, _| {
        ask(context, |control| control.job(id))
    }),
    Operation::put("/drives/{id}/job", |context, id, body| {
        change(context, body, |control, JobUpdate { state }| match state {
            JobEnd::Cancelled => control.cancel_job(id),
        })
    }),
    Operation::put("/pmem/{id}", |context, id, body| {
        change_named(
            context,
            (id, body),
            |pmem: &PmemConfig| &pmem.id,
            Control::set_pmem,
        )
    }),
    Operation::put("/entropy", |context, _, body| {
        change(context, body, Control::set_entropy)
    }),
    Operation::put("/vsock", |context, _, body| {
        change(context, body, Control::set_vsock)
    }),
    Operation::get("/mmds", |context, _, _| tell(control(context).mmds().get())),
    Operation::put("/mmds", |context, _, body| {
        change(context, body, Control::set_metadata)
    }),
    Operation::patch("/mmds", |context, _, body| {
        change(context, body, Control::update_metadata)
    }),
    Operation::put("/mmds/config", |context, _, body| {
        change(context, body, Control::set_mmds_config)
    }),
    Operation::put("/sharing", |context, _, body| {
        change(context, body, Control::set_sharing)
    }),
    Operation::put("/serial", |context, _, body| {
        change(context, body, Control::set_serial)
    }),
    Operation::put("/logger", |context, _, body| {
        change(context, body, |control, logger| control.set_logger(&logger))
    }),
    Operation::get("/metrics", |context, _, _| {
        let scrape = control(context).scrape();
        Ok(Answer::Metrics(scrape.encode()?))
    }),
    Operation::put("/metrics", |context, _, body| {
        change(context, body, |control, metrics| {
            control.set_metrics(&metrics)
        })
    }),
    Operation::get("/balloon", |context, _, _| {
        ask(context, |control| control.balloon())
    }),
    Operation::put("/balloon", |context, _, body| {
        change(context, body, Control::set_balloon)
    }),
    Operation::patch("/balloon", |context, _, body| {
        change(context, body, Control::update_balloon)
    }),
    Operation::get("/balloon/statistics", |context, _, _| {
        ask(context, Control::balloon_statistics)
    }),
    Operation::patch("/balloon/statistics", |context, _, body| {
        change(context, body, Control::update_balloon_statistics)
    }),
    Operation::get("/balloon/hinting/status", |context, _, _| {
        ask(context, Control::hinting)
    }),
    Operation::patch_as_is("/balloon/hinting/start", |context, _, body| {
        let start = match body {
            [] => HintingStart::default(),
            body => parse(body)?,
        };
        control(context).start_hinting(start)?;
        Ok(Answer::Done)
    }),
    Operation::patch_as_is("/balloon/hinting/stop", |context, _, body| {
        if !body.is_empty() {
            let HintingStop {} = parse(body)?;
        }
        control(context).stop_hinting()?;
        Ok(Answer::Done)
    }),
    Operation::put("/snapshot/create", |context, _, body| {
        change(context, body, |control, request: CreateSnapshot| {
            control.create_snapshot(&request)
        })
    }),
    Operation::put("/snapshot/load", |context, _, body| {
        change(context, body, |control, request: LoadSnapshot| {
            control.load_snapshot(&request, |config: &VmConfig, origin| {
                (context.launch)(config, origin)
            })
        })
    }),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_found_as_a_whole_and_its_name_with_it() {
        let found = |method: Method, path: &str| {
            let segments: Vec<_> = segments_of(path).collect();
            let (known, id) = find(&method, &segments)?;
            Some((known.path, id.to_owned()))
        };
        let is = |path, id: &str| Some((path, id.to_owned()));
        assert_eq!(found(Method::GET, "/"), is("/", ""));
        assert_eq!(found(Method::GET, ""), is("/", ""));
        assert_eq!(found(Method::PUT, "/drives/a"), is("/drives/{id}", "a"));
        assert_eq!(
            found(Method::GET, "/drives/job/job/"),
            is("/drives/{id}/job", "job")
        );
        for path in ["/drives", "/drives/a/job/b", "/vm/configs", "//x", "/{id}"] {
            assert_eq!(found(Method::PUT, path), None, "{path}");
        }
        assert_eq!(found(Method::DELETE, "/drives/a"), None);
    }

    #[test]
    fn no_operation_hides_another() {
        for (at, known) in OPERATIONS.iter().enumerate() {
            let segments: Vec<_> = segments_of(known.path).collect();
            let (found, _) = find(&known.method, &segments).unwrap();
            assert!(
                std::ptr::eq(found, &raw const OPERATIONS[at]),
                "{}",
                known.path
            );
        }
    }
}
