//! The network interfaces of a machine.

use std::sync::{Arc, Mutex};

use devices::service::Service;
use devices::virtio::net::{NetConfig, NetLimits, Station, VirtioNet};

use super::builder::Builder;
use super::events::new_interrupt;
use crate::machine::error::{StartError, host};
use crate::station::GuestStation;
use config::{MmdsConfig, NetworkInterfaceConfig, RateLimiterConfig, VmConfig};

const NAME: &str = "network interface";

/// Adds them in their order, as a guest names them in that in which it finds them.
pub(super) fn attach(builder: &mut Builder<'_>, config: &VmConfig) -> Result<(), StartError> {
    for interface in &config.network_interfaces {
        let tap = builder.network.taps.take(interface)?;
        let device = NetConfig {
            link: Box::new(tap),
            mac: interface.mac().bytes(),
            mtu: interface.mtu,
            limits: limits(interface),
            station: station(interface, config, builder.network.metadata.as_ref()),
        };
        let mut net = VirtioNet::new(device, new_interrupt(NAME)?).map_err(host(NAME))?;
        let lost_pages = builder.plan.lost_pages().clone();
        net.on_fault(Arc::new(move || lost_pages.request_failed()));
        builder.add_virtio(&interface.iface_id, Arc::new(Mutex::new(net)))?;
    }
    Ok(())
}

/// The guest's neighbour on the link, where it has something to say.
fn station(
    interface: &NetworkInterfaceConfig,
    config: &VmConfig,
    metadata: Option<&Arc<dyn Service>>,
) -> Option<Box<dyn Station>> {
    let mmds = config.mmds_config.as_ref();
    let is_listed = |mmds: &&MmdsConfig| mmds.network_interfaces.contains(&interface.iface_id);
    let address = mmds.filter(is_listed).map(MmdsConfig::address);
    let metadata = address.zip(metadata.cloned());
    if interface.lease.is_none() && metadata.is_none() {
        return None;
    }
    let lease = interface.lease.clone().unwrap_or_default();
    Some(Box::new(GuestStation::new(lease, interface.mtu, metadata)))
}

fn limits(interface: &NetworkInterfaceConfig) -> NetLimits {
    let of = |limiter: Option<RateLimiterConfig>| limiter.unwrap_or_default().limits();
    NetLimits {
        rx: of(interface.rx_rate_limiter),
        tx: of(interface.tx_rate_limiter),
    }
}
