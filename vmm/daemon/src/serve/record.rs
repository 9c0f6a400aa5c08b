//! What the daemon keeps of a guest on disk: the records in the guest's folder, and the types that they are made of.
//!
//! This module is below all others of the daemon. It has data and no behaviour: `store` reads and writes the files, and
//! the modules that own a part of a record change it.
//!
//! A field that was added later has `#[serde(default)]`, so that a record of an older daemon can still be read.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use utoipa::ToSchema;

use config::bodies::Metadata;
use config::{DeviceId, DriveFormat, LeaseConfig, Published, VmConfig};
use host::exit::EndReport;
use jail::CgroupConfig;
use network::Attachment;

/// A guest that is to be made: the body of `POST /vms`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VmSpec {
    /// Its name: 1 to 63 lower case letters, digits and dashes. One is made up where absent.
    #[serde(default)]
    #[schema(pattern = "^[a-z0-9-]{1,63}$")]
    pub id: Option<String>,
    /// The guest, as `coppice run --config` takes it (Firecracker's configuration file). Paths are absolute, or
    /// `image:NAME`.
    #[serde(default)]
    #[schema(value_type = Option<VmConfig>)]
    pub config: Option<Value>,
    /// The template that it is a clone of, instead of `config`.
    #[serde(default)]
    pub template: Option<String>,
    /// Ports of the host that lead to the clone, by interface, as `publish` of a network interface has them. Another
    /// guest has them in `config`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schema(value_type = BTreeMap<String, Vec<String>>)]
    pub publish: BTreeMap<String, Vec<Published>>,
    /// What the guest is told of itself over its vsock device, beside what the daemon tells it: `{"coppice": {"id",
    /// "hostname", "cid", "generation"}}`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Metadata>)]
    pub metadata: Option<Map<String, Value>>,
    /// Whether it starts at once.
    #[serde(default = "yes")]
    pub start: bool,
    /// Whether it is started again when it has failed.
    #[serde(default)]
    pub restart: RestartPolicy,
    /// Words to find it by.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
}

const fn yes() -> bool {
    true
}

/// Whether a guest that has run is started again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum RestartPolicy {
    /// It stays as it ended.
    #[default]
    Never,
    /// When it has reset itself, panicked, crashed, or was killed: after 1 s, then 2 s, and so on; not again after five
    /// failures that came within a minute of the start each.
    OnFailure,
    /// Whenever it has ended and nobody has stopped it, in the same way: also when it has powered off, and when the
    /// host was shut down, or the daemon told to stop its guests, by the next daemon.
    Always,
}

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
    /// Its record on the daemon's disk cannot be read. It keeps its name, its process and what it has of the host, and
    /// can be stopped and deleted, and nothing else.
    Unreadable,
}

impl State {
    /// All of them.
    pub const ALL: [Self; 10] = [
        Self::Creating,
        Self::Starting,
        Self::NotStarted,
        Self::Running,
        Self::Paused,
        Self::Stopped,
        Self::Failed,
        Self::Restarting,
        Self::Deleting,
        Self::Unreadable,
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
            Self::Unreadable => "unreadable",
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

/// How far the creation or the deletion of a guest has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Its creation has begun.
    Creating,
    /// It was made completely.
    Present,
    /// Its deletion has begun.
    Deleting,
}

/// What the jail of a guest takes of the host, from its making to its deletion.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct JailResources {
    /// The user and group of the process; the daemon's where absent.
    #[serde(default)]
    pub uid: Option<u32>,
    /// Its control group, below the root of the hierarchy.
    #[serde(default)]
    pub cgroup: Option<PathBuf>,
}

impl JailResources {
    /// Its control group, if it has one, without the limits.
    pub fn cgroup(&self) -> Option<CgroupConfig> {
        let name = self.cgroup.clone()?;
        Some(CgroupConfig {
            name,
            ..CgroupConfig::default()
        })
    }
}

/// The configuration that the operator has given a guest over the guest's own API after it was made, and that outlives
/// the guest's process.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct LaterConfig {
    /// In place of the configuration that it was made with. Images have their names here, too.
    #[serde(default)]
    pub config: Option<Box<VmConfig>>,
    /// In place of the metadata that it was made with, without the daemon's own part.
    #[serde(default)]
    pub metadata: Option<Map<String, Value>>,
}

impl LaterConfig {
    /// The socket of the vsock device, from the guest's folder.
    pub fn socket(&self) -> Option<&Path> {
        let vsock = self.config.as_ref()?.vsock.as_ref()?;
        vsock.uds_path.as_deref()
    }

    /// The configuration, as it is shown.
    pub fn shown(&self) -> Option<Value> {
        serde_json::to_value(self.config.as_ref()?).ok()
    }
}

/// The operations that have begun on a guest and are not complete; see `pending`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pending {
    /// The template that is being made of it.
    #[serde(default)]
    pub template: Option<PendingTemplate>,
    /// Disks that are being made as children of its own, by drive. There were no such files before.
    #[serde(default)]
    pub children: BTreeMap<DeviceId, PathBuf>,
    /// Disks that are being committed, by drive.
    #[serde(default)]
    pub commits: BTreeMap<DeviceId, PendingCommit>,
    /// The process that the guest was configured in is being replaced by the one that it runs in.
    #[serde(default)]
    pub start: bool,
}

