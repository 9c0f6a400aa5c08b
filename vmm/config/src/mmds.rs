//! How a guest reads its metadata.

use std::net::Ipv4Addr;

use serde::{Deserialize, Serialize};

use super::{ConfigError, NetworkInterfaceConfig};

/// The default port of the host at which a guest reads its metadata over vsock.
const METADATA_PORT: u32 = 80;
/// No port (`VMADDR_PORT_ANY`).
const ANY: u32 = u32::MAX;
/// The default address of the metadata service.
const METADATA_ADDRESS: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);

/// Firecracker's `mmds-config`. Guests read their metadata over the network interfaces that are named, and over vsock.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MmdsConfig {
    /// The version of the protocol over network interfaces.
    #[serde(default)]
    pub version: MmdsVersion,
    /// The network interfaces at which the metadata service answers, by their ids. One at least, unless `vsock_port` is
    /// given.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub network_interfaces: Vec<String>,
    /// The address of the metadata service there: of the link alone (RFC 3927); 169.254.169.254 where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub ipv4_address: Option<Ipv4Addr>,
    /// Responds in the text format of IMDS, whatever the guest's request accepts.
    #[serde(default)]
    pub imds_compat: bool,
    /// The port of the host at which the guest reads its metadata over vsock, for which no token is needed; 80 where
    /// absent. Not in Firecracker.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock_port: Option<u32>,
}

/// The version of the protocol by which a guest reads its metadata.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub enum MmdsVersion {
    /// Requests need no token.
    #[default]
    V1,
    /// The guest has to get a token first. So a program of the guest that others can have fetch an address does not
    /// fetch them the metadata.
    V2,
}

impl MmdsConfig {
    /// Checks the fields, and that the interfaces that it names are among `interfaces`.
    pub(super) fn validate(
        &self,
        interfaces: &[NetworkInterfaceConfig],
    ) -> Result<(), ConfigError> {
        if self.network_interfaces.is_empty() && self.vsock_port.is_none() {
            let expected = "the ids of network interfaces, one at least unless vsock_port is given";
            let field = "mmds-config.network_interfaces";
            return Err(ConfigError::invalid(field, &"an empty list", expected));
        }
        let is_known = |id: &String| interfaces.iter().any(|interface| interface.iface_id == *id);
        if let Some(unknown) = self.network_interfaces.iter().find(|id| !is_known(id)) {
            return Err(ConfigError::invalid(
                "mmds-config.network_interfaces",
                &format_args!("{unknown:.80?}"),
                "the id of a network interface that is configured",
            ));
        }
        if let Some(address) = self.ipv4_address {
            // The first and the last 256 are reserved (RFC 3927, 2.1).
            let [_, _, third, _] = address.octets();
            if !address.is_link_local() || third == 0 || third == 255 {
                return Err(ConfigError::invalid(
                    "mmds-config.ipv4_address",
                    &address,
                    "an address of the link: 169.254.1.0 to 169.254.254.255",
                ));
            }
        }
        if self.vsock_port == Some(ANY) {
            let expected = "a port: 0 to 4294967294";
            return Err(ConfigError::invalid(
                "mmds-config.vsock_port",
                &ANY,
                expected,
            ));
        }
        Ok(())
    }

    /// The port of vsock that `config` sets, or the default.
    pub fn port_of(config: Option<&Self>) -> u32 {
        config
            .and_then(|config| config.vsock_port)
            .unwrap_or(METADATA_PORT)
    }

    /// The address of the metadata service on the links of its interfaces.
    pub fn address(&self) -> Ipv4Addr {
        self.ipv4_address.unwrap_or(METADATA_ADDRESS)
    }
}
