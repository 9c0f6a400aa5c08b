//! The vsock device.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::error::check_path;
use super::{ConfigError, DeviceConfig, HostFile, MachineConfig};

/// The default context identifier of a guest: the first that is not reserved (VIRTIO 1.2, 5.10.4).
pub const FIRST_CID: u32 = 3;
/// No identifier (`VMADDR_CID_ANY`).
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
