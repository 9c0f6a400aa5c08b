//! The host's side of all networks: the rules, routes and taps of the guests that the daemon has.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::OwnedFd;

use config::Published;
use ipnet::IpNet;
use netlink_packet_route::route::RouteMessage;
use rustix::thread::{CapabilitySet, capabilities};

use crate::attachment::{Attachment, TapName};
use crate::egress::{Destination, DomainName};
use crate::links::{self, Counters, Tap};
use crate::netlink::{Netlink, NetlinkError, Request};
use crate::nft::{self, NftError};
use crate::rules::{self, Names};
use crate::spec::{Network, Networks, ranges};
use crate::sysctl::{self, SysctlError};
use crate::tap::{self, TapError};

/// Why the host cannot have a network or a guest in it.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// The process may not change the host's network.
    #[error(
        "the networks of guests need the right to change the host's network: root, or CAP_NET_ADMIN"
    )]
    Privilege,
    /// The rules.
    #[error("cannot set the rules of the networks")]
    Rules(#[from] NftError),
    /// Routes, neighbours and interfaces.
    #[error("cannot set the routes and interfaces of the networks")]
    Links(#[from] NetlinkError),
    /// Settings of the kernel.
    #[error("cannot prepare the kernel for the networks")]
    Settings(#[from] SysctlError),
    /// A tap.
    #[error("cannot have a tap")]
    Tap(#[from] TapError),
    /// The guest's network is none of the daemon's.
    #[error("there is no network {0:.80?}: the networks are those of `coppice serve --network`")]
    NoNetwork(String),
    /// The guest's address is none of its network.
    #[error("the address {address} is none of network {network}")]
    OtherRange {
        /// The address.
        address: IpNet,
        /// The network.
        network: String,
    },
    /// Two guests would have one address.
    #[error("the address {0} is another guest's")]
    AddressInUse(IpNet),
    /// Two guests would have one port of the host.
    #[error("the port {port} of the host is published for {holder} already")]
    PortInUse {
        /// The port.
        port: Published,
        /// The address of the guest that has it.
        holder: Ipv4Addr,
    },
    /// A host's address lies in the range of a network.
    #[error("network {network}: {range} holds {address}, which is an address of this host")]
    RangeOfHost {
        /// The network.
        network: String,
        /// Its range.
        range: IpNet,
        /// The host's address.
        address: IpAddr,
    },
}

/// The networks of a host, and the guests in them.
///
/// It belongs to the network namespace of the thread that made it, and is to be used from threads of the same.
#[derive(Debug)]
pub struct HostNetworks {
    networks: Networks,
    names: Names,
    /// By outer address.
    attachments: BTreeMap<Ipv4Addr, Attachment>,
    netlink: Netlink,
}

impl HostNetworks {
    /// Makes the host as it has to be for networks and guests: the rules first, in one step, so that no guest that runs
    /// is without them; then addresses, routes and taps. What earlier networks and guests left is deleted.
    ///
    /// # Errors
    /// [`HostError`]; what had been done by then is put right by the next call.
    pub fn rebuild(networks: Networks, attachments: Vec<Attachment>) -> Result<Self, HostError> {
        let mut netlink = open()?;
        tap::open_device()?;
        let held = links::addresses(&mut netlink)?;
        for host in held.iter().filter(|host| !host.is_ours) {
            if let Some((network, range)) = network_of(&networks, host.address) {
                let (network, address) = (network.name.clone(), host.address);
                return Err(HostError::RangeOfHost {
                    network,
                    range,
                    address,
                });
            }
        }
        let of_name = |entry: &crate::egress::Egress| match &entry.destination {
            Destination::Name(name) => Some((name.clone(), Vec::new())),
            Destination::Range(_) => None,
        };
        let names = networks
            .iter()
            .flat_map(|network| network.allow.iter().filter_map(of_name))
            .collect();
        let mut host = Self {
            networks,
            names,
            attachments: BTreeMap::new(),
            netlink,
        };
        host.check(&attachments)?;
        host.attachments = attachments
            .into_iter()
            .map(|guest| (guest.outer.v4, guest))
            .collect();
        host.load_rules()?;
        host.set_addresses()?;
        host.set_routes()?;
        host.set_taps()?;
        Ok(host)
    }

    /// Makes taps for guests, in their order, and lets these send and receive. All of them, or none.
    ///
    /// The taps go with the last descriptor of each.
    ///
    /// # Errors
    /// [`HostError`].
    pub fn attach(&mut self, guests: &[Attachment]) -> Result<Vec<OwnedFd>, HostError> {
        self.check(guests)?;
        let taps = guests
            .iter()
            .map(|guest| tap::create(guest.tap()))
            .collect::<Result<Vec<_>, _>>()?;
        let links = guests
            .iter()
            .map(|guest| Ok((guest, index(guest.tap())?)))
            .collect::<Result<Vec<_>, HostError>>()?;
        configure(&self.networks, &mut self.netlink, &links)?;
        let known = guests.iter().map(|guest| (guest.outer.v4, guest.clone()));
        self.attachments.extend(known);
        if let Err(error) = self.change_rules(&rules::add(guests.iter())) {
            for guest in guests {
                self.attachments.remove(&guest.outer.v4);
            }
            return Err(error);
        }
        Ok(taps)
    }

    /// Takes guests' rules away and their taps, even where a process holds them still. Unknown addresses are left out.
    ///
    /// # Errors
    /// [`HostError`]; the guests that could not be detached are detached by the next call or [`HostNetworks::rebuild`].
    pub fn detach(&mut self, addresses: &[Ipv4Addr]) -> Result<(), HostError> {
        let gone: BTreeSet<_> = addresses
            .iter()
            .filter(|address| self.attachments.contains_key(address))
            .copied()
            .collect();
        if gone.is_empty() {
            return Ok(());
        }
        let guests: Vec<_> = gone
            .iter()
            .filter_map(|address| self.attachments.remove(address))
            .collect();
        if let Err(error) = self.change_rules(&rules::delete(guests.iter())) {
            let back = guests.into_iter().map(|guest| (guest.outer.v4, guest));
            self.attachments.extend(back);
            return Err(error);
        }
        // Most taps are gone by now, with the processes of their guests.
        let left = |address: Ipv4Addr| {
            let name = TapName::of(address);
            Some((name, tap::index(name).ok()?))
        };
        let left: Vec<_> = gone.into_iter().filter_map(left).collect();
        Ok(links::delete(&mut self.netlink, &left)?)
    }

    /// The names in allow-lists, whose addresses are to be looked up again and again.
    pub fn names(&self) -> impl Iterator<Item = &DomainName> {
        self.names.keys()
    }

    /// Says which addresses a name has. Those of [`crate::public_addresses`] only are to be given.
    ///
    /// # Errors
    /// [`HostError::Rules`].
    pub fn set_name(&mut self, name: &DomainName, addresses: &[IpAddr]) -> Result<(), HostError> {
        let Some(text) = rules::set_name(&self.names, name, addresses) else {
            return Ok(());
        };
        if self.names.get(name).is_some_and(|known| known == addresses) {
            return Ok(());
        }
        self.names.insert(name.clone(), addresses.to_vec());
        self.change_rules(&text)
    }

    /// The networks.
    pub fn networks(&self) -> &Networks {
        &self.networks
    }

    /// The guests.
    pub fn attachments(&self) -> impl Iterator<Item = &Attachment> {
        self.attachments.values()
    }

    /// What has passed each guest's tap, by its outer address.
    ///
    /// # Errors
    /// [`HostError::Links`].
    pub fn counters(&mut self) -> Result<BTreeMap<Ipv4Addr, Counters>, HostError> {
        let taps = links::taps(&mut self.netlink)?;
        Ok(taps
            .into_iter()
            .map(|tap| (tap.name.address(), tap.counters))
            .collect())
    }

    /// Whether the rules are there. Others can take them away: `nft flush ruleset` takes every table.
    ///
    /// # Errors
    /// [`HostError::Rules`], where the program itself is missing.
    pub fn has_rules(&self) -> Result<bool, HostError> {
        match nft::run("list chain inet coppice from_guest\n") {
            Ok(_) => Ok(true),
            Err(NftError::Refused { .. }) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Puts the whole table in the place of what is there, in one step.
    ///
    /// # Errors
    /// [`HostError::Rules`].
    pub fn load_rules(&self) -> Result<(), HostError> {
        nft::run(&rules::table(
            &self.networks,
            &self.names,
            self.attachments.values(),
        ))?;
        Ok(())
    }

    /// Lets what arrives at the interfaces of default routes be forwarded: others may have got such a route since.
    ///
    /// # Errors
    /// [`HostError`].
    pub fn follow_default_routes(&mut self) -> Result<(), HostError> {
        let routes = links::routes(&mut self.netlink)?;
        let is_default = |route: &&RouteMessage| {
            links::destination(route).is_some_and(|to| to.prefix_len() == 0)
        };
        let outside: BTreeSet<_> = routes
            .iter()
            .filter(is_default)
            .flat_map(links::interfaces)
            .collect();
        for index in outside {
            if let Some(name) = links::interface_name(&mut self.netlink, index)? {
                sysctl::forward_from(&name)?;
            }
        }
        Ok(())
    }

    /// Changes the table, which `self` describes already. Where the kernel's is another one, as somebody else changed
    /// or removed it, the whole is put in its place.
    fn change_rules(&self, text: &str) -> Result<(), HostError> {
        match nft::run(text) {
            Ok(_) => Ok(()),
            Err(error @ NftError::Refused { .. }) => {
                let why = report::chain(&error);
                tracing::warn!(
                    "the rules are set anew, as they are not those of the last change: {why}"
                );
                self.load_rules()
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Refuses guests whose addresses or ports are others', or none of their network.
    fn check(&self, guests: &[Attachment]) -> Result<(), HostError> {
        let all = || self.attachments.values().chain(guests);
        let mut addresses = BTreeSet::new();
        for address in all().flat_map(Attachment::outer) {
            if !addresses.insert(address) {
                return Err(HostError::AddressInUse(address));
            }
        }
        for guest in guests {
            let network = self
                .networks
                .get(&guest.network)
                .ok_or_else(|| HostError::NoNetwork(guest.network.clone()))?;
            let range = guest
                .outer()
                .find(|address| !ranges(network).any(|range| range.contains(address)));
            if let Some(address) = range {
                return Err(HostError::OtherRange {
                    address,
                    network: network.name.clone(),
                });
            }
        }
        let mut ports: BTreeMap<_, Vec<(Published, Ipv4Addr)>> = BTreeMap::new();
        for guest in all() {
            for port in &guest.published {
                let same = ports.entry((port.protocol, port.host_port)).or_default();
                let is_same = |(other, _): &&(Published, Ipv4Addr)| {
                    port.address.is_none()
                        || other.address.is_none()
                        || port.address == other.address
                };
                if let Some((_, holder)) = same.iter().find(is_same) {
                    return Err(HostError::PortInUse {
                        port: *port,
                        holder: *holder,
                    });
                }
                same.push((*port, guest.outer.v4));
            }
        }
        Ok(())
    }

    /// The gateways' addresses, and no other ones of ours.
    fn set_addresses(&mut self) -> Result<(), HostError> {
        let gateways = |network: &Network| {
            let v6 = network.gateway6().map(IpAddr::V6);
            std::iter::once(IpAddr::V4(network.gateway())).chain(v6)
        };
        let wanted: BTreeSet<_> = self.networks.iter().flat_map(gateways).collect();
        let held = links::addresses(&mut self.netlink)?;
        let ours = || {
            held.iter()
                .filter(|host| host.is_ours)
                .map(|host| host.address)
        };
        let stale = ours().filter(|address| !wanted.contains(address));
        let stale = stale.map(links::delete_address).collect();
        self.netlink.send_all_but_gone(stale)?;
        let missing = wanted
            .iter()
            .filter(|address| !ours().any(|ours| ours == **address));
        Ok(self
            .netlink
            .send_all(missing.map(|address| links::gateway(*address)).collect())?)
    }

    /// The ranges of the networks, and no routes of ours to anything else; the way out and back.
    fn set_routes(&mut self) -> Result<(), HostError> {
        let wanted: BTreeSet<_> = self.networks.iter().flat_map(ranges).collect();
        let guests: BTreeSet<_> = self
            .attachments
            .values()
            .flat_map(Attachment::outer)
            .collect();
        let is_stale = |route: &RouteMessage| {
            let to = links::destination(route);
            let is_known = to.is_none_or(|to| wanted.contains(&to) || guests.contains(&to));
            links::is_ours(route) && !is_known
        };
        let routes = links::routes(&mut self.netlink)?.into_iter();
        let stale = routes.filter(is_stale).map(links::delete_route).collect();
        self.netlink.send_all_but_gone(stale)?;
        self.netlink
            .send_all(wanted.into_iter().map(links::unreachable).collect())?;
        self.follow_default_routes()?;
        if self.networks.iter().any(|network| network.prefix.is_some()) {
            sysctl::forward_ipv6()?;
        }
        Ok(())
    }

    /// The taps of guests that run on, and none of those that are gone.
    fn set_taps(&mut self) -> Result<(), HostError> {
        let taps = links::taps(&mut self.netlink)?;
        let (kept, stale): (Vec<Tap>, Vec<Tap>) = taps
            .into_iter()
            .partition(|tap| self.attachments.contains_key(&tap.name.address()));
        let stale: Vec<_> = stale.iter().map(Tap::id).collect();
        links::delete(&mut self.netlink, &stale)?;
        let kept: Vec<_> = kept
            .iter()
            .filter_map(|tap| Some((self.attachments.get(&tap.name.address())?, tap.index)))
            .collect();
        configure(&self.networks, &mut self.netlink, &kept)
    }
}

/// Takes everything away that networks of any daemon left in the host: rules, taps, routes and addresses. What the
/// kernel was told about forwarding stays as it is, as others may need it by now.
///
/// # Errors
/// [`HostError`].
pub fn remove_all() -> Result<(), HostError> {
    let mut netlink = open()?;
    let taps: Vec<_> = links::taps(&mut netlink)?.iter().map(Tap::id).collect();
    links::delete(&mut netlink, &taps)?;
    let routes = links::routes(&mut netlink)?
        .into_iter()
        .filter(links::is_ours);
    netlink.send_all_but_gone(routes.map(links::delete_route).collect())?;
    let ours = links::addresses(&mut netlink)?
        .into_iter()
        .filter(|host| host.is_ours);
    netlink.send_all_but_gone(
        ours.map(|host| links::delete_address(host.address))
            .collect(),
    )?;
    nft::run(rules::REMOVE)?;
    Ok(())
}

fn open() -> Result<Netlink, HostError> {
    let may =
        capabilities(None).is_ok_and(|sets| sets.effective.contains(CapabilitySet::NET_ADMIN));
    if !may {
        return Err(HostError::Privilege);
    }
    Ok(Netlink::open()?)
}

fn network_of(networks: &Networks, address: IpAddr) -> Option<(&Network, IpNet)> {
    networks.iter().find_map(|network| {
        Some((
            network,
            ranges(network).find(|range| range.contains(&address))?,
        ))
    })
}

fn index(name: TapName) -> Result<u32, HostError> {
    Ok(tap::index(name).map_err(|source| TapError::Create { name, source })?)
}

/// Settings, routes and neighbours of taps, which are up after it.
fn configure(
    networks: &Networks,
    netlink: &mut Netlink,
    taps: &[(&Attachment, u32)],
) -> Result<(), HostError> {
    let mut requests: Vec<Request> = Vec::new();
    for (guest, index) in taps {
        let (name, index) = (guest.tap(), *index);
        let network = networks
            .get(&guest.network)
            .ok_or_else(|| HostError::NoNetwork(guest.network.clone()))?;
        sysctl::set_tap(&name.to_string(), guest.outer.v6.is_some())?;
        requests.push(links::bring_up(name, index, network.mtu));
        requests.push(links::route(
            IpNet::from(IpAddr::V4(guest.outer.v4)),
            name,
            index,
            Some(network.gateway().into()),
        ));
        requests.push(links::neighbour(
            guest.inner.v4.into(),
            name,
            index,
            guest.mac,
        ));
        if let Some(outer) = guest.outer.v6 {
            let from = network.gateway6().map(IpAddr::V6);
            requests.push(links::neighbour(
                links::GUEST6.into(),
                name,
                index,
                guest.mac,
            ));
            requests.push(links::route(outer.into(), name, index, from));
        }
    }
    Ok(netlink.send_all(requests)?)
}
