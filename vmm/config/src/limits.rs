//! Limits of a guest. The layout of a guest's memory has room for so much, and no more.

/// The most vCPUs.
pub const MAX_VCPUS: u8 = 32;
/// The most virtio devices. Each has an interrupt line of its own, and the IOAPIC has no more free ones.
pub const MAX_VIRTIO_DEVICES: usize = 18;
/// Room for the kernel command line with its terminating zero, in bytes.
pub const CMDLINE_MAX: u64 = 0x1_0000;
/// Longest body of a REST request in bytes, which is Firecracker's.
pub const MAX_BODY: usize = 51200;
/// The default kernel command line.
pub const DEFAULT_CMDLINE: &str = "console=ttyS0 reboot=k panic=-1";

/// Longest configuration file, in bytes.
pub const MAX_FILE_SIZE: u64 = 1 << 20;
