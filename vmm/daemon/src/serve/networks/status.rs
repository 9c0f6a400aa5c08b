//! What is shown of networks.

use std::sync::atomic::Ordering;

use network::{Access, AddressPool, Destination, Network, Outside};
use serde::Serialize;
use utoipa::ToSchema;

use super::state::GuestNetworks;
use crate::serve::status::{InterfaceStatus, NetworkCounters, VmStatus};

/// A guest in a network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct NetworkGuest {
    /// The guest.
    pub vm: String,
    /// Its interface.
    #[serde(flatten)]
    pub interface: InterfaceStatus,
}

/// A network of the daemon.
#[allow(
    clippy::struct_excessive_bools,
    reason = "each is an option of the network by itself"
)]
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct NetworkStatus {
    /// Its name.
    pub name: String,
    /// Its IPv4 addresses.
    pub range: String,
    /// The address of the gateway, which is the host's.
    pub gateway: String,
    /// The prefix of its IPv6 addresses.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prefix: Option<String>,
    /// Whether no packet leaves the host, but answers by a published port.
    pub isolated: bool,
    /// Whether guests reach each other.
    pub peers: bool,
    /// Whether guests reach the addresses of the host.
    pub host: bool,
    /// Whether guests reach the addresses at which a cloud tells of the host.
    pub metadata: bool,
    /// The only destinations outside; all where empty.
    pub allow: Vec<String>,
    /// Names of these that have no address at present.
    pub unresolved: Vec<String>,
    /// The servers of names that guests are told.
    pub dns: Vec<String>,
    /// The longest packet in bytes.
    pub mtu: u16,
    /// IPv4 addresses that guests have.
    pub addresses_used: u64,
    /// IPv4 addresses that are left for guests.
    pub addresses_free: u64,
    /// What has passed the taps of the guests that have a process, in all.
    pub counters: NetworkCounters,
    /// Its guests.
    pub guests: Vec<NetworkGuest>,
}

impl GuestNetworks {
    /// How often the rules were put back.
    pub fn repairs(&self) -> u64 {
        self.repairs.load(Ordering::Relaxed)
    }

    /// The status of all networks, whose guests `vms` are.
    pub fn all(&self, vms: &[VmStatus]) -> Vec<NetworkStatus> {
        let networks = self.networks.iter();
        networks.map(|network| self.status(network, vms)).collect()
    }

    fn status(&self, network: &Network, vms: &[VmStatus]) -> NetworkStatus {
        let all = AddressPool::new(network.range).available();
        let pool = self
            .pools
            .lock()
            .get(&network.name)
            .map(AddressPool::available);
        let free = pool.unwrap_or(all);
        let of = |vm: &VmStatus| {
            let own = vm.networks.iter().filter(|own| own.network == network.name);
            let guest = |interface: &InterfaceStatus| NetworkGuest {
                vm: vm.id.clone(),
                interface: interface.clone(),
            };
            own.map(guest).collect::<Vec<_>>()
        };
        let guests = vms.iter().flat_map(of).collect();
        let unresolved = self.unresolved.lock().clone();
        NetworkStatus::new(
            network,
            (all.saturating_sub(free), free),
            unresolved,
            guests,
        )
    }
}

impl NetworkStatus {
    /// The status of a network with so many addresses in use and free. `unresolved` are names of all networks.
    pub fn new(
        network: &Network,
        (addresses_used, addresses_free): (u64, u64),
        mut unresolved: Vec<String>,
        guests: Vec<NetworkGuest>,
    ) -> Self {
        unresolved.retain(|name| {
            network.allow.iter().any(|entry| match &entry.destination {
                Destination::Name(own) => own.as_str() == name,
                Destination::Range(_) => false,
            })
        });
        let counted = guests.iter().filter_map(|guest| guest.interface.counters);
        let is_allowed = |access| access == Access::Allow;
        Self {
            name: network.name.clone(),
            range: network.range.to_string(),
            gateway: network.gateway().to_string(),
            prefix: network.prefix.map(|prefix| prefix.to_string()),
            isolated: network.outside == Outside::Isolated,
            peers: is_allowed(network.peers),
            host: is_allowed(network.host),
            metadata: is_allowed(network.metadata),
            allow: network.allow.iter().map(ToString::to_string).collect(),
            unresolved,
            dns: network.dns.iter().map(ToString::to_string).collect(),
            mtu: network.mtu,
            addresses_used,
            addresses_free,
            counters: counted.fold(NetworkCounters::default(), NetworkCounters::plus),
            guests,
        }
    }
}
