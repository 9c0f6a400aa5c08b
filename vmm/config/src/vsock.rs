//! The vsock device, and the guest's metadata, which it reads over vsock.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::error::check_path;
use super::{ConfigError, DeviceConfig, HostFile, MachineConfig};

/// The default context identifier of a guest: the first that is not reserved (VIRTIO 1.2, 5.10.4).
pub const FIRST_CID: u32 = 3;
/// The default port of the host at which a guest reads its metadata.
const METADATA_PORT: u32 = 80;
/// No port and no identifier (`VMADDR_PORT_ANY`, `VMADDR_CID_ANY`).
const ANY: u32 = u32::MAX;
/// The longest path of the socket: a path may have 107 bytes (unix(7)), and that of port 4294967294 is 11 bytes longer
/// than the socket's.
const LONGEST_PATH: usize = 96;

/// Firecracker's `vsock`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VsockConfig {
    /// Not used: the older name of the device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock_id: Option<String>,
    /// The guest's context identifier, 3 or more; 3 where absent, or, for a guest of the daemon, one that no other has.
    #[serde(default)]
    #[schema(minimum = 3)]
    pub guest_cid: Option<u32>,
    /// The Unix socket that programs of the host connect to. For port N of the host, the guest is connected to
    /// `uds_path_N`. For a guest of the daemon it is in the guest's folder; otherwise it is required.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub uds_path: Option<PathBuf>,
}

impl VsockConfig {
    /// A device with this socket.
    pub fn new(guest_cid: Option<u32>, uds_path: impl Into<PathBuf>) -> Self {
        Self {
            vsock_id: None,
            guest_cid,
            uds_path: Some(uds_path.into()),
        }
    }

    /// The guest's context identifier.
    pub fn cid(&self) -> u32 {
        self.guest_cid.unwrap_or(FIRST_CID)
    }

    /// The socket; an empty path where it is not given.
    pub fn path(&self) -> &Path {
        self.uds_path.as_deref().unwrap_or(Path::new(""))
    }

    /// Checks that there is a path for the socket, which only the daemon chooses itself.
    fn check_path(&self) -> Result<(), ConfigError> {
        let path = self.path();
        check_path("vsock.uds_path", path)?;
        if path.as_os_str().len() > LONGEST_PATH {
            return Err(ConfigError::invalid(
                "vsock.uds_path",
                &path.display(),
                "a path of 96 bytes or less, as those of the guest's ports are longer",
            ));
        }
        Ok(())
    }
}

impl DeviceConfig for VsockConfig {
    fn field(&self) -> &'static str {
        "vsock"
    }

    fn validate(&self, _: &MachineConfig) -> Result<(), ConfigError> {
        let cid = self.cid();
        if cid < FIRST_CID || cid == ANY {
            let expected = "3 to 4294967294: the others are reserved";
            return Err(ConfigError::invalid("vsock.guest_cid", &cid, expected));
        }
        self.uds_path.as_ref().map_or(Ok(()), |_| self.check_path())
    }

    fn check_files(&self) -> Result<(), ConfigError> {
        self.check_path()
    }

    fn host_files(&self) -> Vec<HostFile<'_>> {
        vec![HostFile::PortSockets(self.path())]
    }

    fn paths_mut(&mut self) -> Vec<&mut PathBuf> {
        self.uds_path.iter_mut().collect()
    }
}

/// Firecracker's `mmds-config`. Guests read their metadata over vsock, as they have no network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MmdsConfig {
    /// The version of the protocol.
    #[serde(default)]
    pub version: MmdsVersion,
    /// Not supported: refused unless empty, as guests have no network.
    #[serde(default, skip_serializing)]
    #[schema(ignore)]
    pub network_interfaces: Vec<String>,
    /// Not supported: refused where given.
    #[serde(default, skip_serializing)]
    #[schema(ignore)]
    pub ipv4_address: Option<String>,
    /// Responds in the text format of IMDS, whatever the guest's request accepts.
    #[serde(default)]
    pub imds_compat: bool,
    /// The port of the host at which the guest reads its metadata. Not in Firecracker.
    #[serde(default = "metadata_port")]
    pub vsock_port: u32,
}

const fn metadata_port() -> u32 {
    METADATA_PORT
}

/// The version of the protocol by which a guest reads its metadata.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub enum MmdsVersion {
    /// Requests need no token.
    #[default]
    V1,
    /// Not supported: the guest has to get a token first. Tokens keep others from using a program of the guest to read
    /// the metadata over the guest's network, which is impossible without a network.
    V2,
}

impl MmdsConfig {
    pub(super) fn validate(&self) -> Result<(), ConfigError> {
        let unsupported = |field| Err(ConfigError::Unsupported { field });
        if self.version == MmdsVersion::V2 {
            return Err(ConfigError::invalid(
                "mmds-config.version",
                &"V2",
                "V1: session tokens guard against requests from a network, and the guest asks over vsock",
            ));
        }
        if !self.network_interfaces.is_empty() {
            return unsupported("mmds-config.network_interfaces");
        }
        if self.ipv4_address.is_some() {
            return unsupported("mmds-config.ipv4_address");
        }
        if self.vsock_port == ANY {
            let expected = "a port: 0 to 4294967294";
            return Err(ConfigError::invalid(
                "mmds-config.vsock_port",
                &self.vsock_port,
                expected,
            ));
        }
        Ok(())
    }

    /// The port that `config` sets, or the default.
    pub fn port_of(config: Option<&Self>) -> u32 {
        config.map_or(METADATA_PORT, |config| config.vsock_port)
    }
}
