//! The status of a guest, as the REST API shows it.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::time::{SystemTime, UNIX_EPOCH};

use network::{Addresses, Attachment, Counters};
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

/// What has passed the tap of a guest since its process began, as the guest sees it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, ToSchema)]
pub struct NetworkCounters {
    /// Bytes of frames that the guest received.
    pub received_bytes: u64,
    /// Frames that the guest received.
    pub received_packets: u64,
    /// Frames that were lost as the guest did not take them in time.
    pub received_dropped: u64,
    /// Bytes of frames that the guest sent.
    pub sent_bytes: u64,
    /// Frames that the guest sent.
    pub sent_packets: u64,
}

impl From<Counters> for NetworkCounters {
    fn from(counters: Counters) -> Self {
        Self {
            received_bytes: counters.received_bytes,
            received_packets: counters.received_packets,
            received_dropped: counters.received_dropped,
            sent_bytes: counters.sent_bytes,
            sent_packets: counters.sent_packets,
        }
    }
}

/// An interface of a guest in a network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct InterfaceStatus {
    /// Its name.
    pub iface_id: String,
    /// Its network.
    pub network: String,
    /// The Ethernet address that the guest has.
    pub guest_mac: String,
    /// The IPv4 address by which others reach the guest.
    pub ipv4: String,
    /// The IPv6 network by which they do: the guest takes its addresses of it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ipv6: Option<String>,
    /// The IPv4 address that the guest has for itself, where that is another one: a clone has its template's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub inner_ipv4: Option<String>,
    /// The IPv6 network that the guest has for itself, where that is another one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub inner_ipv6: Option<String>,
    /// Its tap on the host, which is there as long as the guest has a process.
    pub tap: String,
    /// Ports of the host that lead to the guest.
    pub publish: Vec<String>,
    /// What has passed its tap, where it has one: of a guest that is asked for alone, and with `?stats`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub counters: Option<NetworkCounters>,
    /// The same address, for those who look for its tap.
    #[serde(skip)]
    pub address: Ipv4Addr,
}

impl InterfaceStatus {
    /// The status of an interface.
    pub fn new(iface_id: &str, attachment: &Attachment) -> Self {
        let Attachment { outer, inner, .. } = attachment;
        let v6 = |addresses: &Addresses| addresses.v6.map(|v6| v6.to_string());
        Self {
            iface_id: iface_id.to_owned(),
            network: attachment.network.clone(),
            guest_mac: attachment.mac.to_string(),
            ipv4: outer.v4.to_string(),
            ipv6: v6(outer),
            inner_ipv4: (inner.v4 != outer.v4).then(|| inner.v4.to_string()),
            inner_ipv6: v6(inner).filter(|_| inner.v6 != outer.v6),
            tap: attachment.tap().to_string(),
            publish: attachment
                .published
                .iter()
                .map(ToString::to_string)
                .collect(),
            counters: None,
            address: outer.v4,
        }
    }
}

impl NetworkCounters {
    /// The sums of both.
    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        Self {
            received_bytes: self.received_bytes.saturating_add(other.received_bytes),
            received_packets: self.received_packets.saturating_add(other.received_packets),
            received_dropped: self.received_dropped.saturating_add(other.received_dropped),
            sent_bytes: self.sent_bytes.saturating_add(other.sent_bytes),
            sent_packets: self.sent_packets.saturating_add(other.sent_packets),
        }
    }
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
    /// Its interfaces in networks of the daemon.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub networks: Vec<InterfaceStatus>,
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
