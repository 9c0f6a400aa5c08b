//! Why a daemon cannot have its networks.

use std::io;

use network::{HostError, ResolversError, SpecError};

/// Why the daemon cannot have its networks.
#[derive(Debug, thiserror::Error)]
pub enum NetworksError {
    /// Another daemon has networks.
    #[error("another daemon of this host has networks: there is one table of rules for all")]
    InUse,
    /// The lock of the networks.
    #[error("the lock of the networks")]
    Lock(#[source] io::Error),
    /// The DNS servers of the host.
    #[error("network {network}")]
    Resolvers {
        /// The network.
        network: String,
        /// Why there are none.
        source: ResolversError,
    },
    /// The servers of names cannot be those of a network.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// The host.
    #[error(transparent)]
    Host(#[from] HostError),
    /// The state folder.
    #[error("the state folder")]
    Store(#[source] io::Error),
}
