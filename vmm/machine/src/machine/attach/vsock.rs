//! The vsock device of a machine, and its socket.

use std::sync::{Arc, Mutex};

use devices::virtio::vsock::{VirtioVsock, VsockConfig as Device};

use super::builder::{Builder, HostPart};
use super::events::new_interrupt;
use crate::machine::error::{StartError, host};
use config::{MmdsConfig, VmConfig};
use host::socket::ApiSocket;

const NAME: &str = "vsock device";

/// Its file goes with it, when it is dropped.
impl HostPart for ApiSocket {
    fn close(&self) {}
}

pub(super) fn attach(builder: &mut Builder<'_>, config: &VmConfig) -> Result<(), StartError> {
    let Some(vsock) = &config.vsock else {
        return Ok(());
    };
    let host_side = std::mem::take(&mut builder.vsock);
    let path = vsock.path();
    let bound = host_side.socket.filter(|socket| socket.path() == path);
    let socket = match bound {
        Some(socket) => socket,
        None => ApiSocket::bind(path)?,
    };
    let port = MmdsConfig::port_of(config.mmds_config.as_ref());
    let device = Device {
        guest_cid: vsock.cid(),
        listener: socket.listener().map_err(host(NAME))?,
        path,
        service: host_side.metadata.map(|service| (port, service)),
    };
    let device = VirtioVsock::new(device, new_interrupt(NAME)?).map_err(host(NAME))?;
    builder.add_virtio("vsock", Arc::new(Mutex::new(device)))?;
    builder.attached.host_parts.push(Box::new(socket));
    builder.attached.connects = true;
    Ok(())
}
