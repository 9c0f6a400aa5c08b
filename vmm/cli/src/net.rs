//! `--net tap=NAME|fd=N|network=NAME[,option...]`.

use std::net::IpAddr;
use std::str::FromStr;

use super::disk::split;
use super::rate::limiter;
use config::{Bytes, LeaseConfig, MacAddressError, NetworkInterfaceConfig, PublishedError};

/// The value of `--net`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetArgument {
    interface: NetworkInterfaceConfig,
}

/// Why a text is not the description of a network interface.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum NetError {
    /// It names no tap.
    #[error(
        "names no tap: write tap=NAME or fd=N in front of the other options; a guest of the daemon can have network=NAME"
    )]
    NoTap,
    /// An option is unknown.
    #[error(
        "{0:?} is not an option of a network interface: tap=NAME, fd=N[:N...], network=NAME, publish=[IP:]PORT:GUEST-PORT[/udp], id=ID, mac=MAC, mtu=N, rate=SIZE, ops=N, queues=N, ip=ADDRESS/LENGTH, gw=ADDRESS, dns=ADDRESS, host=NAME"
    )]
    UnknownOption(String),
    /// An option is given twice.
    #[error("{0} is given twice")]
    Twice(String),
    /// An option has a value that it cannot have.
    #[error("{option}={value} is not {option}={expected}")]
    Value {
        /// The option.
        option: String,
        /// Its value.
        value: String,
        /// The values that it may have.
        expected: &'static str,
    },
    /// The address is none.
    #[error("mac")]
    Mac(#[source] MacAddressError),
    /// The port is none.
    #[error("publish")]
    Publish(#[source] PublishedError),
}

/// Sets an option that is given once.
fn set<T>(option: &str, slot: &mut Option<T>, value: T) -> Result<(), NetError> {
    match slot.replace(value) {
        None => Ok(()),
        Some(_) => Err(NetError::Twice(option.to_owned())),
    }
}

fn parse<T: FromStr>(option: &str, value: &str, expected: &'static str) -> Result<T, NetError> {
    value.parse().map_err(|_| NetError::Value {
        option: option.to_owned(),
        value: value.to_owned(),
        expected,
    })
}

impl FromStr for NetArgument {
    type Err = NetError;

    fn from_str(text: &str) -> Result<Self, NetError> {
        let mut interface = NetworkInterfaceConfig::default();
        let (mut id, mut bandwidth, mut ops) = (None, None, None);
        let mut lease = LeaseConfig::default();
        for part in split(text) {
            let Some((option, value)) = part.split_once('=').filter(|(_, value)| !value.is_empty())
            else {
                return Err(NetError::UnknownOption(part));
            };
            match option {
                "tap" => set("the tap", &mut interface.host_dev_name, value.to_owned())?,
                "fd" => {
                    let name = format!("fd:{value}");
                    set("the tap", &mut interface.host_dev_name, name)?;
                }
                "network" => set("the network", &mut interface.network, value.to_owned())?,
                "publish" => interface
                    .publish
                    .push(value.parse().map_err(NetError::Publish)?),
                "id" => set(option, &mut id, value.to_owned())?,
                "mac" => {
                    let mac = value.parse().map_err(NetError::Mac)?;
                    set(option, &mut interface.guest_mac, mac)?;
                }
                "mtu" => set(
                    option,
                    &mut interface.mtu,
                    parse(option, value, "BYTES, 68 to 65535")?,
                )?,
                "queues" => {
                    let pairs = parse(option, value, "NUMBER, 1 to 32")?;
                    set(option, &mut interface.num_queue_pairs, pairs)?;
                }
                "rate" => {
                    let Bytes(rate) = parse(option, value, "BYTES a second, as 10M")?;
                    set(option, &mut bandwidth, rate)?;
                }
                "ops" => {
                    set(option, &mut ops, parse(option, value, "FRAMES a second")?)?;
                }
                "ip" if value.contains(':') => {
                    set(
                        "ip",
                        &mut lease.ipv6,
                        parse(option, value, "ADDRESS/LENGTH")?,
                    )?;
                }
                "ip" => set(
                    "ip",
                    &mut lease.ipv4,
                    parse(option, value, "ADDRESS/LENGTH")?,
                )?,
                "gw" => set(
                    option,
                    &mut lease.gateway,
                    parse(option, value, "an IPv4 address")?,
                )?,
                "dns" => lease
                    .dns
                    .push(parse::<IpAddr>(option, value, "an IP address")?),
                "host" => set(option, &mut lease.host_name, value.to_owned())?,
                _ => return Err(NetError::UnknownOption(part)),
            }
        }
        if interface.host_dev_name.is_none() && interface.network.is_none() {
            return Err(NetError::NoTap);
        }
        let limiter = limiter(bandwidth, ops);
        interface.rx_rate_limiter = limiter;
        interface.tx_rate_limiter = limiter;
        interface.lease = Some(lease).filter(|lease| *lease != LeaseConfig::default());
        interface.iface_id = id.unwrap_or_default();
        Ok(Self { interface })
    }
}

impl NetArgument {
    /// The interface, with a name that is not `taken` where none was given: eth0, eth1 and so on.
    pub(super) fn into_interface(self, taken: impl Fn(&str) -> bool) -> NetworkInterfaceConfig {
        let mut interface = self.interface;
        if interface.iface_id.is_empty() {
            let names = (0..).map(|number: u32| format!("eth{number}"));
            interface.iface_id = names
                .into_iter()
                .find(|name| !taken(name))
                .unwrap_or_default();
        }
        interface
    }
}

#[cfg(test)]
mod tests {
    use config::TokenBucketConfig;

    use super::*;

    fn parse(text: &str) -> Result<NetArgument, NetError> {
        text.parse()
    }

    #[test]
    fn an_interface_is_described_by_its_tap_and_options() {
        let all = "tap=t0,id=lan,mac=06:00:00:00:00:01,mtu=1400,rate=1M,ops=500,queues=2,\
                   ip=10.0.0.2/24,gw=10.0.0.1,dns=10.0.0.1,dns=fd00::1,ip=fd00:0:0:2::/64,host=web";
        let interface = parse(all).unwrap().into_interface(|_| false);
        assert_eq!(interface.mac().to_string(), "06:00:00:00:00:01");
        assert_eq!(interface.iface_id, "lan");
        assert_eq!((interface.mtu, interface.pairs()), (Some(1400), 2));
        let limiter = interface.rx_rate_limiter.unwrap();
        assert_eq!(
            limiter.bandwidth,
            Some(TokenBucketConfig::per_second(1 << 20))
        );
        assert_eq!(interface.tx_rate_limiter, Some(limiter));
        let lease = interface.lease.unwrap();
        assert_eq!(lease.ipv4.unwrap().to_string(), "10.0.0.2/24");
        assert_eq!(lease.ipv6.unwrap().to_string(), "fd00:0:0:2::/64");
        assert_eq!(
            (lease.dns.len(), lease.host_name.as_deref()),
            (2, Some("web"))
        );
        let plain = parse("fd=7:8")
            .unwrap()
            .into_interface(|name| name == "eth0");
        assert_eq!(plain.iface_id, "eth1");
        assert_eq!(plain.descriptors(), Some(vec![7, 8]));
        let in_network = parse("network=lan,publish=8080:80,publish=127.0.0.1:53:53/udp")
            .unwrap()
            .into_interface(|_| false);
        assert_eq!(in_network.network.as_deref(), Some("lan"));
        assert_eq!(in_network.publish.len(), 2);
        assert_eq!((plain.lease, plain.rx_rate_limiter), (None, None));
    }

    #[test]
    fn what_is_wrong_is_named() {
        assert_eq!(parse(""), Err(NetError::UnknownOption(String::new())));
        assert_eq!(parse("mtu=1400"), Err(NetError::NoTap));
        assert_eq!(parse("tap=a,fd=3"), Err(NetError::Twice("the tap".into())));
        assert_eq!(
            parse("tap=a,mtu=1,mtu=2"),
            Err(NetError::Twice("mtu".into()))
        );
        for (text, option) in [
            ("tap=a,mtu=x", "mtu"),
            ("tap=a,queues=-1", "queues"),
            ("tap=a,rate=fast", "rate"),
            ("tap=a,ip=10.0.0.1", "ip"),
            ("tap=a,gw=fd00::1", "gw"),
            ("tap=a,dns=name", "dns"),
        ] {
            let error = parse(text).unwrap_err();
            assert!(
                matches!(&error, NetError::Value { option: at, .. } if at == option),
                "{error}"
            );
        }
        assert!(matches!(
            parse("network=a,publish=80"),
            Err(NetError::Publish(_))
        ));
        assert!(matches!(
            parse("tap=a,mac=ff:ff:ff:ff:ff:ff"),
            Err(NetError::Mac(_))
        ));
    }
}
