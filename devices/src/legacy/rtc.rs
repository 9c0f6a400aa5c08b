//! The CMOS RTC (Motorola MC146818): gives a guest the time of day when it boots.
//!
//! The clock follows the host's real-time clock in UTC, in BCD and 24-hour mode. It cannot be set and raises no
//! interrupt: guests keep time by kvm-clock.

use time::OffsetDateTime;

use crate::bus::BusDevice;
use crate::lifecycle::{Device, DeviceKind, StateKey, persist_by_type};

mod persist;

pub use persist::RtcState;

/// What is the same of all devices of this kind.
pub(crate) const KIND: DeviceKind = DeviceKind::unmetered("RTC", StateKey::One("rtc"));

const INDEX_PORT: u64 = 0;
const DATA_PORT: u64 = 1;

/// Bit 7 of the index port masks NMIs and is no part of the index.
const INDEX_MASK: u8 = 0x7f;
/// Register B: 24-hour mode, BCD, no interrupts.
const REGISTER_B_24H: u8 = 1 << 1;
/// Register D: the time is valid.
const REGISTER_D_VALID: u8 = 1 << 7;
/// Where the FADT's `CENTURY` field says the century is.
const CENTURY: u8 = 0x32;

/// The two CMOS ports, index and data.
pub struct CmosRtc {
    index: u8,
    now: fn() -> OffsetDateTime,
}

impl Default for CmosRtc {
    fn default() -> Self {
        Self::new()
    }
}

impl CmosRtc {
    /// Ports taken.
    pub const PORTS: u64 = 2;

    /// An RTC that shows the host's time.
    pub fn new() -> Self {
        Self {
            index: 0,
            now: OffsetDateTime::now_utc,
        }
    }

    fn register(&self) -> u8 {
        let now = (self.now)();
        match self.index {
            0x00 => bcd(now.second()),
            0x02 => bcd(now.minute()),
            0x04 => bcd(now.hour()),
            0x06 => bcd(now.weekday().number_from_sunday()),
            0x07 => bcd(now.day()),
            0x08 => bcd(now.month().into()),
            0x09 => bcd((now.year().rem_euclid(100)) as u8),
            0x0b => REGISTER_B_24H,
            0x0d => REGISTER_D_VALID,
            CENTURY => bcd((now.year() / 100).rem_euclid(100) as u8),
            _ => 0,
        }
    }
}

fn bcd(value: u8) -> u8 {
    ((value / 10) << 4) | (value % 10)
}

impl Device for CmosRtc {
    persist_by_type!(KIND);

    fn resume(&mut self) {}

    fn reset(&mut self) {
        self.index = 0;
    }
}

impl BusDevice for CmosRtc {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let (DATA_PORT, Some(first)) = (offset, data.first_mut()) {
            *first = self.register();
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let (INDEX_PORT, Some(first)) = (offset, data.first()) {
            self.index = first & INDEX_MASK;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(rtc: &mut CmosRtc, index: u8) -> u8 {
        rtc.write(INDEX_PORT, &[index]);
        let mut data = [0xff];
        rtc.read(DATA_PORT, &mut data);
        data[0]
    }

    #[test]
    fn shows_the_time_in_bcd() {
        let mut rtc = CmosRtc {
            index: 0,
            now: || OffsetDateTime::from_unix_timestamp(1_798_761_599).unwrap(),
        };
        // 2026-12-31 23:59:59 UTC, a Thursday.
        let shown = [0x00, 0x02, 0x04, 0x06, 0x07, 0x08, 0x09, CENTURY].map(|i| read(&mut rtc, i));
        assert_eq!(shown, [0x59, 0x59, 0x23, 0x05, 0x31, 0x12, 0x26, 0x20]);
        assert_eq!(
            read(&mut rtc, 0x80 | 0x0d),
            REGISTER_D_VALID,
            "the NMI mask is no part of the index"
        );
        assert_eq!(
            read(&mut rtc, 0x0a) & 0x80,
            0,
            "no update is ever in progress"
        );
    }

    #[test]
    fn the_data_port_cannot_be_written() {
        let mut rtc = CmosRtc::new();
        rtc.write(INDEX_PORT, &[0x0d]);
        rtc.write(DATA_PORT, &[0]);
        assert_eq!(read(&mut rtc, 0x0d), REGISTER_D_VALID);
    }
}
