//! Network interfaces.

use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;

use devices::virtio::net::is_interface_name;
use ipnet::{Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};

use super::error::check_id;
use super::{ConfigError, DeviceConfig, MachineConfig, RateLimiterConfig};
use crate::limits::MAX_VCPUS;
use crate::mac::MacAddress;
use crate::published::Published;

/// The MTU that a guest can be given: the least of IPv4 (RFC 791), and what VIRTIO 1.2, 5.1.4.2 has room for.
const MTU: std::ops::RangeInclusive<u16> = 68..=u16::MAX;
/// What a name begins with that stands for descriptors which the process has inherited.
const DESCRIPTORS: &str = "fd:";
/// Labels of a host name, and all of it, are at most so long (RFC 1035, 2.3.4).
const HOST_NAME_MAX: usize = 63;
/// Servers of names that a guest can be given: more are of no use to its resolver (resolv.conf(5)).
const DNS_MAX: usize = 3;

/// Firecracker's network interface, with additional fields.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NetworkInterfaceConfig {
    /// Name of the interface: 1 to 64 letters, digits and underscores.
    pub iface_id: String,
    /// The tap of the host. A guest of the daemon can have `network` instead.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_dev_name: Option<String>,
    /// The address that the guest is given; one that is made up where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest_mac: Option<MacAddress>,
    /// The MTU that the guest is given, in bytes; its own choice where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 68)]
    pub mtu: Option<u16>,
    /// Limits what the guest receives.
    #[serde(
        default,
        skip_serializing_if = "Option::is_none",
        deserialize_with = "crate::object::optional"
    )]
    pub rx_rate_limiter: Option<RateLimiterConfig>,
    /// Limits what the guest sends.
    #[serde(
        default,
        skip_serializing_if = "Option::is_none",
        deserialize_with = "crate::object::optional"
    )]
    pub tx_rate_limiter: Option<RateLimiterConfig>,
    /// Number of pairs of queues, 1 to 32; 1 where absent. Not in Firecracker.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, maximum = 32)]
    pub num_queue_pairs: Option<u16>,
    /// The network of the daemon that it is in. Not in Firecracker.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<String>,
    /// Ports of the host that lead to the guest, as `[ADDRESS:]PORT:GUEST-PORT[/tcp|/udp]`; with `network` alone. Not
    /// in Firecracker.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schema(value_type = Vec<String>)]
    pub publish: Vec<Published>,
    /// What a DHCP client and IPv6's autoconfiguration of the guest get; no answer where absent. Not in Firecracker.
    #[serde(
        default,
        skip_serializing_if = "Option::is_none",
        deserialize_with = "crate::object::optional"
    )]
    pub lease: Option<LeaseConfig>,
}

/// What a guest is given by DHCP and by router advertisements, which its own process answers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct LeaseConfig {
    /// The IPv4 address of the guest and the length of its network's prefix, as 10.0.0.2/24.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub ipv4: Option<Ipv4Net>,
    /// The IPv4 address of its router.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub gateway: Option<Ipv4Addr>,
    /// The IPv6 network that the guest alone takes its addresses of (RFC 8273), as `fd00:0:0:2::/64`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub ipv6: Option<Ipv6Net>,
    /// Servers of names, 3 at most.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schema(value_type = Vec<String>)]
    pub dns: Vec<IpAddr>,
    /// The name of the guest: 1 to 63 letters, digits and dashes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_name: Option<String>,
    /// The router's MAC address: its process answers for the router, and for all other addresses of the network, so
    /// that the host need not. Where absent the host answers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateway_mac: Option<MacAddress>,
}

/// The fields of a network interface that can change while its guest runs.
#[derive(Clone, Debug, PartialEq, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NetworkInterfaceUpdate {
    /// The interface.
    pub iface_id: String,
    /// The new limits of what the guest receives.
    #[serde(default, deserialize_with = "crate::object::optional")]
    pub rx_rate_limiter: Option<RateLimiterConfig>,
    /// The new limits of what the guest sends.
    #[serde(default, deserialize_with = "crate::object::optional")]
    pub tx_rate_limiter: Option<RateLimiterConfig>,
}

impl NetworkInterfaceUpdate {
    /// `interface` with this update.
    pub fn applied_to(&self, interface: &NetworkInterfaceConfig) -> NetworkInterfaceConfig {
        let limits =
            |update: Option<RateLimiterConfig>, present: Option<RateLimiterConfig>| match update {
                Some(update) => update.applied_to(present),
                None => present,
            };
        NetworkInterfaceConfig {
            rx_rate_limiter: limits(self.rx_rate_limiter, interface.rx_rate_limiter),
            tx_rate_limiter: limits(self.tx_rate_limiter, interface.tx_rate_limiter),
            ..interface.clone()
        }
    }
}

