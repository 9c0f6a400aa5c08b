//! The operations of a guest's REST API, in one table. The guest's process dispatches by it, the daemon passes requests
//! on and records changes by it, and a test compares the `OpenAPI` document with it.

use DiskEffect::{Changes, Child, Merge};
use OperationKind as Kind;

/// The part of a path that stands for an id.
const NAME: &str = "{id}";

/// Methods of requests (RFC 9110, 9.3, and RFC 5789). No operation has another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RequestMethod {
    /// `GET`: nothing changes.
    Get,
    /// `PUT`.
    Put,
    /// `PATCH`.
    Patch,
}

impl RequestMethod {
    /// The name of the method in HTTP.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Get => "GET",
            Self::Put => "PUT",
            Self::Patch => "PATCH",
        }
    }
}

/// Whether a request has a body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RequestBody {
    /// It has none.
    None,
    /// It has one.
    Required,
    /// It may have one.
    Optional,
}

/// What an operation does to the disks of a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskEffect {
    /// No effect.
    None,
    /// The operation names another file for a disk, or changes the present one.
    Changes,
    /// The guest gets a new file as its disk, a child of the one that it has.
    Child,
    /// The disk is merged into its parent.
    Merge,
}

/// The resource of the host that has to be admitted before an operation is done on a guest that has not started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reservation {
    /// No effect.
    None,
    /// RAM and vCPUs.
    Memory,
    /// A context identifier (CID) that no other guest has.
    Cid,
}

/// The kinds of operations of a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the table below says of each what it is")]
pub enum OperationKind {
    InstanceInfo,
    Version,
    Config,
    Sharing,
    SharedPage,
    PagesOfFile,
    Jail,
    UpdateState,
    Act,
    MachineConfig,
    SetMachineConfig,
    UpdateMachineConfig,
    SetBootSource,
    SetDrive,
    UpdateDrive,
    SnapshotDrive,
    SnapshotPmem,
    DriveParent,
    ResizeDrive,
    CompactDrive,
    CommitDrive,
    DriveJob,
    UpdateDriveJob,
    SetPmem,
    SetEntropy,
    SetVsock,
    Metadata,
    SetMetadata,
    UpdateMetadata,
    SetMmdsConfig,
    SetSharing,
    SetSerial,
    SetLogger,
    Metrics,
    SetMetrics,
    Balloon,
    SetBalloon,
    UpdateBalloon,
    BalloonStatistics,
    UpdateBalloonStatistics,
    HintingStatus,
    StartHinting,
    StopHinting,
    CreateSnapshot,
    LoadSnapshot,
}

/// An operation of a guest's API.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestOperation {
    /// The kind of the operation.
    pub kind: OperationKind,
    /// The method of the request.
    pub method: RequestMethod,
    /// The path, with `{id}` for an id.
    pub path: &'static str,
    /// Whether the request has a body. As with Firecracker, every change has one, with two exceptions.
    pub body: RequestBody,
    /// Whether it changes the guest's configuration or metadata, so that the change is kept over restarts of the
    /// process.
    pub is_kept: bool,
    /// The effect on the guest's disks.
    pub disk: DiskEffect,
    /// The resource that is admitted first.
    pub reservation: Reservation,
}

const fn operation(
    kind: OperationKind,
    method: RequestMethod,
    path: &'static str,
) -> GuestOperation {
    let body = match method {
        RequestMethod::Get => RequestBody::None,
        RequestMethod::Put | RequestMethod::Patch => RequestBody::Required,
    };
    GuestOperation {
        kind,
        method,
        path,
        body,
        is_kept: false,
        disk: DiskEffect::None,
        reservation: Reservation::None,
    }
}

const fn get(kind: OperationKind, path: &'static str) -> GuestOperation {
    operation(kind, RequestMethod::Get, path)
}

const fn put(kind: OperationKind, path: &'static str) -> GuestOperation {
    operation(kind, RequestMethod::Put, path)
}

const fn patch(kind: OperationKind, path: &'static str) -> GuestOperation {
    operation(kind, RequestMethod::Patch, path)
}

impl GuestOperation {
    const fn kept(mut self) -> Self {
        self.is_kept = true;
        self
    }

    const fn disk(mut self, disk: DiskEffect) -> Self {
        self.disk = disk;
        self
    }

    const fn reserves(mut self, reservation: Reservation) -> Self {
        self.reservation = reservation;
        self
    }

    const fn body_optional(mut self) -> Self {
        self.body = RequestBody::Optional;
        self
    }

    /// The operation of a request, and the id in its path, empty where it has none. `None` where there is no such
    /// operation.
    pub fn find<'p>(method: &str, path: &'p str) -> Option<(&'static Self, &'p str)> {
        GUEST_OPERATIONS
            .iter()
            .filter(|operation| operation.method.as_str() == method)
            .find_map(|operation| Some((operation, operation.name_in(path)?)))
    }

    /// Whether it changes something.
    pub fn changes(&self) -> bool {
        self.method != RequestMethod::Get
    }

    fn name_in<'p>(&self, path: &'p str) -> Option<&'p str> {
        let mut name = "";
        let mut own = segments_of(self.path);
        for segment in segments_of(path) {
            match own.next()? {
                NAME => name = segment,
                same if same == segment => {}
                _ => return None,
            }
        }
        own.next().is_none().then_some(name)
    }
}

/// The segments of a path between its slashes.
pub fn segments_of(path: &str) -> impl Iterator<Item = &str> {
    path.trim_start_matches('/').split_terminator('/')
}

