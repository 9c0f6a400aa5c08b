//! A guest: its VM and devices, the disks that are mapped into its memory, what of its memory it shares, and its
//! snapshots.
//!
//! ```text
//!            ┌─ pmem       disks in guest memory
//! machine ───┼─ reference  which image of a booted kernel fits a guest
//!            ├─ snapshot   state and memory, to files and back
//!            └─ fault      the end of a guest of which a mapped page is lost
//! ```
//!
//! [`Machine`] builds the guest and owns its threads: one for each vCPU, and one for each pmem device that the guest
//! has flushed. All devices are served by the event loop that they are added to.

mod disk;
pub mod fault;
mod machine;
pub mod pmem;
pub mod reference;
pub mod snapshot;

pub use machine::*;
