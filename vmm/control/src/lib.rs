//! The control of one guest: what a user tells it and asks of it while it is there.
//!
//! ```text
//! api          REST on a socket ──> Control ──> Guest (a machine, or a double in tests)
//! console      the serial port on a terminal or a socket
//! launch_spec  what the host daemon tells the process before it begins
//! mmds         what the guest is told of itself
//! metrics      counters, as lines of JSON and for Prometheus
//! logging      what the process itself says
//! ```
//!
//! [`Control`] refuses what comes in the wrong state; every request takes effect in full or changes nothing.

pub mod api;
pub mod console;
mod control;
pub mod launch_spec;
pub mod logging;
pub mod metrics;
pub mod mmds;

pub use control::*;
