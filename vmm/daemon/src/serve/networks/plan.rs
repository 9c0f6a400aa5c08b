//! What the interfaces of a guest get.

use ipnet::Ipv4Net;
use network::{AddressPool, Addresses, Attachment, Network, gateway_mac, mac_of};

use super::state::GuestNetworks;
use crate::serve::network_fault::NetworkFault;
use crate::serve::record::{GuestInterface, Interfaces};
use config::{LeaseConfig, NetworkInterfaceConfig, Published, VmConfig};
use control::launch_spec::MOST_TAPS;

/// The other guests of a daemon, with their interfaces.
pub type Others = Vec<(String, Interfaces)>;

/// Servers of names that a lease has room for.
const DNS_MAX: usize = 3;

/// Whether two ports of the host cannot lead to two guests.
fn collide(a: &Published, b: &Published) -> bool {
    let is_same_address = a.address.is_none() || b.address.is_none() || a.address == b.address;
    (a.protocol, a.host_port) == (b.protocol, b.host_port) && is_same_address
}

/// A guest's name as that of a host, where it can be one (RFC 1123, 2.1).
fn host_name(id: &str) -> Option<String> {
    let is_host_name = !id.starts_with('-') && !id.ends_with('-');
    is_host_name.then(|| id.to_owned())
}

/// What a new guest in a network is told.
fn lease(network: &Network, inner: Addresses) -> LeaseConfig {
    LeaseConfig {
        ipv4: Ipv4Net::new(inner.v4, network.range.prefix_len()).ok(),
        gateway: Some(network.gateway()),
        ipv6: inner.v6,
        dns: Vec::new(),
        host_name: None,
        gateway_mac: Some(gateway_mac()),
    }
}

/// Whether what a guest was given is still of its network.
pub(super) fn is_of(network: &Network, attachment: &Attachment) -> bool {
    let is_in_prefix = |v6| network.prefix.is_some_and(|prefix| prefix.contains(&v6));
    let outer = attachment.outer;
    network.range.contains(&outer.v4) && outer.v6.is_none_or(is_in_prefix)
}

impl GuestNetworks {
    /// What the interfaces of a guest get that are in networks: what they have, where they have something of that
    /// network, and else something new. `inherited` is what the guest of the template had, for a clone. The registry is
    /// locked meanwhile, so that no two guests get the same.
    ///
    /// # Errors
    /// [`NetworkFault`]; nothing is taken then.
    pub fn plan(
        &self,
        id: &str,
        config: &VmConfig,
        (own, inherited): (&Interfaces, &Interfaces),
        others: &Others,
    ) -> Result<Interfaces, NetworkFault> {
        let mut planned = Interfaces::new();
        let planning = config.network_interfaces.iter().try_for_each(|interface| {
            let Some(network) = &interface.network else {
                return Ok(());
            };
            let network = self
                .networks
                .get(network)
                .ok_or_else(|| NetworkFault::NoNetwork(network.clone()))?;
            let taken = Taken {
                id,
                planned: &planned,
                others,
            };
            taken.check(interface, network)?;
            let name = &interface.iface_id;
            let has = own.get(name).filter(|has| is_of(network, &has.attachment));
            let has = has.filter(|has| has.attachment.network == network.name);
            let given = match (has, inherited.get(name)) {
                (Some(has), _) => with(has.clone(), interface),
                (None, Some(template)) => self.of_clone(network, template, interface)?,
                (None, None) => self.of_new(network, interface)?,
            };
            planned.insert(name.clone(), given);
            Ok(())
        });
        let too_many = planned.len() > MOST_TAPS;
        let planning = planning.and(if too_many {
            Err(NetworkFault::TooMany(MOST_TAPS))
        } else {
            Ok(())
        });
        if let Err(fault) = planning {
            self.give_back(&planned, own);
            return Err(fault);
        }
        Ok(planned)
    }

    fn take(&self, network: &Network) -> Result<Addresses, NetworkFault> {
        let mut pools = self.pools.lock();
        let pool = pools
            .entry(network.name.clone())
            .or_insert_with(|| AddressPool::new(network.range));
        let address = pool.allocate().map_err(|source| NetworkFault::Full {
            network: network.name.clone(),
            source,
        })?;
        Ok(network.addresses_of(address))
    }

    fn of_new(
        &self,
        network: &Network,
        asked: &NetworkInterfaceConfig,
    ) -> Result<GuestInterface, NetworkFault> {
        let addresses = self.take(network)?;
        Ok(GuestInterface {
            lease: lease(network, addresses),
            attachment: Attachment {
                network: network.name.clone(),
                outer: addresses,
                inner: addresses,
                mac: asked.guest_mac.unwrap_or_else(|| mac_of(addresses.v4)),
                published: asked.publish.clone(),
            },
        })
    }

    /// A clone has the addresses of its template for itself, and others for everybody else.
    fn of_clone(
        &self,
        network: &Network,
        template: &GuestInterface,
        asked: &NetworkInterfaceConfig,
    ) -> Result<GuestInterface, NetworkFault> {
        let mut outer = self.take(network)?;
        let mut inner = template.attachment.inner;
        // IPv6 that only one of template and network has is none.
        (outer.v6, inner.v6) = outer.v6.zip(inner.v6).unzip();
        Ok(GuestInterface {
            lease: template.lease.clone(),
            attachment: Attachment {
                network: network.name.clone(),
                outer,
                inner,
                mac: template.attachment.mac,
                published: asked.publish.clone(),
            },
        })
    }

