//! The vmclock page, by which a guest learns that its clocks were disrupted: that it was loaded from a snapshot (Linux,
//! `include/uapi/linux/vmclock-abi.h` and `drivers/ptp/ptp_vmclock.c`; QEMU, `hw/acpi/vmclock.c`).
//!
//! It is a page of guest memory that a device in the ACPI tables names. Linux offers it to processes as
//! `/dev/vmclock0`, which they map: where `disruption_marker` has changed, what a process has measured of a clock
//! (against NTP, for one) is of another machine's clock; where `vm_generation_counter` has, the guest was loaded from a
//! snapshot. The page does not say what time it is, as no counter is paired with a time (`VMCLOCK_COUNTER_INVALID`):
//! the clocks of a loaded guest are right already.
//!
//! ```text
//! boot:     new ─> write
//! restore:  new ─> restore ─> disrupt ─> the notification of the generation ID, which is this device's, too
//! ```

use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{Immutable, IntoBytes};

use crate::GuestMemory;
use crate::lifecycle::{Device, DeviceKind, StateKey, persist_by_type};
use crate::persist::{RestoreError, check_same};

/// What is the same of all devices of this kind.
pub const KIND: DeviceKind = DeviceKind::unmetered("vmclock", StateKey::One("clock"));

const MAGIC: [u8; 4] = *b"VCLK";
const VERSION: u16 = 1;
/// `VMCLOCK_COUNTER_INVALID`.
const COUNTER_INVALID: u8 = 0xff;
/// `VMCLOCK_FLAG_VM_GEN_COUNTER_PRESENT`, and `VMCLOCK_FLAG_NOTIFICATION_PRESENT`.
const FLAGS: u64 = (1 << 8) | (1 << 9);

/// `struct vmclock_abi`.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct Page {
    magic: [u8; 4],
    /// Of the region.
    size: U32,
    version: U16,
    counter_id: u8,
    time_type: u8,
    /// Odd during a change.
    seq_count: U32,
    disruption_marker: U64,
    flags: U64,
    pad: [u8; 2],
    clock_status: u8,
    leap_second_smearing_hint: u8,
    tai_offset_sec: U16,
    leap_indicator: u8,
    counter_period_shift: u8,
    counter_value: U64,
    counter_period: [U64; 3],
    time: [U64; 4],
    vm_generation_counter: U64,
}

/// The device.
#[derive(Debug)]
pub struct VmClock {
    address: GuestAddress,
    /// How often the guest's clocks were disrupted: how often it was loaded.
    disruptions: u64,
}

/// The page cannot be there.
#[derive(Debug, thiserror::Error)]
pub enum VmClockError {
    /// A process of the guest is to map it, and it alone.
    #[error("a vmclock page at {0:#x}, which is not a multiple of 4 KiB")]
    Alignment(u64),
    /// It does not lie in guest memory.
    #[error("the vmclock page at {address:#x} does not lie in guest memory")]
    Memory {
        /// Where it is to be.
        address: u64,
        /// The error of the memory.
        source: GuestMemoryError,
    },
}

/// The clock that a guest was saved with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmClockState {
    /// Where the guest knows the page to be.
    pub address: u64,
    /// How often its clocks were disrupted.
    pub disruptions: u64,
}

impl VmClock {
    /// Length of the page in bytes.
    pub const SIZE: u64 = 4096;

    /// A page to be at `address`, guest physical: in memory that the guest's memory map does not call usable.
    ///
    /// # Errors
    /// `Alignment`.
    pub fn new(address: GuestAddress) -> Result<Self, VmClockError> {
        if !address.0.is_multiple_of(Self::SIZE) {
            return Err(VmClockError::Alignment(address.0));
        }
        Ok(Self {
            address,
            disruptions: 0,
        })
    }

    /// Puts the page into guest memory, while no vCPU runs.
    ///
    /// # Errors
    /// `Memory`.
    pub fn write(&self, memory: &GuestMemory) -> Result<(), VmClockError> {
        // Two steps of the sequence for each change; readers compare its bits alone.
        let seq_count = (self.disruptions as u32).wrapping_mul(2);
        let page = Page {
            magic: MAGIC,
            size: U32::new(Self::SIZE as u32),
            version: VERSION.into(),
            counter_id: COUNTER_INVALID,
            time_type: 0,
            seq_count: seq_count.into(),
            disruption_marker: self.disruptions.into(),
            flags: FLAGS.into(),
            pad: [0; 2],
            clock_status: 0,
            leap_second_smearing_hint: 0,
            tai_offset_sec: U16::ZERO,
            leap_indicator: 0,
            counter_period_shift: 0,
            counter_value: U64::ZERO,
            counter_period: [U64::ZERO; 3],
            time: [U64::ZERO; 4],
            vm_generation_counter: self.disruptions.into(),
        };
        memory
            .write_slice(page.as_bytes(), self.address)
            .map_err(|source| VmClockError::Memory {
                address: self.address.0,
                source,
            })
    }

