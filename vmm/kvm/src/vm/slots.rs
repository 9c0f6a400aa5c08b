//! Memory of a guest that is not its RAM: windows, each a memory slot of its own, above all RAM.
//!
//! Such memory is no part of `GuestMemory`, so no device reads or writes it for the guest: a descriptor with such an
//! address is refused.

use std::io;
use std::sync::Arc;

use devices::GuestMemory;
use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::{Cap, VmFd};
use memshare::Window;
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};

use super::error::VmError;
use crate::layout::{MMIO_HOLE_END, WINDOW_ALIGNMENT};

/// What a guest may do with a window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WindowAccess {
    /// Read. Its writes go to the MMIO bus (`KVM_MEM_READONLY`).
    Read,
    /// Read and write.
    Write,
    /// Read and write, and KVM logs which pages it has written (`KVM_MEM_LOG_DIRTY_PAGES`).
    LoggedWrite,
}

/// A window in a guest's addresses.
#[derive(Debug)]
pub struct PlacedWindow {
    /// Where it begins, guest physical.
    pub address: u64,
    /// The log of the pages that the guest has written, where they are logged.
    pub log: Option<DirtyLog>,
}

/// Which pages of a slot the guest has written.
pub struct DirtyLog {
    vm: Arc<VmFd>,
    slot: u32,
    len: u64,
}

impl std::fmt::Debug for DirtyLog {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DirtyLog")
            .field("slot", &self.slot)
            .field("len", &self.len)
            .finish_non_exhaustive()
    }
}

impl DirtyLog {
    /// Returns the pages written since the last call, as a bitmap from the first page on, and clears the log. A page
    /// that is written during the call may be returned by this call or the next; one that was written before is
    /// returned by this call.
    ///
    /// # Errors
    /// KVM's error.
    pub fn take(&self) -> io::Result<Vec<u64>> {
        // A slot is no longer than an address space, so that its length is a `usize`.
        Ok(self.vm.get_dirty_log(self.slot, self.len as usize)?)
    }
}

/// The windows that are placed above RAM.
#[derive(Default)]
pub(super) struct Windows {
    /// The windows, which must stay mapped while a vCPU can run, because KVM's slots map them.
    pub(super) mapped: Vec<Arc<Window>>,
    /// Where the last one ends.
    end: u64,
}

/// The address of a window of `len` bytes that comes after `end`; `None` where the guest has no such addresses.
fn place(end: u64, len: u64, physical_bits: u32) -> Option<u64> {
    let address = end.checked_next_multiple_of(WINDOW_ALIGNMENT)?;
    let limit = 1u64.checked_shl(physical_bits).unwrap_or(u64::MAX);
    (address.checked_add(len)? <= limit).then_some(address)
}

fn end_of_ram(memory: &GuestMemory) -> u64 {
    let ends = memory
        .iter()
        .map(|region| region.start_addr().raw_value() + region.len());
    ends.max().unwrap_or_default().max(MMIO_HOLE_END)
}

impl Windows {
    /// Places a window among the addresses, of `physical_bits` bits, of the guest with `memory`, after RAM and the
    /// windows before it.
    pub(super) fn add(
        &mut self,
        fd: &Arc<VmFd>,
        (memory, physical_bits): (&GuestMemory, u32),
        window: Arc<Window>,
        access: WindowAccess,
    ) -> Result<PlacedWindow, VmError> {
        let len = window.len();
        let end = self.end.max(end_of_ram(memory));
        let address = place(end, len, physical_bits).ok_or(VmError::WindowSize {
            size: len,
            bits: physical_bits,
        })?;
        let flags = match access {
            WindowAccess::Read => {
                if !fd.check_extension(Cap::ReadonlyMem) {
                    return Err(VmError::Capability("KVM_CAP_READONLY_MEM"));
                }
                KVM_MEM_READONLY
            }
            WindowAccess::Write => 0,
            WindowAccess::LoggedWrite => KVM_MEM_LOG_DIRTY_PAGES,
        };
        let slot = (memory.num_regions() + self.mapped.len()) as u32;
        let region = kvm_userspace_memory_region {
            slot,
            guest_phys_addr: address,
            memory_size: len,
            userspace_addr: window.as_ptr() as u64,
            flags,
        };
        // SAFETY: the range is a whole window, which the `Vm`, and after its start `Vcpus`, keeps mapped until no vCPU
        // can run. Slots are numbered after those of RAM, and the guest range lies after all that there is.
        unsafe { fd.set_user_memory_region(region) }
            .map_err(VmError::kvm("KVM_SET_USER_MEMORY_REGION"))?;
        self.mapped.push(window);
        self.end = address + len;
        let log = (access == WindowAccess::LoggedWrite).then(|| DirtyLog {
            vm: fd.clone(),
            slot,
            len,
        });
        Ok(PlacedWindow { address, log })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn windows_are_aligned_and_end_where_the_guests_addresses_do() {
        assert_eq!(place(4 * GIB, GIB, 36), Some(4 * GIB));
        assert_eq!(place(4 * GIB + 4096, 2 << 20, 36), Some(5 * GIB));
        assert_eq!(place(63 * GIB, GIB, 36), Some(63 * GIB));
        assert_eq!(place(63 * GIB, GIB + 4096, 36), None);
        assert_eq!(place(64 * GIB, 4096, 36), None);
        assert_eq!(place(u64::MAX - 1, 4096, 52), None);
        assert_eq!(place(GIB, u64::MAX, 64), None);
    }

    #[test]
    fn windows_come_after_all_ram_and_never_below_4_gib() {
        let ram = |ranges: &[(u64, usize)]| {
            let ranges: Vec<_> = ranges
                .iter()
                .map(|(at, len)| (vm_memory::GuestAddress(*at), *len))
                .collect();
            end_of_ram(&GuestMemory::from_ranges(&ranges).unwrap())
        };
        assert_eq!(ram(&[(0, 4096)]), 4 * GIB);
        assert_eq!(ram(&[(0, 4096), (4 * GIB, 8192)]), 4 * GIB + 8192);
    }
}
