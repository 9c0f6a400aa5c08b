//! Devices of the PC on the I/O port bus: the few that a stock kernel needs or looks for.

use std::sync::Arc;

pub(crate) mod acpi_pm;
pub(crate) mod boot_timer;
pub(crate) mod i8042;
pub(crate) mod pvpanic;
pub(crate) mod rtc;
pub(crate) mod serial;

pub use acpi_pm::{AcpiPm, RESET_VALUE, S5_SLEEP_TYPE};
pub use boot_timer::{BootMark, BootTimer};
pub use i8042::{I8042, I8042State};
pub use pvpanic::Pvpanic;
pub use rtc::{CmosRtc, RtcState};
pub use serial::{SerialConsole, SerialInput, SerialMetrics, SerialPort, SerialState};

/// What a guest asks for, or reports, through a legacy device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PowerEvent {
    /// ACPI sleep state S5.
    PowerOff,
    /// A reset, by the ACPI reset register or the i8042.
    Reset,
    /// The guest kernel panicked.
    Panic,
}

/// Called by a device with each [`PowerEvent`], on a vCPU thread; it must not block.
pub type PowerSink = Arc<dyn Fn(PowerEvent) + Send + Sync>;

#[cfg(test)]
fn recorder() -> (PowerSink, Arc<std::sync::Mutex<Vec<PowerEvent>>>) {
    let events = Arc::new(std::sync::Mutex::new(Vec::new()));
    let seen = events.clone();
    (
        Arc::new(move |event| seen.lock().unwrap().push(event)),
        events,
    )
}