    /// Tells the guest that its clocks were disrupted, between [`Device::restore`] and [`Device::resume`]. It is
    /// notified by the generation ID, which changes with it.
    ///
    /// # Errors
    /// `Memory`.
    pub fn disrupt(&mut self, memory: &GuestMemory) -> Result<(), VmClockError> {
        self.disruptions = self.disruptions.wrapping_add(1);
        self.write(memory)
    }

    pub(crate) fn save_state(&self) -> VmClockState {
        VmClockState {
            address: self.address.0,
            disruptions: self.disruptions,
        }
    }

    /// Goes on with the saved page.
    ///
    /// # Errors
    /// `Mismatch` where the guest knows the page to be elsewhere.
    pub(crate) fn restore_state(&mut self, state: &VmClockState) -> Result<(), RestoreError> {
        let address = |at| format!("{at:#x}");
        let (saved, now) = (address(state.address), address(self.address.0));
        check_same(KIND.name, "the address", &saved, &now)?;
        self.disruptions = state.disruptions;
        Ok(())
    }
}

impl Device for VmClock {
    persist_by_type!(KIND);

    fn resume(&mut self) {}

    /// The page stays: a guest that is reset has not been copied.
    fn reset(&mut self) {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::persist::through_json;

    const AT: GuestAddress = GuestAddress(0x1000);

    fn memory() -> GuestMemory {
        GuestMemory::from_ranges(&[(GuestAddress(0), 0x2000)]).unwrap()
    }

    /// The sequence count, the disruption marker and the generation counter, at their offsets in `struct vmclock_abi`.
    fn counts(memory: &GuestMemory) -> (u32, u64, u64) {
        let at = |offset| GuestAddress(AT.0 + offset);
        (
            memory.read_obj(at(12)).unwrap(),
            memory.read_obj(at(16)).unwrap(),
            memory.read_obj(at(104)).unwrap(),
        )
    }

    #[test]
    fn the_page_is_as_linux_knows_it() {
        let memory = memory();
        VmClock::new(AT).unwrap().write(&memory).unwrap();
        assert_eq!(size_of::<Page>(), 112);
        let mut head = [0; 12];
        memory.read_slice(&mut head, AT).unwrap();
        assert_eq!(&head, b"VCLK\0\x10\0\0\x01\0\xff\0");
        assert_eq!(counts(&memory), (0, 0, 0));
        let flags: u64 = memory.read_obj(GuestAddress(AT.0 + 24)).unwrap();
        assert_eq!(flags, 0x300);
    }

    #[test]
    fn a_loaded_guest_finds_other_markers_each_time() {
        let memory = memory();
        let mut clock = VmClock::new(AT).unwrap();
        for generation in 1..4 {
            let mut loaded = VmClock::new(AT).unwrap();
            loaded
                .restore_state(&through_json(&clock.save_state()))
                .unwrap();
            loaded.disrupt(&memory).unwrap();
            let (seq, marker, counter) = counts(&memory);
            assert_eq!(
                (seq, marker, counter),
                (generation * 2, generation.into(), generation.into())
            );
            clock = loaded;
        }
        let mut last = VmClock::new(AT).unwrap();
        last.restore_state(&VmClockState {
            disruptions: u64::MAX,
            ..clock.save_state()
        })
        .unwrap();
        last.disrupt(&memory).unwrap();
        assert_eq!(counts(&memory), (0, 0, 0), "it wraps");
    }

    #[test]
    fn a_page_that_cannot_be_there_is_refused() {
        assert!(matches!(
            VmClock::new(GuestAddress(0xff8)),
            Err(VmClockError::Alignment(0xff8))
        ));
        let outside = VmClock::new(GuestAddress(0x2000)).unwrap();
        let refused = outside.write(&memory()).unwrap_err();
        assert!(matches!(refused, VmClockError::Memory { .. }));
        let mut clock = VmClock::new(AT).unwrap();
        let elsewhere = VmClockState {
            address: 0,
            ..clock.save_state()
        };
        assert!(matches!(
            clock.restore_state(&elsewhere),
            Err(RestoreError::Mismatch { .. })
        ));
    }
}
