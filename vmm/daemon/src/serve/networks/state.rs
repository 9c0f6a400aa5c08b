//! What a daemon keeps of its networks.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::AtomicU64;

use network::{AddressPool, HostNetworks, Networks};
use parking_lot::Mutex;

use super::lock::NetworksLock;

/// The networks that a daemon was asked for.
#[derive(Clone, Debug, Default)]
pub struct NetworkPolicy {
    /// All of them.
    pub networks: Networks,
    /// Whether they are taken away when the daemon ends.
    pub remove: bool,
}

/// The networks of a daemon.
pub struct GuestNetworks {
    pub(super) networks: Networks,
    /// By name; locked after the registry of guests.
    pub(super) pools: Mutex<BTreeMap<String, AddressPool>>,
    /// What the host has of them; nothing where there are none. It is locked while the host is changed, and by threads
    /// that may wait alone.
    pub(super) host: Option<Mutex<HostNetworks>>,
    /// The names in allow-lists that have no address.
    pub(super) unresolved: Mutex<Vec<String>>,
    /// How often the rules were put back.
    pub(super) repairs: AtomicU64,
    /// The file in the state folder that says that the host has something of this daemon's networks.
    pub(super) mark: PathBuf,
    /// No other daemon of this network namespace has networks as long as it is there.
    pub(super) lock: Option<NetworksLock>,
}
