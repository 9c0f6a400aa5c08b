//! The life of a device: what a machine asks of each, in which order, and what stands still by then.
//!
//! ```text
//! boot:      new ─> resume ─> the vCPUs run
//! pause:     the vCPUs stand ─> pause, of each device ─> [save, of each] ─> resume, of each ─> the vCPUs run
//! restore:   new ─> restore, of each ─> memory, vCPUs and interrupt controllers get their state
//!            ─> resume, of each ─> the vCPUs run
//! shutdown:  the vCPUs have ended ─> reset, of each ─> the machine closes what is behind the devices
//! ```
//!
//! A machine keeps its devices in one [`DeviceList`](crate::device_list::DeviceList), which goes through them in the
//! order in which they were added: a device before its transport. To add a kind of device is to implement [`Device`]
//! and its [`DeviceKind`] in a folder of its own; what prints counters or writes snapshots knows neither.
//!
//! A device that only does what the access of a vCPU makes it do (those of [`legacy`](crate::legacy)) stands still with
//! the vCPUs. One that serves queues works on the device thread as well, so that it needs a pause of its own.

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::metrics::Metric;
use crate::persist::RestoreError;

/// The state of a device: a JSON value that a type of the device's module `persist` describes. A device without a state
/// has `null`.
pub type DeviceState = serde_json::Value;

/// Where a snapshot keeps the states of a kind of device. The names are part of the format of snapshots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StateKey {
    /// Nowhere: the device remembers nothing.
    Nothing,
    /// A guest has at most one device of the kind; its state has this name.
    One(&'static str),
    /// Under this name, a map from the device's id to its state.
    ById(&'static str),
    /// Under this name, a list in the order of the devices.
    InOrder(&'static str),
}

/// What the metrics of a kind of device are called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MetricsGroup {
    /// The object that has them in a line of the metrics file; of a kind with a label, `NAME_ID`.
    pub name: &'static str,
    /// The label that has the device's id, for Prometheus; of a kind of which a guest can have several.
    pub label: Option<&'static str>,
}

/// What is the same of all devices of a kind. A device's module declares one constant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceKind {
    /// The name in errors and logs.
    pub name: &'static str,
    /// Where a snapshot keeps its state.
    pub state: StateKey,
    /// What its metrics are called; `None` where it has none.
    pub metrics: Option<MetricsGroup>,
}

impl DeviceKind {
    /// A kind without metrics.
    pub(crate) const fn unmetered(name: &'static str, state: StateKey) -> Self {
        Self {
            name,
            state,
            metrics: None,
        }
    }
}

/// A state that cannot be written as JSON.
#[derive(Debug, thiserror::Error)]
#[error("{device}: its state cannot be saved")]
pub struct SaveError {
    /// The kind of device.
    pub device: &'static str,
    /// What the state has that JSON has not.
    #[source]
    pub source: serde_json::Error,
}

/// A device of a machine.
///
/// The machine calls all of these on one thread at a time, under the device's mutex. None may be called on the device
/// thread while it holds that mutex. The order of the calls is that of the [module's picture](self).
pub trait Device: Send {
    /// Which kind of device it is.
    fn kind(&self) -> &'static DeviceKind;

    /// Comes to a standstill: no vCPU runs. Waits for the requests in flight and gives them back to the driver, which
    /// may write to guest memory and raise interrupts. When it returns, the device touches no guest memory and raises
    /// no interrupt until [`Device::resume`]; what the driver has offered and the device has not taken stays in guest
    /// memory. A device that is paused already stays so.
    fn pause(&mut self) {}

    /// Goes on, before the vCPUs do. The device looks at everything that it may have missed, since a notification may
    /// have been lost, and after a [`Device::restore`] raises the interrupt that was pending: the interrupt controllers
    /// of the VM have their state by now.
    fn resume(&mut self);

    /// What the guest can see of the device or has set in it, and nothing of the host: no files, no counters. The
    /// device is paused.
    ///
    /// # Errors
    /// [`SaveError`].
    fn save(&self) -> Result<DeviceState, SaveError>;

    /// Takes over the state of a device that was made of the same configuration; this one was just made, and is paused
    /// from then on. It touches no guest memory and raises no interrupt. The state is hostile: all of it is checked.
    ///
    /// # Errors
    /// [`RestoreError`]; the device is of no use then.
    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError>;

    /// Becomes as it was made: the driver resets it through its transport, or the machine ends. Waits until no request
    /// of the device touches guest memory any more.
    fn reset(&mut self);

    /// What the device has done, in numbers. At any time; it waits for nothing.
    fn metrics(&self) -> Vec<Metric> {
        Vec::new()
    }
}

/// A state as a value.
pub(crate) fn encode(
    device: &'static str,
    state: &impl Serialize,
) -> Result<DeviceState, SaveError> {
    serde_json::to_value(state).map_err(|source| SaveError { device, source })
}

/// A value as a state.
pub(crate) fn decode<T: DeserializeOwned>(
    device: &'static str,
    state: &DeviceState,
) -> Result<T, RestoreError> {
    T::deserialize(state).map_err(|source| RestoreError::Malformed { device, source })
}

/// Implements the part of [`Device`] that is the same for each: its kind, and its state by `save_state` and
/// `restore_state`.
macro_rules! persist_by_type {
    ($kind:expr) => {
        fn kind(&self) -> &'static $crate::lifecycle::DeviceKind {
            &$kind
        }

        fn save(&self) -> Result<$crate::lifecycle::DeviceState, $crate::lifecycle::SaveError> {
            $crate::lifecycle::encode($kind.name, &self.save_state())
        }

        fn restore(
            &mut self,
            state: &$crate::lifecycle::DeviceState,
        ) -> Result<(), $crate::persist::RestoreError> {
            self.restore_state(&$crate::lifecycle::decode($kind.name, state)?)
        }
    };
}
pub(crate) use persist_by_type;

/// Implements [`Device`] for a device that remembers nothing and acts only when a vCPU accesses it.
macro_rules! stateless {
    ($device:ty, $kind:expr) => {
        impl $crate::lifecycle::Device for $device {
            fn kind(&self) -> &'static $crate::lifecycle::DeviceKind {
                &$kind
            }

            fn resume(&mut self) {}

            fn save(&self) -> Result<$crate::lifecycle::DeviceState, $crate::lifecycle::SaveError> {
                Ok($crate::lifecycle::DeviceState::Null)
            }

            fn restore(
                &mut self,
                state: &$crate::lifecycle::DeviceState,
            ) -> Result<(), $crate::persist::RestoreError> {
                $crate::lifecycle::decode($kind.name, state)
            }

            fn reset(&mut self) {}
        }
    };
}
pub(crate) use stateless;
