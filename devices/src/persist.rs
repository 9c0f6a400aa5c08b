//! Saving devices, and making them again.
//!
//! ```text
//! pause ─> save ─> state ······ state ─> restore ─> MmioTransport::restore ─> resume
//!   (vCPUs stand)                 (a device made as the saved one was, of the same configuration)
//! ```
//!
//! A state holds what the guest can see or has set, and nothing of the host: neither files nor counters. Each device
//! has its own in its module `persist`; `AcpiPm`, `BootTimer` and `Pvpanic` have none, as they remember nothing.
//!
//! **Saving** is for a guest that is paused: its vCPUs stand, and the devices have been paused after them. A pause
//! waits for every request in flight and gives it back to the driver, so that there is nothing to save of requests;
//! what the driver has put into a ring and the device has not taken stays in guest memory. A pause may write to guest
//! memory and raise interrupts, so memory and the interrupt controllers of the VM are saved after it.
//!
//! **Restoring** goes in the order of the picture: first the device, which compares itself with the saved one and is
//! paused from then on; then its transport, which activates it if the driver had. Neither touches guest memory or
//! raises an interrupt. That is for `resume`, once all of the VM is there: the device looks at each of its queues,
//! since a kick may have been lost, and raises its line if an interrupt was pending, since that may have been lost too.
//! The calls and their order are those of [`lifecycle`](crate::lifecycle).
//!
//! A state is hostile: whoever could write to the file can have put anything there. All of it is checked, and refused
//! with a [`RestoreError`]; after that the device is of no use. What passes can do no more than the guest itself could
//! have done: the contents of rings are looked at when they are served, as ever.

use crate::activate_error::ActivateError;

/// A saved state is not one that this device can go on from.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The device has been used already: only a new one can be restored, and before its transport.
    #[error("{device}: it is in use, and only a new device can be restored")]
    InUse {
        /// Which device.
        device: &'static str,
    },
    /// The device is made otherwise than the saved one was, and the guest would see it.
    #[error("{device}: {field} was {saved} when the guest was saved, and is {now} now")]
    Mismatch {
        /// Which device.
        device: &'static str,
        /// What differs.
        field: &'static str,
        /// The value in the state.
        saved: String,
        /// The value of the device as it is made now.
        now: String,
    },
    /// No device can have been in such a state.
    #[error("{device}: {field} cannot be {value:#x}: {reason}")]
    Invalid {
        /// Which device.
        device: &'static str,
        /// The field at fault.
        field: &'static str,
        /// Its value, or its length.
        value: u64,
        /// The rule that it breaks.
        reason: &'static str,
    },
    /// No queue can have been in such a state.
    #[error("{device}: {field} of queue {queue} cannot be {value:#x}: {reason}")]
    Queue {
        /// Which device.
        device: &'static str,
        /// The queue's index.
        queue: usize,
        /// The field at fault.
        field: &'static str,
        /// Its value.
        value: u64,
        /// The rule that it breaks.
        reason: &'static str,
    },
    /// The ring of a queue cannot be where the state has it.
    #[error("{device}: the ring of queue {queue} is not where one can be")]
    Ring {
        /// Which device.
        device: &'static str,
        /// The queue's index.
        queue: usize,
        /// What is wrong with it.
        #[source]
        source: virtio_queue::Error,
    },
    /// The state is none of a device of this kind.
    #[error("{device}: its state cannot be read")]
    Malformed {
        /// Which device.
        device: &'static str,
        /// What is wrong with it.
        #[source]
        source: serde_json::Error,
    },
    /// The states are those of other devices than the guest has.
    #[error("the devices are others than those configured: {0}")]
    OtherDevices(String),
    /// The device refuses to start with the queues as they are saved.
    #[error("{device}: it cannot go on with its queues")]
    Activate {
        /// Which device.
        device: &'static str,
        /// Why.
        source: ActivateError,
    },
}

/// The device and the field at fault of a value that none can have.
pub(crate) fn invalid(
    device: &'static str,
    field: &'static str,
    value: impl Into<u64>,
    reason: &'static str,
) -> RestoreError {
    RestoreError::Invalid {
        device,
        field,
        value: value.into(),
        reason,
    }
}

/// Refuses a device that is unlike the saved one.
pub(crate) fn check_same<T: PartialEq + std::fmt::Display + ?Sized>(
    device: &'static str,
    field: &'static str,
    saved: &T,
    now: &T,
) -> Result<(), RestoreError> {
    if saved == now {
        return Ok(());
    }
    Err(RestoreError::Mismatch {
        device,
        field,
        saved: saved.to_string(),
        now: now.to_string(),
    })
}

/// A state as it is after it was written to a file and read again.
#[cfg(test)]
pub(crate) fn through_json<T>(state: &T) -> T
where
    T: serde::Serialize + serde::de::DeserializeOwned + PartialEq + std::fmt::Debug,
{
    let json = serde_json::to_string(state).unwrap();
    let read: T = serde_json::from_str(&json).unwrap();
    assert_eq!(&read, state);
    let mut value: serde_json::Value = serde_json::from_str(&json).unwrap();
    value["unknown"] = true.into();
    assert!(
        serde_json::from_value::<T>(value).is_err(),
        "a field that is not known is refused"
    );
    read
}