impl NetworkInterfaceConfig {
    /// How many pairs of queues it has.
    pub fn pairs(&self) -> u16 {
        self.num_queue_pairs.unwrap_or(1)
    }

    /// The descriptors that its tap is, which the process that runs the guest has inherited: `fd:N`, and `:N` again for
    /// each further pair of queues. `None` where it is named.
    pub fn descriptors(&self) -> Option<Vec<i32>> {
        let numbers = self.host_dev_name.as_deref()?.strip_prefix(DESCRIPTORS)?;
        let number = |text: &str| text.parse().ok().filter(|number| *number > 2);
        numbers.split(':').map(number).collect()
    }

    /// An address that is always the same for an interface of this name on this tap; for one that none was given.
    pub fn mac(&self) -> MacAddress {
        self.guest_mac.unwrap_or_else(|| {
            // FNV-1a, which never changes.
            let of = |hash: u64, text: &str| {
                text.bytes().fold(hash, |hash, byte| {
                    (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
                })
            };
            let tap = self.host_dev_name.as_deref().unwrap_or_default();
            let hash = of(of(0xcbf2_9ce4_8422_2325, &self.iface_id), tap).to_be_bytes();
            let [last @ .., _, _, _] = hash;
            MacAddress::local(last)
        })
    }
}

impl LeaseConfig {
    fn validate(&self) -> Result<(), ConfigError> {
        if let Some(ipv4) = self.ipv4 {
            let address = ipv4.addr();
            let is_hosts = !address.is_multicast()
                && !address.is_broadcast()
                && !address.is_unspecified()
                && !address.is_loopback()
                && (ipv4.prefix_len() > 30
                    || (address != ipv4.network() && address != ipv4.broadcast()));
            if !is_hosts || ipv4.prefix_len() == 0 {
                let expected = "the address of a host, with the length of its network's prefix";
                return Err(ConfigError::invalid(
                    "network-interfaces.lease.ipv4",
                    &ipv4,
                    expected,
                ));
            }
            if self.gateway == Some(address) {
                let expected = "another address than the guest's";
                return Err(ConfigError::invalid(
                    "network-interfaces.lease.gateway",
                    &address,
                    expected,
                ));
            }
        }
        if let Some(ipv6) = self.ipv6
            && (ipv6.prefix_len() != 64
                || ipv6.addr() != ipv6.network()
                || ipv6.addr().is_multicast()
                || ipv6.addr().is_unspecified()
                || ipv6.addr().is_unicast_link_local())
        {
            let expected = "a network of unicast addresses with a prefix of 64 bits";
            return Err(ConfigError::invalid(
                "network-interfaces.lease.ipv6",
                &ipv6,
                expected,
            ));
        }
        if self.dns.len() > DNS_MAX {
            let expected = format!("{DNS_MAX} servers at most");
            return Err(ConfigError::invalid(
                "network-interfaces.lease.dns",
                &self.dns.len(),
                expected,
            ));
        }
        if let Some(name) = &self.host_name
            && !is_host_name(name)
        {
            return Err(ConfigError::invalid(
                "network-interfaces.lease.host_name",
                &format_args!("{name:.80?}"),
                format!("1 to {HOST_NAME_MAX} letters, digits and dashes"),
            ));
        }
        Ok(())
    }
}

/// Whether a text can be a label of a host's name (RFC 952, 1123).
fn is_host_name(name: &str) -> bool {
    (1..=HOST_NAME_MAX).contains(&name.len())
        && name.bytes().all(|c| c == b'-' || c.is_ascii_alphanumeric())
        && !name.starts_with('-')
        && !name.ends_with('-')
}

impl DeviceConfig for NetworkInterfaceConfig {
    fn field(&self) -> &'static str {
        "network-interfaces"
    }

    fn id(&self) -> Option<&str> {
        Some(&self.iface_id)
    }

