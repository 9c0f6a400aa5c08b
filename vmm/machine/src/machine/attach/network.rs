//! The network interfaces of a machine.

use std::sync::{Arc, Mutex};

use devices::virtio::net::{NetConfig, NetLimits, Station, VirtioNet};

use super::builder::Builder;
use super::events::new_interrupt;
use crate::machine::error::{StartError, host};
use crate::station::GuestStation;
use config::{NetworkInterfaceConfig, RateLimiterConfig, VmConfig};

const NAME: &str = "network interface";

/// Adds them in their order, as a guest names them in that in which it finds them.
pub(super) fn attach(builder: &mut Builder<'_>, config: &VmConfig) -> Result<(), StartError> {
    for interface in &config.network_interfaces {
        let tap = builder.taps.take(interface)?;
        let device = NetConfig {
            link: Box::new(tap),
            mac: interface.mac().bytes(),
            mtu: interface.mtu,
            limits: limits(interface),
            station: station(interface),
        };
        let mut net = VirtioNet::new(device, new_interrupt(NAME)?).map_err(host(NAME))?;
        let lost_pages = builder.plan.lost_pages().clone();
        net.on_fault(Arc::new(move || lost_pages.request_failed()));
        builder.add_virtio(&interface.iface_id, Arc::new(Mutex::new(net)))?;
    }
    Ok(())
}

fn station(interface: &NetworkInterfaceConfig) -> Option<Box<dyn Station>> {
    let lease = interface.lease.clone()?;
    Some(Box::new(GuestStation::new(lease, interface.mtu)))
}

fn limits(interface: &NetworkInterfaceConfig) -> NetLimits {
    let of = |limiter: Option<RateLimiterConfig>| limiter.unwrap_or_default().limits();
    NetLimits {
        rx: of(interface.rx_rate_limiter),
        tx: of(interface.tx_rate_limiter),
    }
}
