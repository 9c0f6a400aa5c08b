//! The pmem devices of a machine, and their disks.

use std::sync::Arc;

use super::builder::{Builder, HostPart};
use super::events::new_interrupt;
use crate::machine::domain::SharingDomain;
use crate::machine::error::StartError;
use crate::pmem::{MapBudget, Pmem};
use config::VmConfig;
use host::report::chain;
use kvm::vm::Vm;

/// The disk that a pmem device has when the machine ends.
struct PmemDisk {
    id: String,
    pmem: Arc<Pmem>,
}

impl HostPart for PmemDisk {
    fn close(&self) {
        if let Err(error) = self.pmem.close() {
            tracing::error!(pmem = %self.id, error = %chain(&error), "not all that the guest wrote is on the disk");
        }
    }
}

/// Maps the disks of all pmem devices, the root device before the others: a guest numbers them in the order in which it
/// finds them. This comes before the devices, because the memory manager has to know all memory.
pub(in crate::machine) fn map(
    config: &VmConfig,
    vm: &mut Vm,
) -> Result<Vec<(String, Arc<Pmem>)>, StartError> {
    let mut budget = MapBudget::of_host();
    let domain = SharingDomain::of(&config.sharing);
    let root = config.pmem.iter().filter(|pmem| pmem.root_device);
    let others = config.pmem.iter().filter(|pmem| !pmem.root_device);
    root.chain(others)
        .map(|pmem| {
            let interrupt = new_interrupt("pmem device")?;
            let attached = Pmem::attach(pmem, vm, interrupt, &mut budget, &|file| {
                domain.admits(file)
            });
            let attached = attached.map_err(|source| StartError::Pmem {
                pmem: pmem.id.clone(),
                source: Box::new(source),
            })?;
            Ok((pmem.id.clone(), Arc::new(attached)))
        })
        .collect()
}

/// Puts each behind a transport, and a guard where the guest must not write.
pub(super) fn attach(builder: &mut Builder<'_>, _: &VmConfig) -> Result<(), StartError> {
    for (id, pmem) in builder.pmem {
        if let Some(guard) = pmem.guard() {
            let mmio = &mut builder.attached.buses.mmio;
            mmio.insert(guard.address, guard.len, guard.writes.clone())?;
        }
        builder.add_virtio(id, pmem.device().clone())?;
        let disk = PmemDisk {
            id: id.clone(),
            pmem: pmem.clone(),
        };
        builder.attached.host_parts.push(Box::new(disk));
    }
    Ok(())
}
