//! The generation ID of a VM, by which a guest learns that it goes on from a snapshot, perhaps as one of several
//! (Microsoft, "Virtual Machine Generation ID"; Linux, `drivers/virt/vmgenid.c`).
//!
//! It is 16 bytes in guest memory, at an address that a device in the ACPI tables names in its `ADDR` object, and a
//! notification (0x80) of that device when they have changed. A guest then makes its random numbers anew, which without
//! that would be the same in each clone.
//!
//! ```text
//! boot:     new ─> write
//! restore:  new ─> restore ─> renew ─> resume, which notifies ─> the vCPUs run
//! ```
//!
//! QEMU has its firmware put a page of its own, which the memory map calls reserved, into guest memory, with the ID 40
//! bytes into it, and raises a GPE whose method notifies the device. Firecracker, like the device here, has no
//! firmware: it puts the 16 bytes at the end of the memory it keeps for its tables, outside what the E820 map calls
//! usable, and has the interrupt of a Generic Event Device notify.

use std::io;

use rustix::rand::{GetRandomFlags, getrandom};
use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};
use vmm_sys_util::eventfd::EventFd;

use crate::GuestMemory;
use crate::lifecycle::{Device, DeviceKind, StateKey, persist_by_type};
use crate::persist::{RestoreError, check_same};

/// What is the same of all devices of this kind.
pub(crate) const KIND: DeviceKind =
    DeviceKind::unmetered("VM generation ID", StateKey::One("generation"));

/// The device. Its ID is new with each that is made.
#[derive(Debug)]
pub struct VmGenId {
    address: GuestAddress,
    id: [u8; Self::SIZE],
    irqfd: EventFd,
    /// The guest has yet to be notified of the ID: it is from a saved state, or new since.
    restored: bool,
}

/// A generation ID cannot be made or written.
#[derive(Debug, thiserror::Error)]
pub enum VmGenIdError {
    /// The specification wants the ID on 8 bytes.
    #[error("a VM generation ID at {0:#x}, which is not a multiple of 8")]
    Alignment(u64),
    /// The host gives no random bytes.
    #[error("no random bytes for a VM generation ID")]
    Random(#[source] io::Error),
    /// The host has no event: mostly no file descriptor is left.
    #[error("no event for the interrupt of a VM generation ID")]
    Event(#[source] io::Error),
    /// It does not lie in guest memory.
    #[error("the VM generation ID at {address:#x} does not lie in guest memory")]
    Memory {
        /// Where it is to be.
        address: u64,
        /// The error of the memory.
        source: GuestMemoryError,
    },
}

/// The generation that a guest was saved in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmGenIdState {
    /// Where the guest knows the ID to be.
    pub address: u64,
    /// The ID.
    pub id: [u8; VmGenId::SIZE],
}

/// Random, which all the specification asks for; it is compared and never read as a number or as a UUID of some
/// version.
fn random_id() -> io::Result<[u8; VmGenId::SIZE]> {
    let mut id = [0; VmGenId::SIZE];
    // The kernel gives up to 256 bytes whole.
    let given = getrandom(&mut id, GetRandomFlags::empty())?;
    if given == id.len() {
        Ok(id)
    } else {
        Err(io::ErrorKind::UnexpectedEof.into())
    }
}

impl VmGenId {
    /// Length of the ID in bytes.
    pub const SIZE: usize = 16;

    /// A new ID, to be at `address`, guest physical: in memory that the guest's memory map does not call usable.
    ///
    /// # Errors
    /// `Alignment`, `Random`, `Event`.
    pub fn new(address: GuestAddress) -> Result<Self, VmGenIdError> {
        if !address.0.is_multiple_of(8) {
            return Err(VmGenIdError::Alignment(address.0));
        }
        Ok(Self {
            address,
            id: random_id().map_err(VmGenIdError::Random)?,
            irqfd: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
                .map_err(VmGenIdError::Event)?,
            restored: false,
        })
    }

    /// Where the ID is, for `ADDR`.
    pub fn address(&self) -> GuestAddress {
        self.address
    }

    /// The ID.
    pub fn id(&self) -> [u8; Self::SIZE] {
        self.id
    }

    /// The eventfd to register as irqfd of the GSI at which ACPI notifies the device.
    pub fn irqfd(&self) -> &EventFd {
        &self.irqfd
    }