/// All operations. No two have the same method and path.
pub static GUEST_OPERATIONS: [GuestOperation; 45] = [
    get(Kind::InstanceInfo, "/"),
    get(Kind::Version, "/version"),
    get(Kind::Config, "/vm/config"),
    get(Kind::Sharing, "/vm/sharing"),
    get(Kind::SharedPage, "/vm/sharing/pages/{id}"),
    get(Kind::PagesOfFile, "/vm/sharing/files/{id}"),
    get(Kind::Jail, "/vm/jail"),
    patch(Kind::UpdateState, "/vm"),
    put(Kind::Act, "/actions"),
    get(Kind::MachineConfig, "/machine-config"),
    put(Kind::SetMachineConfig, "/machine-config")
        .kept()
        .reserves(Reservation::Memory),
    patch(Kind::UpdateMachineConfig, "/machine-config")
        .kept()
        .reserves(Reservation::Memory),
    put(Kind::SetBootSource, "/boot-source").kept(),
    put(Kind::SetDrive, "/drives/{id}").kept().disk(Changes),
    patch(Kind::UpdateDrive, "/drives/{id}")
        .kept()
        .disk(Changes),
    put(Kind::SnapshotDrive, "/drives/{id}/snapshot").disk(Child),
    put(Kind::SnapshotPmem, "/pmem/{id}/snapshot").disk(Child),
    get(Kind::DriveParent, "/drives/{id}/parent"),
    put(Kind::ResizeDrive, "/drives/{id}/resize").disk(Changes),
    put(Kind::CompactDrive, "/drives/{id}/compact").disk(Changes),
    put(Kind::CommitDrive, "/drives/{id}/commit").disk(Merge),
    get(Kind::DriveJob, "/drives/{id}/job"),
    put(Kind::UpdateDriveJob, "/drives/{id}/job").disk(Changes),
    put(Kind::SetPmem, "/pmem/{id}").kept().disk(Changes),
    put(Kind::SetEntropy, "/entropy").kept(),
    put(Kind::SetVsock, "/vsock")
        .kept()
        .reserves(Reservation::Cid),
    get(Kind::Metadata, "/mmds"),
    put(Kind::SetMetadata, "/mmds").kept(),
    patch(Kind::UpdateMetadata, "/mmds").kept(),
    put(Kind::SetMmdsConfig, "/mmds/config").kept(),
    put(Kind::SetSharing, "/sharing").kept(),
    put(Kind::SetSerial, "/serial").kept(),
    put(Kind::SetLogger, "/logger").kept(),
    get(Kind::Metrics, "/metrics"),
    put(Kind::SetMetrics, "/metrics").kept(),
    get(Kind::Balloon, "/balloon"),
    put(Kind::SetBalloon, "/balloon").kept(),
    patch(Kind::UpdateBalloon, "/balloon").kept(),
    get(Kind::BalloonStatistics, "/balloon/statistics"),
    patch(Kind::UpdateBalloonStatistics, "/balloon/statistics").kept(),
    get(Kind::HintingStatus, "/balloon/hinting/status"),
    patch(Kind::StartHinting, "/balloon/hinting/start").body_optional(),
    patch(Kind::StopHinting, "/balloon/hinting/stop").body_optional(),
    put(Kind::CreateSnapshot, "/snapshot/create"),
    put(Kind::LoadSnapshot, "/snapshot/load"),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_found_as_a_whole_and_its_name_with_it() {
        let found = |method: &str, path: &str| {
            let (known, id) = GuestOperation::find(method, path)?;
            Some((known.path, id.to_owned()))
        };
        let is = |path, id: &str| Some((path, id.to_owned()));
        assert_eq!(found("GET", "/"), is("/", ""));
        assert_eq!(found("GET", ""), is("/", ""));
        assert_eq!(found("PUT", "/drives/a"), is("/drives/{id}", "a"));
        assert_eq!(
            found("GET", "/drives/job/job/"),
            is("/drives/{id}/job", "job")
        );
        for path in ["/drives", "/drives/a/job/b", "/vm/configs", "//x", "/{id}"] {
            assert_eq!(found("PUT", path), None, "{path}");
        }
        assert_eq!(found("DELETE", "/drives/a"), None);
    }

    #[test]
    fn no_operation_hides_another() {
        for known in &GUEST_OPERATIONS {
            let (found, _) = GuestOperation::find(known.method.as_str(), known.path).unwrap();
            assert_eq!(found.kind, known.kind, "{}", known.path);
        }
    }

    #[test]
    fn what_changes_nothing_has_no_effect_and_no_body() {
        for known in GUEST_OPERATIONS.iter().filter(|known| !known.changes()) {
            assert!(
                !known.is_kept && known.disk == DiskEffect::None,
                "{}",
                known.path
            );
            assert_eq!(
                (known.body, known.reservation),
                (RequestBody::None, Reservation::None)
            );
        }
    }

    #[test]
    fn what_configures_a_guest_is_kept_and_what_it_is_to_do_is_not() {
        let is_kept = |place: &str| {
            let changes = ["PUT", "PATCH"].into_iter();
            let mut found = changes.filter_map(|method| GuestOperation::find(method, place));
            found.any(|(operation, _)| operation.is_kept)
        };
        for place in ["drives/a", "balloon/statistics", "mmds", "mmds/config"] {
            assert!(is_kept(place), "{place}");
        }
        for place in ["drives/a/commit", "balloon/hinting/start", "vm", "actions"] {
            assert!(!is_kept(place), "{place}");
        }
    }
}
