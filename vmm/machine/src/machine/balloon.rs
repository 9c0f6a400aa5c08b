//! The balloon of a machine.

use std::sync::{Arc, Mutex};

use devices::virtio::balloon::{GiveBack, VirtioBalloon};
use memshare::SharedMemory;
use vm_memory::Address;

use super::error::{StartError, host};
use super::events::new_interrupt;
use config::BalloonConfig;

/// The device that `config` asks for. Pages that the guest sets aside are given back to the host at once, through
/// `memory`.
pub(super) fn device(
    config: BalloonConfig,
    memory: Arc<SharedMemory>,
) -> Result<Arc<Mutex<VirtioBalloon>>, StartError> {
    let give_back: GiveBack =
        Arc::new(move |address, len| memory.give_back(address.raw_value(), len));
    let device = VirtioBalloon::new(&config.into(), give_back, new_interrupt("balloon")?)
        .map_err(host("balloon"))?;
    Ok(Arc::new(Mutex::new(device)))
}
