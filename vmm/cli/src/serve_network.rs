//! `coppice serve --network NAME=RANGE[,option...]`.

use std::str::FromStr;

use super::disk::split;
use super::jail::{JailArgumentError, set};
use network::{Access, EgressError, Network, Outside, SpecError};

/// The value of `coppice serve --network`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServeNetworkArgument(Network);

impl From<ServeNetworkArgument> for Network {
    fn from(argument: ServeNetworkArgument) -> Self {
        argument.0
    }
}

/// Why a text does not describe a network.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ServeNetworkError {
    /// It does not begin with a name and a range.
    #[error("{0:.80?} is not NAME=RANGE, as lan=10.1.0.0/16")]
    NoRange(String),
    /// An option is unknown.
    #[error(
        "{0:.80?} is not an option of a network: v6=PREFIX, isolated, peers=allow, host=allow, metadata=allow, allow=RANGE|NAME[:PORT[-PORT]], dns=ADDRESS, mtu=BYTES"
    )]
    UnknownOption(String),
    /// An option has a value that it cannot have, or is given twice.
    #[error(transparent)]
    Option(#[from] JailArgumentError),
    /// An entry of the allow-list is none.
    #[error("allow")]
    Allow(#[source] EgressError),
    /// The network cannot be as it was described.
    #[error(transparent)]
    Spec(#[from] SpecError),
}

fn parse<T: FromStr>(
    option: &'static str,
    value: &str,
    expected: &'static str,
) -> Result<T, JailArgumentError> {
    value.parse().map_err(|_| JailArgumentError::Value {
        option,
        value: value.to_owned(),
        expected,
    })
}

/// Sets an access that is `deny` where nothing is said.
fn allow(option: &'static str, access: &mut Access, value: &str) -> Result<(), ServeNetworkError> {
    if value != "allow" {
        return Err(ServeNetworkError::UnknownOption(format!(
            "{option}={value}"
        )));
    }
    let mut given = (*access == Access::Allow).then_some(());
    set(option, &mut given, ())?;
    *access = Access::Allow;
    Ok(())
}

impl FromStr for ServeNetworkArgument {
    type Err = ServeNetworkError;

    fn from_str(text: &str) -> Result<Self, ServeNetworkError> {
        let mut parts = split(text).into_iter();
        let first = parts.next().unwrap_or_default();
        let no_range = || ServeNetworkError::NoRange(first.clone());
        let (name, range) = first.split_once('=').ok_or_else(no_range)?;
        let mut network = Network::new(name, range.parse().map_err(|_| no_range())?);
        let (mut mtu, mut isolated) = (None, None);
        for part in parts {
            let unknown = || ServeNetworkError::UnknownOption(part.clone());
            let (option, value) = part.split_once('=').unwrap_or((&part, ""));
            match option {
                "v6" => set(
                    "v6",
                    &mut network.prefix,
                    parse("v6", value, "a prefix, as fd00:1::/48")?,
                )?,
                "isolated" if part == "isolated" => set("isolated", &mut isolated, ())?,
                "peers" => allow("peers", &mut network.peers, value)?,
                "host" => allow("host", &mut network.host, value)?,
                "metadata" => allow("metadata", &mut network.metadata, value)?,
                "allow" => network
                    .allow
                    .push(value.parse().map_err(ServeNetworkError::Allow)?),
                "dns" => network.dns.push(parse("dns", value, "an IP address")?),
                "mtu" => set("mtu", &mut mtu, parse("mtu", value, "BYTES, 576 to 65535")?)?,
                _ => return Err(unknown()),
            }
        }
        network.mtu = mtu.unwrap_or(network.mtu);
        if isolated.is_some() {
            network.outside = Outside::Isolated;
        }
        network.validate()?;
        Ok(Self(network))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use host::report::chain;

    #[test]
    fn a_network_is_described_by_its_range_and_options() {
        let text = "lan=10.1.0.0/16,v6=fd00:1::/48,peers=allow,host=allow,metadata=allow,\
                    allow=192.0.2.0/24:443,allow=crates.io,dns=9.9.9.9,dns=2620:fe::fe,mtu=1400";
        let lan = text.parse::<ServeNetworkArgument>().unwrap().0;
        assert_eq!((lan.name.as_str(), lan.mtu), ("lan", 1400));
        assert_eq!(lan.prefix.unwrap().to_string(), "fd00:1::/48");
        assert_eq!([lan.peers, lan.host, lan.metadata], [Access::Allow; 3]);
        assert_eq!((lan.allow.len(), lan.dns.len()), (2, 2));
        let plain: ServeNetworkArgument = "b=10.2.0.0/24,isolated".parse().unwrap();
        assert_eq!(plain.0.outside, Outside::Isolated);
        assert_eq!([plain.0.peers, plain.0.host], [Access::Deny; 2]);
    }

    #[test]
    fn anything_else_is_refused_by_name() {
        for (text, named) in [
            ("", "NAME=RANGE"),
            ("lan", "NAME=RANGE"),
            ("lan=10.1.0.0", "NAME=RANGE"),
            ("lan=10.1.0.1/16", "beyond the prefix"),
            ("Lan=10.1.0.0/16", "no name of a network"),
            ("lan=127.0.0.0/8", "no such addresses"),
            ("lan=10.1.0.0/16,v6=fe80::/48", "unique local"),
            ("lan=10.1.0.0/16,v6=x", "v6=x"),
            ("lan=10.1.0.0/16,isolated=yes", "isolated=yes"),
            ("lan=10.1.0.0/16,peers=deny", "peers=deny"),
            ("lan=10.1.0.0/16,peers=allow,peers=allow", "twice"),
            ("lan=10.1.0.0/16,isolated,allow=10.0.0.0/8", "isolated"),
            ("lan=10.1.0.0/16,allow=a..b", "a..b"),
            ("lan=10.1.0.0/16,allow=a.b:0", "port"),
            ("lan=10.1.0.0/16,mtu=100", "mtu=100"),
            ("lan=10.1.0.0/16,mtu=1500,mtu=1500", "twice"),
            ("lan=10.1.0.0/16,dns=127.0.0.53", "dns=127.0.0.53"),
            ("lan=10.1.0.0/16,dns=name", "dns=name"),
            ("lan=10.1.0.0/16,nat", "nat"),
        ] {
            let error = text.parse::<ServeNetworkArgument>().unwrap_err();
            let error = chain(&error).to_string();
            assert!(error.contains(named), "{text}: {error}");
        }
    }
}
