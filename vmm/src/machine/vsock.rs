//! The vsock device of a machine, and its socket.

use std::sync::{Arc, Mutex};

use devices::virtio::vsock::{VirtioVsock, VsockConfig as Device};

use super::{StartError, host, new_interrupt};
use crate::api::ApiSocket;
use crate::config::{MmdsConfig, VmConfig};
use crate::mmds::{Mmds, MmdsService};

/// What a vsock device finds on the host.
#[derive(Default)]
pub struct VsockHost {
    /// Its socket, where it was bound before.
    pub socket: Option<ApiSocket>,
    /// What the guest is told of itself.
    pub metadata: Arc<Mmds>,
}

/// The device, and the socket that goes with it.
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
        let service = MmdsService {
            metadata: surroundings.metadata,
            imds_compat: mmds.is_some_and(|mmds| mmds.imds_compat),
        };
        let device = Device {
            guest_cid: vsock.cid(),
            listener: socket.listener().map_err(host("vsock device"))?,
            path,
            service: (MmdsConfig::port_of(mmds), Arc::new(service)),
        };
        let device = VirtioVsock::new(device, new_interrupt("vsock device")?);
        Ok(Some(Self {
            device: Arc::new(Mutex::new(device.map_err(host("vsock device"))?)),
            socket,
        }))
    }
}
