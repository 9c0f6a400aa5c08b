//! What a guest sees: legacy devices on port I/O, the virtio-mmio transport, and the virtio devices behind it.
//!
//! Every byte that a guest writes, in a register, a ring or a buffer, is hostile: it ends in a device's
//! documented error, never in a panic, an unbounded loop or an access outside guest memory.
//!
//! Each device can be saved and made again, see [`persist`].

pub mod bus;
pub mod legacy;
pub mod persist;
pub mod virtio;
pub mod vmgenid;

/// Guest physical memory, as the devices see it.
pub type GuestMemory = vm_memory::GuestMemoryMmap<()>;
