//! The state of all devices of a guest.

use std::collections::BTreeMap;

use devices::legacy::{I8042State, RtcState, SerialState};
use devices::virtio::balloon::BalloonDeviceState;
use devices::virtio::block::BlockState;
use devices::virtio::mmio::TransportState;
use devices::virtio::pmem::PmemState;
use devices::virtio::rng::RngState;
use devices::virtio::vsock::VsockState;
use devices::vmgenid::VmGenIdState;
use serde::{Deserialize, Serialize};

/// What the devices of a guest remember, but for the disks of its drives.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DevicesState {
    pub(crate) serial: SerialState,
    pub(crate) keyboard: I8042State,
    pub(crate) rtc: RtcState,
    pub(crate) generation: VmGenIdState,
    pub(crate) drives: BTreeMap<String, BlockState>,
    pub(crate) pmem: BTreeMap<String, PmemState>,
    pub(crate) entropy: Option<RngState>,
    pub(crate) balloon: Option<BalloonDeviceState>,
    /// Of none that was saved before there were such devices.
    #[serde(default)]
    pub(crate) vsock: Option<VsockState>,
    /// Of the virtio devices, by address.
    pub(crate) transports: Vec<TransportState>,
}