    fn validate(&self, _: &MachineConfig) -> Result<(), ConfigError> {
        check_id("network-interfaces.iface_id", &self.iface_id)?;
        let field = "network-interfaces.host_dev_name";
        match (&self.host_dev_name, &self.network) {
            (None, None) => {
                return Err(ConfigError::invalid(field, &"none", "the name of a tap"));
            }
            (Some(name), _) if self.descriptors().is_none() && !is_interface_name(name) => {
                return Err(ConfigError::invalid(
                    field,
                    &format_args!("{name:.80?}"),
                    "the name of a network interface: 1 to 15 bytes without /, : and spaces",
                ));
            }
            (Some(_), Some(network)) => {
                return Err(ConfigError::invalid(
                    "network-interfaces.network",
                    &format_args!("{network:.80?}"),
                    "left out beside host_dev_name: an interface has a tap of its own, or is in a network",
                ));
            }
            (_, Some(network)) if !crate::is_guest_id(network) => {
                return Err(ConfigError::invalid(
                    "network-interfaces.network",
                    &format_args!("{network:.80?}"),
                    "the name of a network: 1 to 63 lower case letters, digits and dashes",
                ));
            }
            _ => {}
        }
        if let (None, Some(port)) = (&self.network, self.publish.first()) {
            return Err(ConfigError::invalid(
                "network-interfaces.publish",
                port,
                "left out where the interface is in no network of the daemon",
            ));
        }
        if let Some(mtu) = self.mtu
            && !MTU.contains(&mtu)
        {
            let expected = format!("{} to {}", MTU.start(), MTU.end());
            return Err(ConfigError::invalid(
                "network-interfaces.mtu",
                &mtu,
                expected,
            ));
        }
        let pairs = self.pairs();
        if !(1..=u16::from(MAX_VCPUS)).contains(&pairs) {
            let expected = format!("1 to {MAX_VCPUS}");
            return Err(ConfigError::invalid(
                "network-interfaces.num_queue_pairs",
                &pairs,
                expected,
            ));
        }
        if self.network.is_some() && pairs != 1 {
            return Err(ConfigError::invalid(
                "network-interfaces.num_queue_pairs",
                &pairs,
                "1, as the interface is in a network",
            ));
        }
        if let Some(descriptors) = self.descriptors()
            && descriptors.len() != usize::from(pairs)
        {
            let expected = format!("a descriptor for each of {pairs} pairs of queues");
            let found = self.host_dev_name.as_deref().unwrap_or_default();
            return Err(ConfigError::invalid(field, &found, expected));
        }
        self.lease.as_ref().map_or(Ok(()), LeaseConfig::validate)
    }

    fn check_files(&self) -> Result<(), ConfigError> {
        let Some(name) = &self.host_dev_name else {
            return Ok(());
        };
        let path = Path::new("/sys/class/net").join(name);
        if self.descriptors().is_some() || path.exists() || !Path::new("/sys/class/net").exists() {
            return Ok(());
        }
        Err(ConfigError::invalid(
            "network-interfaces.host_dev_name",
            name,
            format!("a tap of this host: `ip tuntap add dev {name} mode tap` makes it"),
        ))
    }
}

