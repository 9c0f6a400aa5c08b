//! What a kernel is told of a virtio-mmio device.

/// A virtio-mmio device, as the kernel is told of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MmioDevice {
    /// First guest physical address of its registers.
    pub base: u32,
    /// Bytes of its registers.
    pub size: u32,
    /// Its interrupt.
    pub gsi: u32,
}

impl MmioDevice {
    /// The device for the command line of a kernel without ACPI (Linux, `virtio_mmio.device=`).
    pub fn cmdline(&self) -> String {
        format!(
            "virtio_mmio.device={:#x}@{:#x}:{}",
            self.size, self.base, self.gsi
        )
    }
}
