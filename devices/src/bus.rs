//! Address buses: port I/O and memory-mapped I/O.

use std::sync::{Arc, Mutex};

use crate::lock;

/// A device that answers accesses to a range of addresses.
///
/// Called on the vCPU thread that made the access, under the device's own mutex; it must not block.
pub trait BusDevice: Send {
    /// The guest reads `data.len()` bytes (1, 2, 4 or 8) at `offset` bytes into the device's range.
    fn read(&mut self, offset: u64, data: &mut [u8]);

    /// The guest writes `data` (1, 2, 4 or 8 bytes) at `offset` bytes into the device's range.
    fn write(&mut self, offset: u64, data: &[u8]);
}

/// Two ranges on one bus overlap, or a range is empty or passes the end of the address space.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error(
    "bus range {base:#x}+{len:#x} is empty, overlaps another or passes the end of the address space"
)]
pub struct BusRangeError {
    /// First address.
    pub base: u64,
    /// Length in bytes.
    pub len: u64,
}

/// First address, length in bytes, and who answers.
type Mapped = (u64, u64, Arc<Mutex<dyn BusDevice>>);

/// A set of devices by address range; filled before the guest starts and not changed after.
#[derive(Default)]
pub struct Bus {
    /// Sorted by base, without overlap.
    ranges: Vec<Mapped>,
}

impl Bus {
    /// An empty bus.
    pub fn new() -> Self {
        Self::default()
    }

    /// Puts `device` at `base`.
    ///
    /// # Errors
    /// [`BusRangeError`] where the range is not free.
    pub fn insert(
        &mut self,
        base: u64,
        len: u64,
        device: Arc<Mutex<dyn BusDevice>>,
    ) -> Result<(), BusRangeError> {
        let error = BusRangeError { base, len };
        let end = base
            .checked_add(len)
            .filter(|_| len > 0)
            .ok_or(BusRangeError { base, len })?;
        let at = self.ranges.partition_point(|(b, _, _)| *b < base);
        let hits_next = self.ranges.get(at).is_some_and(|(b, _, _)| *b < end);
        let hits_previous = at > 0 && self.ranges[at - 1].0 + self.ranges[at - 1].1 > base;
        if hits_next || hits_previous {
            return Err(error);
        }
        self.ranges.insert(at, (base, len, device));
        Ok(())
    }

    fn find(&self, address: u64, size: usize) -> Option<(u64, &Mutex<dyn BusDevice>)> {
        let at = self
            .ranges
            .partition_point(|(b, _, _)| *b <= address)
            .checked_sub(1)?;
        let (base, len, device) = &self.ranges[at];
        let offset = address - base;
        (offset.checked_add(size as u64)? <= *len).then_some((offset, &**device))
    }

    /// Reads from the device at `address`; false, with `data` untouched, where there is none.
    pub fn read(&self, address: u64, data: &mut [u8]) -> bool {
        let Some((offset, device)) = self.find(address, data.len()) else {
            return false;
        };
        lock(device).read(offset, data);
        true
    }

    /// Writes to the device at `address`; false where there is none.
    pub fn write(&self, address: u64, data: &[u8]) -> bool {
        let Some((offset, device)) = self.find(address, data.len()) else {
            return false;
        };
        lock(device).write(offset, data);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Echo(u8);

    impl BusDevice for Echo {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            data.fill(self.0 + offset as u8);
        }
        fn write(&mut self, _: u64, data: &[u8]) {
            self.0 = data[0];
        }
    }

    fn echo() -> Arc<Mutex<dyn BusDevice>> {
        Arc::new(Mutex::new(Echo(0)))
    }

    #[test]
    fn an_access_reaches_the_device_whose_range_holds_all_of_it() {
        let mut bus = Bus::new();
        bus.insert(0x10, 0x10, echo()).unwrap();
        bus.insert(0x20, 0x10, echo()).unwrap();
        assert!(bus.write(0x20, &[7]));
        let mut data = [0; 4];
        assert!(bus.read(0x2c, &mut data));
        assert_eq!(data, [7 + 0xc; 4]);
        assert!(bus.read(0x1c, &mut data), "the last access that fits");
        assert_eq!(data, [0xc; 4]);
        assert!(
            !bus.read(0x1d, &mut data),
            "an access that straddles two devices"
        );
        assert!(!bus.read(0xf, &mut data));
        assert!(!bus.read(u64::MAX, &mut data));
        assert!(!bus.write(0x30, &[0]));
    }

    #[test]
    fn ranges_that_overlap_or_wrap_are_refused() {
        let mut bus = Bus::new();
        bus.insert(0x10, 0x10, echo()).unwrap();
        for (base, len) in [(0x1f, 1), (0x8, 9), (0x10, 0x10), (0, 0), (u64::MAX, 2)] {
            assert_eq!(
                bus.insert(base, len, echo()),
                Err(BusRangeError { base, len })
            );
        }
        bus.insert(0x8, 8, echo()).unwrap();
        bus.insert(0x20, 1, echo()).unwrap();
    }
}
