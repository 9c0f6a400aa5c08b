//! What the host has of guests: made when their processes begin, taken away when these end.

use std::collections::BTreeMap;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;

use network::{Attachment, Counters, HostError, HostNetworks, Network, Networks, Outside};
use parking_lot::Mutex;

use super::error::NetworksError;
use super::lock::NetworksLock;
use super::state::{GuestNetworks, NetworkPolicy};
use crate::serve::process;
use crate::serve::record::{Interfaces, Phase, Record, State};
use crate::serve::store::{self, Store};
use host::report::chain;

/// The networks, with servers of names where guests reach some and none were named.
fn with_servers(networks: &Networks) -> Result<Networks, NetworksError> {
    let with_servers = |network: &Network| {
        let mut network = network.clone();
        if network.dns.is_empty() && network.outside == Outside::Nat {
            network.dns =
                network::resolvers_of_the_host().map_err(|source| NetworksError::Resolvers {
                    network: network.name.clone(),
                    source,
                })?;
        }
        Ok(network)
    };
    let networks = networks
        .iter()
        .map(with_servers)
        .collect::<Result<_, NetworksError>>()?;
    Ok(Networks::new(networks)?)
}

/// What the records of guests say of networks: of those whose process runs, and of the others.
fn on_record(store: &Store) -> io::Result<Vec<(Interfaces, bool)>> {
    let mut found = Vec::new();
    for id in store.ids()? {
        let folder = store.vm(&id);
        // One that cannot be read has no network until somebody has repaired it.
        let Ok(Some(record)) = store::read::<Record>(&folder.join("vm.json")) else {
            continue;
        };
        if record.interfaces.is_empty() || record.phase != Phase::Present {
            continue;
        }
        // The process that a guest waits to be configured in has no tap.
        let runs = record.state != State::NotStarted || record.pending.start;
        let runs = runs && process::find(&folder).is_ok_and(|found| found.is_some());
        found.push((record.interfaces, runs));
    }
    Ok(found)
}

impl GuestNetworks {
    /// Makes the host as it has to be for the networks and for the guests of the records. Without networks, what an
    /// earlier daemon of this state folder had is taken away.
    ///
    /// # Errors
    /// [`NetworksError`].
    pub fn open(policy: &NetworkPolicy, store: &Store) -> Result<Self, NetworksError> {
        let mut networks = Self {
            networks: Networks::default(),
            pools: Mutex::default(),
            host: None,
            unresolved: Mutex::default(),
            repairs: 0.into(),
            mark: store.networks(),
            lock: None,
        };
        if policy.networks.iter().next().is_none() {
            networks.remove_earlier();
            return Ok(networks);
        }
        networks.lock = NetworksLock::take()?;
        networks.networks = with_servers(&policy.networks)?;
        let mut attachments = Vec::new();
        for (interfaces, runs) in on_record(store).map_err(NetworksError::Store)? {
            let taken = networks.take_again(&interfaces);
            if taken.len() < interfaces.len() {
                let names: Vec<_> = interfaces.values().map(|i| &i.attachment.network).collect();
                tracing::warn!(networks = ?names, "a guest has no network, as its own is none of this daemon's");
            }
            attachments.extend(taken.into_iter().filter(|_| runs));
        }
        // Said before anything is made, so that a daemon without networks knows that there may be something.
        store::replace_durably(&networks.mark, b"").map_err(NetworksError::Store)?;
        let host = HostNetworks::rebuild(networks.networks.clone(), attachments)?;
        networks.host = Some(Mutex::new(host));
        Ok(networks)
    }

    fn remove_earlier(&self) {
        if store::is_missing(&self.mark).unwrap_or(true) {
            return;
        }
        // Another daemon may have networks by now.
        let removed = NetworksLock::take().and_then(|_lock| self.remove_all());
        match removed {
            Ok(()) => tracing::info!("the networks of an earlier daemon are taken away"),
            Err(error) => {
                tracing::error!(error = %chain(&error), "the networks of an earlier daemon stay on this host");
            }
        }
    }

    /// Takes everything of the networks away from the host.
    ///
    /// # Errors
    /// [`NetworksError`].
    pub fn remove_all(&self) -> Result<(), NetworksError> {
        network::remove_all()?;
        std::fs::remove_file(&self.mark)
            .map_err(store::named(&self.mark))
            .map_err(NetworksError::Store)
    }

    /// Makes the taps of a guest, and lets it send and receive. Gives the interfaces and their taps, in one order.
    ///
    /// # Errors
    /// [`HostError`]; nothing is left then.
    pub fn attach(
        &self,
        interfaces: &Interfaces,
    ) -> Result<(Vec<String>, Vec<OwnedFd>), HostError> {
        let Some((host, _)) = self.host.as_ref().zip(interfaces.first_key_value()) else {
            return Ok((Vec::new(), Vec::new()));
        };
        let attachments: Vec<_> = interfaces.values().map(|i| i.attachment.clone()).collect();
        let mut host = host.lock();
        // Of a process whose end could not be followed by it.
        host.detach(&outer(&attachments))?;
        let taps = host.attach(&attachments)?;
        Ok((interfaces.keys().cloned().collect(), taps))
    }

    /// Takes away what [`GuestNetworks::attach`] made. Where that fails, the next start of the guest or of the daemon
    /// puts it right.
    pub fn detach(&self, interfaces: &Interfaces) {
        let Some((host, _)) = self.host.as_ref().zip(interfaces.first_key_value()) else {
            return;
        };
        let attachments: Vec<_> = interfaces.values().map(|i| i.attachment.clone()).collect();
        if let Err(error) = host.lock().detach(&outer(&attachments)) {
            tracing::error!(error = %chain(&error), "what the host has of a guest's network stays");
        }
    }

    /// What has passed the taps of guests, by their outer addresses.
    pub fn counters(&self) -> BTreeMap<Ipv4Addr, Counters> {
        match self.host.as_ref().map(|host| host.lock().counters()) {
            None => BTreeMap::new(),
            Some(Ok(counters)) => counters,
            Some(Err(error)) => {
                tracing::warn!(error = %chain(&error), "the counters of networks cannot be read");
                BTreeMap::new()
            }
        }
    }
}

fn outer(attachments: &[Attachment]) -> Vec<Ipv4Addr> {
    attachments.iter().map(|guest| guest.outer.v4).collect()
}
