//! The drives of a machine, and their disks.

use std::sync::{Arc, Mutex};

use devices::lock;
use devices::virtio::block::{BlockConfig, VirtioBlock};

use super::builder::{Builder, HostPart};
use super::events::new_interrupt;
use crate::disk::open_disk;
use crate::machine::error::{StartError, host};
use config::{DriveConfig, VmConfig};
use host::report::chain;

/// Long enough that a guest does not wait for a free entry with the engine's ring full.
const QUEUE_SIZE: u16 = 128;

/// The disk that a drive has when the machine ends.
struct DriveDisk {
    id: String,
    drive: Arc<Mutex<VirtioBlock>>,
}

impl HostPart for DriveDisk {
    fn close(&self) {
        if let Err(error) = lock(&self.drive).disk().close() {
            tracing::error!(drive = %self.id, error = %chain(&error), "the disk could not be closed cleanly");
        }
    }
}

/// Adds the root device first: a guest names its disks in the order in which it finds them.
pub(super) fn attach(builder: &mut Builder<'_>, config: &VmConfig) -> Result<(), StartError> {
    let root = config.drives.iter().filter(|drive| drive.is_root_device);
    let others = config.drives.iter().filter(|drive| !drive.is_root_device);
    for config in root.chain(others) {
        let mut block = new_block(config)?;
        block
            .update_limits(config.rate_limiter.unwrap_or_default().limits().into())
            .map_err(host("drive"))?;
        block.share(builder.plan.of_drive(config));
        let lost_pages = builder.plan.lost_pages().clone();
        block.on_fault(Arc::new(move || lost_pages.request_failed()));
        let drive = Arc::new(Mutex::new(block));
        builder.add_virtio(&config.drive_id, drive.clone())?;
        let id = config.drive_id.clone();
        let disk = Box::new(DriveDisk { id, drive });
        builder.attached.host_parts.push(disk);
    }
    Ok(())
}

fn new_block(config: &DriveConfig) -> Result<VirtioBlock, StartError> {
    let drive = &config.drive_id;
    let disk = open_disk(config).map_err(|source| StartError::Drive {
        drive: drive.clone(),
        source,
    })?;
    let device = BlockConfig {
        disk,
        serial: config.serial.clone().unwrap_or_else(|| drive.clone()),
        queues: config.num_queues,
        queue_size: QUEUE_SIZE,
        engine: config.io_engine.into(),
    };
    VirtioBlock::new(device, new_interrupt("drive")?).map_err(|source| StartError::Block {
        drive: drive.clone(),
        source,
    })
}
