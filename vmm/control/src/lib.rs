//! The control of one guest: what a user configures of it, and asks of it while it runs.
//!
//! ```text
//! api          REST on a socket ──> Control ──> Guest (a machine, or a double in tests)
//! console      the serial port on a terminal or a socket
//! launch_spec  what the host daemon tells the process before it begins
//! mmds         the metadata that the guest can read about itself
//! metrics      counters, as lines of JSON and for Prometheus
//! logging      the log of the process
//! ```
//!
//! [`Control`] refuses a request that the guest's state does not allow; every request takes effect in full or changes
//! nothing.

pub mod api;
pub mod console;
mod control;
pub mod launch_spec;
pub mod logging;
pub mod metrics;
pub mod mmds;

pub use control::*;