/// Checks that no two interfaces of a guest have an address or a tap in common.
pub(crate) fn check_distinct(interfaces: &[NetworkInterfaceConfig]) -> Result<(), ConfigError> {
    for (index, interface) in interfaces.iter().enumerate() {
        let others = || interfaces.iter().take(index);
        if let Some(mac) = interface.guest_mac
            && others().any(|other| other.guest_mac == Some(mac))
        {
            let expected = "an address of its own: another interface has it";
            return Err(ConfigError::invalid(
                "network-interfaces.guest_mac",
                &mac,
                expected,
            ));
        }
        if let Some(tap) = &interface.host_dev_name
            && others().any(|other| other.host_dev_name.as_ref() == Some(tap))
        {
            let expected = "a tap of its own: another interface has it";
            return Err(ConfigError::invalid(
                "network-interfaces.host_dev_name",
                tap,
                expected,
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn interface(fields: &serde_json::Value) -> Result<NetworkInterfaceConfig, String> {
        let mut all = json!({"iface_id": "eth0", "host_dev_name": "tap0"});
        all.as_object_mut()
            .unwrap()
            .extend(fields.as_object().unwrap().clone());
        let interface: NetworkInterfaceConfig =
            serde_json::from_value(all).map_err(|error| error.to_string())?;
        interface
            .validate(&MachineConfig::default())
            .map_err(|error| error.to_string())?;
        Ok(interface)
    }

    #[test]
    fn what_firecrackers_clients_send_is_taken() {
        let sent = interface(&json!({
            "guest_mac": "06:00:AC:10:00:02", "mtu": 1400,
            "rx_rate_limiter": {"bandwidth": {"size": 1000, "refill_time": 100}, "ops": null},
            "tx_rate_limiter": null,
        }));
        let sent = sent.unwrap();
        assert_eq!(sent.mac().to_string(), "06:00:ac:10:00:02");
        let again = serde_json::to_value(&sent).unwrap();
        assert_eq!(
            serde_json::from_value::<NetworkInterfaceConfig>(again).unwrap(),
            sent
        );
    }

    #[test]
    fn each_wrong_value_is_refused_and_its_field_named() {
        for (fields, named) in [
            (json!({"iface_id": ""}), "iface_id"),
            (json!({"host_dev_name": null}), "host_dev_name"),
            (json!({"host_dev_name": ""}), "host_dev_name"),
            (
                json!({"host_dev_name": "sixteen-letters0"}),
                "host_dev_name",
            ),
            (json!({"host_dev_name": "a/b"}), "host_dev_name"),
            (json!({"host_dev_name": "fd:2"}), "host_dev_name"),
            (json!({"host_dev_name": "fd:3:4"}), "host_dev_name"),
            (json!({"host_dev_name": null, "network": "No"}), "network"),
            (json!({"network": "lan"}), "network"),
            (
                json!({"host_dev_name": null, "network": "lan", "num_queue_pairs": 2}),
                "num_queue_pairs",
            ),
            (json!({"publish": ["8080:80"]}), "publish"),
            (
                json!({"host_dev_name": null, "network": "lan", "publish": ["80"]}),
                "published port",
            ),
            (
                json!({"guest_mac": "01:00:5e:00:00:01"}),
                "01:00:5e:00:00:01",
            ),
            (json!({"mtu": 67}), "mtu"),
            (json!({"mtu": 70000}), "70000"),
            (json!({"num_queue_pairs": 0}), "num_queue_pairs"),
            (json!({"num_queue_pairs": 33}), "num_queue_pairs"),
            (json!({"lease": {"ipv4": "10.0.0.0/24"}}), "lease.ipv4"),
            (json!({"lease": {"ipv4": "224.0.0.1/24"}}), "lease.ipv4"),
            (
                json!({"lease": {"ipv4": "10.0.0.2/24", "gateway": "10.0.0.2"}}),
                "lease.gateway",
            ),
            (json!({"lease": {"ipv6": "ff02::/64"}}), "lease.ipv6"),
            (json!({"lease": {"ipv6": "fd00::/56"}}), "lease.ipv6"),
            (json!({"lease": {"ipv6": "fd00::1/64"}}), "lease.ipv6"),
            (json!({"lease": {"ipv6": "fe80::/64"}}), "lease.ipv6"),
            (json!({"lease": {"host_name": "a.b"}}), "lease.host_name"),
            (
                json!({"lease": {"dns": ["1.1.1.1", "1.1.1.2", "1.1.1.3", "::1"]}}),
                "lease.dns",
            ),
        ] {
            let error = interface(&fields).unwrap_err();
            assert!(error.contains(named), "{fields}: {error}");
        }
    }

    #[test]
    fn an_address_is_made_up_where_none_is_given_and_stays_the_same() {
        let first = interface(&json!({})).unwrap();
        assert_eq!(first.mac(), interface(&json!({})).unwrap().mac());
        assert_ne!(
            first.mac(),
            interface(&json!({"iface_id": "eth1"})).unwrap().mac()
        );
        assert_ne!(
            first.mac(),
            interface(&json!({"host_dev_name": "tap1"})).unwrap().mac()
        );
    }

    #[test]
    fn two_interfaces_have_no_address_and_no_tap_in_common() {
        let one = interface(&json!({"guest_mac": "06:00:ac:10:00:02"})).unwrap();
        let two = |fields| {
            let mut all = json!({"iface_id": "eth1", "host_dev_name": "tap1"});
            all.as_object_mut()
                .unwrap()
                .extend(serde_json::Value::as_object(&fields).unwrap().clone());
            check_distinct(&[one.clone(), interface(&all).unwrap()])
        };
        two(json!({})).unwrap();
        let error = two(json!({"guest_mac": "06:00:ac:10:00:02"}))
            .unwrap_err()
            .to_string();
        assert!(error.contains("guest_mac"), "{error}");
        let error = two(json!({"host_dev_name": "tap0"}))
            .unwrap_err()
            .to_string();
        assert!(error.contains("host_dev_name"), "{error}");
    }

    #[test]
    fn descriptors_are_numbers_beyond_the_standard_ones() {
        let of = |name: &str, pairs: u16| {
            interface(&json!({"host_dev_name": name, "num_queue_pairs": pairs}))
                .map(|found| found.descriptors())
        };
        assert_eq!(of("fd:3", 1).unwrap(), Some(vec![3]));
        assert_eq!(of("fd:3:9", 2).unwrap(), Some(vec![3, 9]));
        assert_eq!(of("tap0", 1).unwrap(), None);
        of("fd:", 1).unwrap_err();
        of("fd:x", 1).unwrap_err();
    }
}
