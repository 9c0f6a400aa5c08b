//! Why a guest cannot be in a network.

use network::PoolError;

use config::{MacAddress, Published};

/// Why an interface cannot be in a network.
#[derive(Debug, thiserror::Error)]
pub enum NetworkFault {
    /// There is no such network.
    #[error(
        "network-interfaces.network: there is no network {0:.80?}: the networks are those of `coppice serve --network`"
    )]
    NoNetwork(String),
    /// Its range has no address left.
    #[error("network-interfaces.network: {network}")]
    Full {
        /// The network.
        network: String,
        /// Why.
        source: PoolError,
    },
    /// Another guest has the Ethernet address.
    #[error("network-interfaces.guest_mac: guest {vm} has {mac}: leave it out, and one is made up")]
    MacTaken {
        /// The address.
        mac: MacAddress,
        /// The guest.
        vm: String,
    },
    /// The port of the host leads to another guest.
    #[error("network-interfaces.publish: the port {port} of the host leads to guest {vm} already")]
    PortTaken {
        /// The port.
        port: Published,
        /// The guest.
        vm: String,
    },
    /// An IPv6 address of the host for a guest without one.
    #[error("network-interfaces.publish: {port} is of IPv6, which network {network} has not")]
    NoIpv6 {
        /// The port.
        port: Published,
        /// The network.
        network: String,
    },
    /// Longer packets than those of the network.
    #[error("network-interfaces.mtu: {mtu} is more than the {most} bytes of network {network}")]
    Mtu {
        /// What was asked for.
        mtu: u16,
        /// The network's.
        most: u16,
        /// The network.
        network: String,
    },
    /// A lease of the operator's.
    #[error(
        "network-interfaces.lease: interface {0} is in a network, where the daemon gives the lease: leave it out"
    )]
    OwnLease(String),
    /// More taps than a process can be given.
    #[error("network-interfaces: a guest has {0} interfaces in networks at most")]
    TooMany(usize),
    /// The guest was made when the network was another one, or while the daemon had none.
    #[error(
        "interface {interface}: network {network} is none of this daemon's, or has other addresses than when the guest was made: start the daemon with the --network that it had, or make the guest anew"
    )]
    Elsewhere {
        /// The interface.
        interface: String,
        /// The network.
        network: String,
    },
}
