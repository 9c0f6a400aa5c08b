//! A guest: its VM and devices, the disks that are mapped into its memory, what of its memory it shares, and its
//! snapshots.
//!
//! ```text
//!            ┌─ pmem       disks in guest memory
//! machine ───┼─ reference  which image of a booted kernel fits a guest
//!            ├─ snapshot   state and memory, to files and back
//!            └─ bus_error  the end of a guest that has lost a mapped page
//! ```
//!
//! [`Machine`] builds the guest and owns its threads: one for each vCPU, and one for each pmem device that the guest
//! has flushed. All devices are served by the event loop that they are added to.

pub mod bus_error;
mod disk;
mod machine;
pub mod pmem;
pub mod reference;
pub mod snapshot;
mod station;

pub use machine::*;