    /// Frees the addresses that are in `interfaces`, but those that are `kept`.
    pub fn give_back(&self, interfaces: &Interfaces, kept: &Interfaces) {
        let mut pools = self.pools.lock();
        for GuestInterface { attachment, .. } in interfaces.values() {
            let address = attachment.outer.v4;
            let is_kept = |other: &GuestInterface| other.attachment.outer.v4 == address;
            if !kept.values().any(is_kept)
                && let Some(pool) = pools.get_mut(&attachment.network)
            {
                pool.free(address);
            }
        }
    }

    /// Completes the configuration that a guest boots with.
    ///
    /// # Errors
    /// `Elsewhere`.
    pub fn complete(
        &self,
        id: &str,
        config: &mut VmConfig,
        interfaces: &Interfaces,
    ) -> Result<(), NetworkFault> {
        for interface in &mut config.network_interfaces {
            let Some(name) = &interface.network else {
                continue;
            };
            let elsewhere = || NetworkFault::Elsewhere {
                interface: interface.iface_id.clone(),
                network: name.clone(),
            };
            let network = self.networks.get(name).ok_or_else(elsewhere)?;
            let given = interfaces
                .get(&interface.iface_id)
                .filter(|given| is_of(network, &given.attachment))
                .ok_or_else(elsewhere)?;
            interface.guest_mac = Some(given.attachment.mac);
            let mtu = interface.mtu.unwrap_or(network.mtu).min(network.mtu);
            interface.mtu = Some(mtu);
            interface.lease = Some(LeaseConfig {
                dns: network.dns.iter().take(DNS_MAX).copied().collect(),
                host_name: host_name(id),
                ..given.lease.clone()
            });
        }
        Ok(())
    }
}

/// What an interface has, with what it was asked to have since.
fn with(mut has: GuestInterface, asked: &NetworkInterfaceConfig) -> GuestInterface {
    has.attachment.published.clone_from(&asked.publish);
    if let Some(mac) = asked.guest_mac {
        has.attachment.mac = mac;
    }
    has
}

/// What other interfaces have: those of other guests, and those of the same one.
struct Taken<'a> {
    id: &'a str,
    planned: &'a Interfaces,
    others: &'a Others,
}

impl Taken<'_> {
    fn check(&self, asked: &NetworkInterfaceConfig, network: &Network) -> Result<(), NetworkFault> {
        if asked.lease.is_some() {
            return Err(NetworkFault::OwnLease(asked.iface_id.clone()));
        }
        if let Some(mtu) = asked.mtu.filter(|mtu| *mtu > network.mtu) {
            return Err(NetworkFault::Mtu {
                mtu,
                most: network.mtu,
                network: network.name.clone(),
            });
        }
        if let Some(mac) = asked.guest_mac
            && let Some(vm) = self.holder(|other| other.attachment.mac == mac)
        {
            return Err(NetworkFault::MacTaken { mac, vm });
        }
        for (index, port) in asked.publish.iter().enumerate() {
            let is_of_ipv6 = port.address.is_some_and(|address| address.is_ipv6());
            if is_of_ipv6 && network.prefix.is_none() {
                return Err(NetworkFault::NoIpv6 {
                    port: *port,
                    network: network.name.clone(),
                });
            }
            let has_it = |ports: &[Published]| ports.iter().any(|other| collide(other, port));
            let is_own = asked.publish.get(..index).is_some_and(has_it);
            let holder = self.holder(|other| has_it(&other.attachment.published));
            if let Some(vm) = holder.or(is_own.then(|| self.id.to_owned())) {
                return Err(NetworkFault::PortTaken { port: *port, vm });
            }
        }
        Ok(())
    }

    /// The guest with an interface that is as `is` says.
    fn holder(&self, is: impl Fn(&GuestInterface) -> bool) -> Option<String> {
        if self.planned.values().any(&is) {
            return Some(self.id.to_owned());
        }
        let has_it = |(_, interfaces): &&(String, Interfaces)| interfaces.values().any(&is);
        let holder = self.others.iter().find(has_it);
        holder.map(|(id, _)| id.clone())
    }
}

impl GuestNetworks {
    /// Takes the addresses that an earlier daemon gave a guest. Those of which that cannot be are the guest's no more:
    /// the guest can only be deleted, or started where its network is again as it was.
    pub(super) fn take_again(&self, interfaces: &Interfaces) -> Vec<Attachment> {
        let mut pools = self.pools.lock();
        let mut taken = Vec::new();
        for GuestInterface { attachment, .. } in interfaces.values() {
            let network = self.networks.get(&attachment.network);
            let Some(network) = network.filter(|network| is_of(network, attachment)) else {
                continue;
            };
            let pool = pools
                .entry(network.name.clone())
                .or_insert_with(|| AddressPool::new(network.range));
            if pool.take(attachment.outer.v4).is_ok() {
                taken.push(attachment.clone());
            }
        }
        taken
    }
}

#[cfg(test)]
mod tests;
