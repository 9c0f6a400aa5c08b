//! The code that runs when a kernel resets by jumping to the BIOS. A guest has no BIOS, so the code at the reset vector
//! requests the reset.
//!
//! With hardware-reduced ACPI and no `reboot=` on its command line, Linux tries EFI and then the BIOS, whose entry
//! point after a reset is `f000:fff0` (Intel SDM volume 3, 10.1.4; Linux, arch/x86/kernel/reboot.c). Without code there
//! the guest would hang.

use devices::GuestMemory;
use devices::legacy::RESET_VALUE;
use vm_memory::{Bytes, GuestAddress};

use super::BootError;
use crate::layout::{ACPI_PM_PORT, RESET_VECTOR};

/// Port of the ACPI reset register.
const RESET_PORT: [u8; 2] = (ACPI_PM_PORT + 2).to_le_bytes();

/// Real-mode code: `mov al, RESET_VALUE; mov dx, RESET_PORT; out dx, al`, then `hlt` in a loop.
const CODE: [u8; 9] = [
    0xb0,
    RESET_VALUE,
    0xba,
    RESET_PORT[0],
    RESET_PORT[1],
    0xee,
    0xf4,
    0xeb,
    0xfd,
];

/// Writes the code.
pub(super) fn write(memory: &GuestMemory) -> Result<(), BootError> {
    memory
        .write_slice(&CODE, GuestAddress(RESET_VECTOR))
        .map_err(BootError::memory("reset vector"))
}
