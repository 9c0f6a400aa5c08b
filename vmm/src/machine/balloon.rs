//! The balloon of a machine.

use std::sync::{Arc, Mutex};

use devices::virtio::balloon::{GiveBack, VirtioBalloon};
use memshare::SharedMemory;
use vm_memory::Address;

use super::{Builder, StartError, Subscriber, host, new_interrupt};
use crate::config::BalloonConfig;

/// Adds the device that `config` asks for. Its pages go back to the host, through `memory`, at once.
pub(super) fn add(
    config: Option<BalloonConfig>,
    memory: Arc<SharedMemory>,
    builder: &mut Builder<'_>,
    subscribers: &mut Vec<Subscriber>,
) -> Result<Option<Arc<Mutex<VirtioBalloon>>>, StartError> {
    let Some(config) = config else {
        return Ok(None);
    };
    let give_back: GiveBack =
        Arc::new(move |address, len| memory.give_back(address.raw_value(), len));
    let device = VirtioBalloon::new(&config.into(), give_back, new_interrupt("balloon")?)
        .map_err(host("balloon"))?;
    let device = Arc::new(Mutex::new(device));
    builder.add_virtio(device.clone())?;
    subscribers.push(device.clone());
    Ok(Some(device))
}
