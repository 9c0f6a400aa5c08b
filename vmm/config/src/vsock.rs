//! Sockets between the guest and its host, and what the guest is told there.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::ConfigError;
use super::error::check_path;

/// The guest's context identifier where none is given: the first that is not reserved (VIRTIO 1.2, 5.10.4).
pub const FIRST_CID: u32 = 3;
/// The port of the host at which a guest finds its metadata, where none is given.
const METADATA_PORT: u32 = 80;
/// No port and no identifier (`VMADDR_PORT_ANY`, `VMADDR_CID_ANY`).
const ANY: u32 = u32::MAX;
/// Longest path of the socket: that of port 4294967294 has 11 characters more, and 107 at most (unix(7)).
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
    /// `uds_path_N`. The daemon has it in the guest's folder; else it has to be given.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub uds_path: Option<PathBuf>,
}

impl VsockConfig {
    /// A device of this socket.
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

    pub(super) fn validate(&self) -> Result<(), ConfigError> {
        let cid = self.cid();
        if cid < FIRST_CID || cid == ANY {
            let expected = "3 to 4294967294: the others are reserved";
            return Err(ConfigError::invalid("vsock.guest_cid", &cid, expected));
        }
        self.uds_path.as_ref().map_or(Ok(()), |_| self.check_path())
    }

    /// Checks that there is a path for the socket, which only the daemon finds by itself.
    ///
    /// # Errors
    /// `Invalid`.
    pub fn check_path(&self) -> Result<(), ConfigError> {
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

/// Firecracker's `mmds-config`; but the guest asks for its metadata over vsock, as it has no network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MmdsConfig {
    /// How the guest asks.
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
    /// Answers in the text format of IMDS, whatever the guest says that it accepts.
    #[serde(default)]
    pub imds_compat: bool,
    /// The port of the host at which the guest finds it. Not in Firecracker.
    #[serde(default = "metadata_port")]
    pub vsock_port: u32,
}

const fn metadata_port() -> u32 {
    METADATA_PORT
}

/// How a guest asks for its metadata.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub enum MmdsVersion {
    /// It asks.
    #[default]
    V1,
    /// Not supported: it gets a token first. That keeps others from having a guest's programs ask for them over its
    /// network, which nobody can here.
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

    /// The port of a guest that nothing was configured for, or that of `config`.
    pub fn port_of(config: Option<&Self>) -> u32 {
        config.map_or(METADATA_PORT, |config| config.vsock_port)
    }
}
