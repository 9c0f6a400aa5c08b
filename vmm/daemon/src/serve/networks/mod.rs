//! The networks of the daemon's guests (`--network`).
//!
//! ```text
//! plan     what a guest's interfaces get: addresses, MAC, lease   ──> vm.json ──> (all else)
//! host     taps and rules: made when a guest's process begins, taken away at its end; all of it when a daemon begins
//! upkeep   names of allow-lists looked up, and rules put back that others took away
//! status   what is shown
//! state    what a daemon keeps of them; lock    one daemon of a network namespace has networks
//! ```
//!
//! Nothing on the host is made of a guest that is not in the guest's record before, and an address is another guest's
//! only when the record of the first is gone. So what a daemon that was killed has left is put right by the next one,
//! from the records alone. No byte that a guest sends is read here.

mod error;
mod host;
mod lock;
mod plan;
mod state;
mod status;
mod upkeep;

pub use error::NetworksError;
pub use plan::Others;
pub use state::{GuestNetworks, NetworkPolicy};
pub use status::NetworkStatus;
