//! A virtio-mmio device, as ACPI tables or the command line describe it to a kernel.

/// Registers and interrupt of a virtio-mmio device.
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
    /// The parameter that describes the device to a kernel without ACPI (Linux, `virtio_mmio.device=`).
    pub fn cmdline(&self) -> String {
        format!(
            "virtio_mmio.device={:#x}@{:#x}:{}",
            self.size, self.base, self.gsi
        )
    }
}
