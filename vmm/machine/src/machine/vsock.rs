//! The vsock device of a machine, and its socket.

use std::sync::{Arc, Mutex};

use devices::virtio::vsock::{Service, VirtioVsock, VsockConfig as Device};

use super::error::{StartError, host};
use super::events::new_interrupt;
use config::{MmdsConfig, VmConfig};
use host::socket::ApiSocket;

/// What the host has for a vsock device.
#[derive(Default)]
pub struct VsockHost {
    /// The device's socket, where it is bound already.
    pub socket: Option<ApiSocket>,
    /// The service at the port of `mmds-config`; nothing answers there where it is absent.
    pub metadata: Option<Arc<dyn Service>>,
}

/// The device, and the socket on the host that leads to it.
pub(super) struct Vsock {
    pub(super) device: Arc<Mutex<VirtioVsock>>,
    pub(super) socket: ApiSocket,
}

impl Vsock {
    /// The device that `config` asks for, if it does.
    pub(super) fn new(
        config: &VmConfig,
        surroundings: VsockHost,
    ) -> Result<Option<Self>, StartError> {
        let Some(vsock) = &config.vsock else {
            return Ok(None);
        };
        let path = vsock.path();
        let bound = surroundings.socket.filter(|socket| socket.path() == path);
        let socket = match bound {
            Some(socket) => socket,
            None => ApiSocket::bind(path)?,
        };
        let mmds = config.mmds_config.as_ref();
        let port = MmdsConfig::port_of(mmds);
        let device = Device {
            guest_cid: vsock.cid(),
            listener: socket.listener().map_err(host("vsock device"))?,
            path,
            service: surroundings.metadata.map(|service| (port, service)),
        };
        let device = VirtioVsock::new(device, new_interrupt("vsock device")?);
        Ok(Some(Self {
            device: Arc::new(Mutex::new(device.map_err(host("vsock device"))?)),
            socket,
        }))
    }
}
