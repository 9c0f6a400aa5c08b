//! How many connections a listener has at the same time: in all, and of one peer.
//!
//! Each listener has places of its own, so that connections to one keep nobody from another. Of the socket's, some are
//! kept for root and the user of the daemon, whatever others do.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Who is at the other end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Peer {
    /// Root, or the user of the daemon.
    Owner,
    /// Another user.
    User(u32),
    /// An address. Of IPv6, it is the network: whoever has one address there has all of them (RFC 4291, 2.5.4).
    Address(IpAddr),
}

impl Peer {
    /// The peer at an address.
    pub fn at(address: IpAddr) -> Self {
        match address.to_canonical() {
            IpAddr::V6(address) => {
                let network = address.to_bits() & !u128::from(u64::MAX);
                Self::Address(Ipv6Addr::from_bits(network).into())
            }
            address @ IpAddr::V4(_) => Self::Address(address),
        }
    }
}

/// Numbers of connections.
#[derive(Clone, Copy, Debug)]
pub struct Most {
    /// Of all.
    pub all: usize,
    /// Of all but the owner.
    pub others: usize,
    /// Of each but the owner.
    pub each: usize,
}

/// The places of a listener.
#[derive(Debug)]
pub struct Quota {
    most: Most,
    places: Arc<Semaphore>,
    taken: Mutex<BTreeMap<Peer, usize>>,
}

/// A place of which it is not known yet who takes it.
#[derive(Debug)]
pub struct FreePlace(OwnedSemaphorePermit);

/// A place that a peer has, until this is dropped.
#[derive(Debug)]
pub struct Place {
    quota: Arc<Quota>,
    peer: Peer,
    _permit: OwnedSemaphorePermit,
}

impl Quota {
    /// So many places, all of them free.
    pub fn new(most: Most) -> Arc<Self> {
        Arc::new(Self {
            most,
            places: Arc::new(Semaphore::new(most.all)),
            taken: Mutex::default(),
        })
    }

    /// Waits for a free place.
    pub async fn free(&self) -> Option<FreePlace> {
        let permit = self.places.clone().acquire_owned().await;
        permit.ok().map(FreePlace)
    }

    /// Gives the place to a peer, unless it, or all peers, have as many as they may have.
    pub fn take(self: &Arc<Self>, FreePlace(permit): FreePlace, peer: Peer) -> Option<Place> {
        let mut taken = self.taken.lock();
        if peer != Peer::Owner {
            let of_others = taken.iter().filter(|(peer, _)| **peer != Peer::Owner);
            let of_others: usize = of_others.map(|(_, count)| count).sum();
            let own = taken.get(&peer).copied().unwrap_or(0);
            if of_others >= self.most.others || own >= self.most.each {
                return None;
            }
        }
        *taken.entry(peer).or_default() += 1;
        Some(Place {
            quota: self.clone(),
            peer,
            _permit: permit,
        })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = self.quota.taken.lock();
        if let Some(count) = taken.get_mut(&self.peer) {
            *count -= 1;
            if *count == 0 {
                taken.remove(&self.peer);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn take(quota: &Arc<Quota>, peer: Peer) -> Option<Place> {
        let permit = quota.places.clone().try_acquire_owned().ok()?;
        quota.take(FreePlace(permit), peer)
    }

    #[test]
    fn others_leave_places_for_the_owner_and_each_for_the_others() {
        let quota = Quota::new(Most {
            all: 6,
            others: 4,
            each: 3,
        });
        let mut places: Vec<_> = (0..5).map(|_| take(&quota, Peer::User(7))).collect();
        assert_eq!(places.iter().flatten().count(), 3);
        places.push(take(&quota, Peer::User(8)));
        assert!(places.last().unwrap().is_some());
        assert!(
            take(&quota, Peer::User(9)).is_none(),
            "all others have four"
        );
        for _ in 0..2 {
            places.push(take(&quota, Peer::Owner));
            assert!(places.last().unwrap().is_some());
        }
        assert!(take(&quota, Peer::Owner).is_none());
        drop(places);
        assert!(quota.taken.lock().is_empty());
        assert_eq!(quota.places.available_permits(), 6);
    }

    #[test]
    fn addresses_of_one_network_are_one_peer() {
        let peer = |address: &str| Peer::at(address.parse().unwrap());
        assert_eq!(peer("2001:db8:0:1::1"), peer("2001:db8:0:1:ffff::2"));
        assert_ne!(peer("2001:db8:0:1::1"), peer("2001:db8:0:2::1"));
        assert_eq!(peer("::ffff:192.0.2.1"), peer("192.0.2.1"));
        assert_ne!(peer("192.0.2.2"), peer("192.0.2.1"));
    }
}
