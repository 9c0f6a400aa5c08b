//! The host's side of guests' networks.
//!
//! ```text
//!   guest ── virtio-net ── the guest's process ══ descriptor ══ tap cop-0a010002 ─┐   a /32 route and a permanent
//!   guest ── virtio-net ── the guest's process ══ descriptor ══ tap cop-0a010003 ─┤   neighbour for each
//!                                                                                 │
//!                                            the host's IP, one table inet coppice ── outside
//! ```
//!
//! A [`Network`] is a range of addresses and what its guests may reach. An [`Attachment`] is a guest's interface in it;
//! its addresses are those that an [`AddressPool`] gave. [`HostNetworks`] makes the host as both say: a tap for each
//! guest, no bridge and no namespace. It knows nothing of guests' processes: the caller hands the tap's descriptor on.
//!
//! **Who is believed.** Nobody: the rules know taps by the beginning of their names, and drop what comes from or goes
//! to a tap whose addresses they do not hold. A guest sends with its own MAC and IP address only. ARP, VLAN tags and
//! other protocols than IP end at the tap, as the host has no part in them there; ARP, DHCP and neighbour discovery are
//! answered by the guest's own process. No code here reads a byte that a guest sent.
//!
//! **Clones.** A clone has the addresses of its template for itself (inner), and others for everybody else (outer). The
//! rules translate statelessly, before connections are tracked and after they are translated, so that clones are as
//! separate there as any guests.
//!
//! **Crashes.** A tap goes with its last descriptor, and takes routes and neighbours along. Rules, the gateways'
//! addresses and the networks' routes stay, and [`HostNetworks::rebuild`] puts them right.

mod attachment;
mod egress;
mod host;
mod links;
mod mac;
mod netlink;
mod nft;
mod pool;
mod resolvers;
mod rules;
mod spec;
mod sysctl;
mod tap;

pub use attachment::{Addresses, Attachment, TapName};
pub use egress::{Destination, DomainName, Egress, EgressError, public_addresses};
pub use host::{HostError, HostNetworks, remove_all};
pub use links::Counters;
pub use mac::{address_in, gateway_mac, mac_of};
pub use netlink::NetlinkError;
pub use nft::NftError;
pub use pool::{AddressPool, PoolError};
pub use resolvers::{ResolversError, of_the_host as resolvers_of_the_host};
pub use spec::{
    Access, DEFAULT_MTU, GATEWAY6, MAX_ALLOW, MAX_NETWORKS, METADATA, Network, Networks, Outside,
    SpecError,
};
pub use sysctl::SysctlError;
pub use tap::{HEADER_SIZE, TUN_DEVICE, TapError};

#[cfg(test)]
mod tests;
