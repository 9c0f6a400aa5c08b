//! Puts the devices of a machine together.
//!
//! Each module here adds the devices of one kind to a [`Builder`], with what is behind them on the host. [`VIRTIO`]
//! names them all: to add a kind of device to machines is to write its module, and a line there.

mod balloon;
mod builder;
mod clock;
mod drives;
mod entropy;
mod events;
mod generation;
mod legacy;
mod network;
mod pmem;
mod vsock;

use super::error::StartError;
use config::VmConfig;

pub(super) use balloon::ID as BALLOON;
pub(super) use builder::{Attached, Builder, HostPart, Pc, SerialEnds};
pub(super) use pmem::map as map_pmem;

/// Adds the devices of a kind that a configuration asks for, if it asks for any.
type Attach = fn(&mut Builder<'_>, &VmConfig) -> Result<(), StartError>;

/// The virtio devices, in the order in which the guest finds them.
const VIRTIO: [Attach; 6] = [
    drives::attach,
    pmem::attach,
    network::attach,
    entropy::attach,
    vsock::attach,
    // The last: one that nobody has asked for is left out where there is no interrupt line for it.
    balloon::attach,
];

/// Adds the virtio devices that `config` asks for, and the generation ID and the vmclock page, where the tables of the
/// guest say that they are. A guest that was booted by a version without a vmclock page has none in its tables.
pub(super) fn attach_configured(
    builder: &mut Builder<'_>,
    config: &VmConfig,
    has_clock: bool,
) -> Result<(), StartError> {
    for attach in VIRTIO {
        attach(builder, config)?;
    }
    if has_clock {
        clock::attach(builder)?;
    }
    generation::attach(builder)
}
