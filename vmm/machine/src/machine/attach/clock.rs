//! The vmclock page of a machine.

use std::sync::{Arc, Mutex};

use devices::vmclock::VmClock;
use vm_memory::GuestAddress;

use super::builder::Builder;
use crate::machine::error::StartError;
use kvm::layout;

pub(super) fn attach(builder: &mut Builder<'_>) -> Result<(), StartError> {
    let clock = VmClock::new(GuestAddress(layout::VM_CLOCK))?;
    builder.attached.list.add("", Arc::new(Mutex::new(clock)));
    Ok(())
}