    /// Puts the ID into guest memory, while no vCPU runs.
    ///
    /// # Errors
    /// `Memory`.
    pub fn write(&self, memory: &GuestMemory) -> Result<(), VmGenIdError> {
        memory
            .write_slice(&self.id, self.address)
            .map_err(|source| VmGenIdError::Memory {
                address: self.address.0,
                source,
            })
    }

    /// Begins a new generation, between [`Device::restore`] and [`Device::resume`], which notifies the guest: draws
    /// another ID and writes it.
    ///
    /// # Errors
    /// `Random`, `Memory`.
    pub fn renew(&mut self, memory: &GuestMemory) -> Result<(), VmGenIdError> {
        self.id = random_id().map_err(VmGenIdError::Random)?;
        self.write(memory)
    }

    /// Raises the interrupt at which ACPI notifies the device.
    fn notify(&self) {
        if let Err(error) = self.irqfd.write(1) {
            tracing::debug!(error = %report::chain(&error), "VM generation ID irqfd write");
        }
    }

    /// The present generation.
    pub(crate) fn save_state(&self) -> VmGenIdState {
        VmGenIdState {
            address: self.address.0,
            id: self.id,
        }
    }

    /// Goes on in the saved generation, until [`VmGenId::renew`].
    ///
    /// # Errors
    /// `Mismatch` where the guest knows the ID to be elsewhere.
    pub(crate) fn restore_state(&mut self, state: &VmGenIdState) -> Result<(), RestoreError> {
        let address = |at| format!("{at:#x}");
        let (saved, now) = (address(state.address), address(self.address.0));
        check_same(KIND.name, "the address", &saved, &now)?;
        self.id = state.id;
        self.restored = true;
        Ok(())
    }
}

impl Device for VmGenId {
    persist_by_type!(KIND);

    fn resume(&mut self) {
        if std::mem::take(&mut self.restored) {
            self.notify();
        }
    }

    /// The generation stays: a guest that is reset has not been copied.
    fn reset(&mut self) {
        self.restored = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::persist::through_json;

    const AT: GuestAddress = GuestAddress(0xff8);

    fn memory() -> GuestMemory {
        GuestMemory::from_ranges(&[(GuestAddress(0), 0x2000)]).unwrap()
    }

    #[test]
    fn a_restored_guest_finds_another_id_and_is_notified_when_it_runs() {
        let memory = memory();
        let saved = VmGenId::new(AT).unwrap();
        saved.write(&memory).unwrap();
        let seen: [u8; 16] = memory.read_obj(AT).unwrap();
        assert_eq!(seen, saved.id());
        let mut restored = VmGenId::new(AT).unwrap();
        restored
            .restore_state(&through_json(&saved.save_state()))
            .unwrap();
        assert_eq!(restored.save_state(), saved.save_state());
        restored.renew(&memory).unwrap();
        let renewed: [u8; 16] = memory.read_obj(AT).unwrap();
        assert_ne!(renewed, seen);
        assert_eq!(renewed, restored.id());
        assert!(restored.irqfd().read().is_err());
        restored.resume();
        assert_eq!(restored.irqfd().read().unwrap(), 1);
        restored.pause();
        restored.resume();
        assert!(restored.irqfd().read().is_err(), "it is notified once");
    }

    #[test]
    fn two_guests_have_two_ids() {
        let [one, other] = [(); 2].map(|()| VmGenId::new(AT).unwrap().id());
        assert_ne!(one, other);
    }

    #[test]
    fn an_id_that_cannot_be_there_is_refused() {
        assert!(matches!(
            VmGenId::new(GuestAddress(0xffc)),
            Err(VmGenIdError::Alignment(0xffc))
        ));
        for address in [0x1ff8, 0x2000, u64::MAX - 7] {
            let outside = VmGenId::new(GuestAddress(address)).unwrap();
            assert!(matches!(
                outside.write(&memory()),
                Err(VmGenIdError::Memory { .. })
            ));
        }
        let mut device = VmGenId::new(AT).unwrap();
        let elsewhere = VmGenIdState {
            address: 0,
            ..device.save_state()
        };
        assert!(matches!(
            device.restore_state(&elsewhere),
            Err(RestoreError::Mismatch { .. })
        ));
    }
}
