//! The balloon of a machine.

use std::sync::{Arc, Mutex};

use devices::virtio::balloon::{GiveBack, VirtioBalloon};
use vm_memory::Address;

use super::builder::Builder;
use super::events::new_interrupt;
use crate::machine::error::{StartError, host};
use config::{BalloonConfig, VmConfig};

/// Its name among the devices.
pub(in crate::machine) const ID: &str = "balloon";

/// Adds the balloon that is asked for, or, where all is to be shared, one by which the guest reports the pages that it
/// frees: that is the better part of what a guest need not hold.
pub(super) fn attach(builder: &mut Builder<'_>, config: &VmConfig) -> Result<(), StartError> {
    let unasked = (builder.plan.is_all() && builder.has_room()).then(BalloonConfig::reporting);
    let Some(config) = config.balloon.or(unasked) else {
        return Ok(());
    };
    let memory = builder.plan.memory().clone();
    let give_back: GiveBack =
        Arc::new(move |address, len| memory.give_back(address.raw_value(), len));
    let device = VirtioBalloon::new(&config.into(), give_back, new_interrupt("balloon")?)
        .map_err(host("balloon"))?;
    builder.add_virtio(ID, Arc::new(Mutex::new(device)))?;
    builder.attached.reports_free_pages = config.free_page_reporting;
    Ok(())
}