/// A template that is being made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PendingTemplate {
    /// Its name.
    pub id: String,
    /// Whether the guest ran before, and so is to be resumed.
    pub resume: bool,
}

/// A disk that is being merged into its parent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PendingCommit {
    /// The file that the drive had when that began.
    pub top: PathBuf,
    /// The file of the parent, where it has one.
    #[serde(default)]
    pub base: Option<PathBuf>,
}

/// The format that a file had when it became the disk of a drive or pmem device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FoundFormat {
    /// The file.
    pub path: PathBuf,
    /// Its format.
    pub format: DriveFormat,
}

/// An interface of a guest in a network of the daemon: what the host has to know of it, and what the guest is told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestInterface {
    /// Its addresses.
    pub attachment: Attachment,
    /// What the guest is told of them, but for servers and its name, which are those of its next start.
    pub lease: LeaseConfig,
}

/// The interfaces of a guest that are in networks, by name.
pub type Interfaces = BTreeMap<String, GuestInterface>;

/// `vm.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Record {
    /// What was asked for; with its id.
    pub spec: VmSpec,
    /// The user who asked.
    pub uid: u32,
    /// When it was made, in ms since 1970.
    pub created_ms: u64,
    /// How far its creation or deletion has come.
    pub phase: Phase,
    /// Its state when this was written.
    pub state: State,
    /// What its jail takes of the host.
    #[serde(default)]
    pub jail: Option<JailResources>,
    /// Images that it uses.
    #[serde(default)]
    pub images: Vec<String>,
    /// Whether it still is the guest that was loaded from its template, and has not booted since.
    #[serde(default)]
    pub loaded: bool,
    /// The identifier of its vsock device, if it has one.
    #[serde(default)]
    pub cid: Option<u32>,
    /// Its interfaces in networks, by name.
    #[serde(default, skip_serializing_if = "Interfaces::is_empty")]
    pub interfaces: Interfaces,
    /// Disks that have taken the place of those that it was made with, by drive.
    #[serde(default)]
    pub disks: BTreeMap<DeviceId, PathBuf>,
    /// Disks that were in this place before, and may be the parents of others.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub former_disks: BTreeSet<PathBuf>,
    /// The formats of those of its disks of which nobody has named one.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub formats: BTreeMap<DeviceId, FoundFormat>,
    /// What it was configured to over its own API.
    #[serde(default, rename = "told")]
    pub later: LaterConfig,
    /// The operations on it that are not complete.
    #[serde(default)]
    pub pending: Pending,
    /// How often it was started again.
    #[serde(default)]
    pub restarts: u32,
    /// Of those, how often without having run for long.
    #[serde(default)]
    pub failures: u32,
    /// How it ended the last time.
    #[serde(default)]
    pub end: Option<Ended>,
}

impl Record {
    /// What is known of a guest whose record cannot be read.
    pub fn unreadable(id: &str) -> Self {
        Self {
            spec: VmSpec {
                id: Some(id.to_owned()),
                config: None,
                template: None,
                publish: BTreeMap::new(),
                metadata: None,
                start: false,
                restart: RestartPolicy::Never,
                labels: BTreeMap::new(),
            },
            uid: 0,
            created_ms: 0,
            phase: Phase::Present,
            state: State::Unreadable,
            jail: None,
            images: Vec::new(),
            loaded: false,
            cid: None,
            interfaces: Interfaces::new(),
            disks: BTreeMap::new(),
            former_disks: BTreeSet::new(),
            formats: BTreeMap::new(),
            later: LaterConfig::default(),
            pending: Pending::default(),
            restarts: 0,
            failures: 0,
            end: None,
        }
    }
}

/// `pid.json`. A process number is used again, so it names one process for good only together with the start and the
/// boot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PidFile {
    /// Its number.
    pub pid: u32,
    /// When it started, in µs since boot.
    pub start_us: u64,
    /// The boot of the host.
    pub boot_id: String,
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_record_of_a_guest_has_the_names_that_earlier_daemons_gave_its_fields() {
        let written = json!({
            "spec": {"id": "g", "config": null, "template": null, "start": false, "restart": "always", "labels": {}},
            "uid": 7, "created_ms": 1, "phase": "present", "state": "not_started",
            "jail": {"uid": 9, "cgroup": "guests/g"}, "images": ["debian"], "loaded": true, "cid": 3,
            "disks": {"root": "/d/child.vhdx"},
            "told": {"config": null, "metadata": {"role": "web"}},
            "pending": {
                "template": {"id": "t", "resume": true}, "children": {"root": "/d/next.vhdx"},
                "commits": {"data": {"top": "/d/top", "base": "/d/base"}}, "start": true,
            },
            "restarts": 2, "failures": 1,
            "end": {"kind": "power_off", "text": "the guest powered off", "code": 0, "time_ms": 5},
        });
        let record: Record = serde_json::from_value(written.clone()).unwrap();
        assert!(record.later.metadata.is_some() && record.pending.template.is_some());
        assert_eq!(serde_json::to_value(&record).unwrap(), written);
        let oldest = json!({"spec": {"id": "g"}, "uid": 7, "created_ms": 1, "phase": "present", "state": "running"});
        let oldest: Record = serde_json::from_value(oldest).unwrap();
        assert_eq!(oldest.later, LaterConfig::default());
    }
}
