//! The generation ID of a machine.

use std::sync::{Arc, Mutex};

use devices::vmgenid::VmGenId;
use vm_memory::GuestAddress;

use super::builder::Builder;
use crate::machine::error::StartError;
use kvm::layout;

pub(super) fn attach(builder: &mut Builder<'_>) -> Result<(), StartError> {
    let generation = VmGenId::new(GuestAddress(layout::VM_GENERATION_ID))?;
    let gsi = layout::GENERATION_GSI;
    builder.vm.register_irqfd(generation.irqfd(), gsi)?;
    let generation = Arc::new(Mutex::new(generation));
    builder.attached.list.add("", generation);
    Ok(())
}
