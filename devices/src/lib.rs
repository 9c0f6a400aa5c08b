//! What a guest sees: legacy devices on port I/O, the virtio-mmio transport, and the virtio devices behind it.
//!
//! Every byte that a guest writes, in a register, a ring or a buffer, is hostile: it ends in a device's
//! documented error, never in a panic, an unbounded loop or an access outside guest memory.
//!
//! What a guest causes is logged by [`limited`], since it can cause it as often as it likes.
//!
//! Each device has the same life, see [`lifecycle`], and each kind is one line of the table [`KINDS`].

mod activate_error;
pub mod bus;
pub mod device_list;
mod kinds;
pub mod latency;
pub mod legacy;
pub mod lifecycle;
mod lock;
pub mod log_limit;
pub mod metrics;
pub mod persist;
pub mod rate_limiter;
pub mod service;
pub mod virtio;
pub mod vmclock;
pub mod vmgenid;

pub use kinds::KINDS;
pub use lock::lock;

/// Guest physical memory, as the devices see it.
pub type GuestMemory = vm_memory::GuestMemoryMmap<()>;
