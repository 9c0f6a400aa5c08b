//! The addresses of a network that no guest has.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use ipnet::Ipv4Net;

/// Hands out the addresses of a range, never that of the network, of its gateway (the first) or of all its hosts (the
/// last).
///
/// The search for a free address begins behind the one that was given last, so that an address that a guest gave back
/// rests for as long as others are free: what still arrives for that guest does not reach the next one.
#[derive(Clone, Debug)]
pub struct AddressPool {
    range: Ipv4Net,
    /// The first address of each run of free ones, and the last; runs neither touch nor overlap.
    free: BTreeMap<u32, u32>,
    /// The address that was given last.
    cursor: u32,
}

/// Why an address cannot be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PoolError {
    /// Every address is in use.
    #[error("no address of {range} is free: delete guests, or give the network a larger range")]
    Full {
        /// The range of the network.
        range: Ipv4Net,
    },
    /// The address is another guest's.
    #[error("the address {address} is in use")]
    InUse {
        /// The address.
        address: Ipv4Addr,
    },
    /// The address is none of those that guests can have.
    #[error(
        "the address {address} is none that a guest can have: the guests of {range} have its second to its last but one"
    )]
    Outside {
        /// The address.
        address: Ipv4Addr,
        /// The range of the network.
        range: Ipv4Net,
    },
}

impl AddressPool {
    /// All addresses of a range are free. A range of fewer than four addresses has none for guests.
    pub fn new(range: Ipv4Net) -> Self {
        let (network, last) = (range.network().to_bits(), range.broadcast().to_bits());
        let mut free = BTreeMap::new();
        // The first guest's is the third address: the network's and the gateway's come before it.
        if last - network >= 3 {
            free.insert(network + 2, last - 1);
        }
        Self {
            range,
            free,
            cursor: network,
        }
    }

    /// Takes the next free address.
    ///
    /// # Errors
    /// `Full`.
    pub fn allocate(&mut self) -> Result<Ipv4Addr, PoolError> {
        let next = self.cursor.saturating_add(1);
        let around = self.run_of(next).map(|_| next);
        let behind = || self.free.range(next..).next().map(|(first, _)| *first);
        let first = || self.free.first_key_value().map(|(first, _)| *first);
        let range = self.range;
        let address = around.or_else(behind).or_else(first);
        let address = Ipv4Addr::from_bits(address.ok_or(PoolError::Full { range })?);
        self.take(address)?;
        Ok(address)
    }

    /// Takes one address.
    ///
    /// # Errors
    /// `InUse` and `Outside`.
    pub fn take(&mut self, address: Ipv4Addr) -> Result<(), PoolError> {
        self.check(address)?;
        let bits = address.to_bits();
        let (first, last) = self.run_of(bits).ok_or(PoolError::InUse { address })?;
        self.free.remove(&first);
        if first < bits {
            self.free.insert(first, bits - 1);
        }
        if bits < last {
            self.free.insert(bits + 1, last);
        }
        self.cursor = bits;
        Ok(())
    }

    /// Gives an address back. Does nothing with one that is free, or none of the range.
    pub fn free(&mut self, address: Ipv4Addr) {
        let bits = address.to_bits();
        if self.check(address).is_err() || self.run_of(bits).is_some() {
            return;
        }
        let (mut first, mut last) = (bits, bits);
        // A guest's address is neither the first nor the last that there is: neither sum nor difference overflows.
        if let Some((before, _)) = self.run_of(bits - 1) {
            self.free.remove(&before);
            first = before;
        }
        if let Some(end) = self.free.remove(&(bits + 1)) {
            last = end;
        }
        self.free.insert(first, last);
    }

    /// How many addresses are free.
    pub fn available(&self) -> u64 {
        let count = |(first, last): (&u32, &u32)| u64::from(last - first) + 1;
        self.free.iter().map(count).sum()
    }

    fn check(&self, address: Ipv4Addr) -> Result<(), PoolError> {
        let range = self.range;
        let (network, last) = (range.network().to_bits(), range.broadcast().to_bits());
        let bits = address.to_bits();
        if bits > network.saturating_add(1) && bits < last {
            Ok(())
        } else {
            Err(PoolError::Outside { address, range })
        }
    }

    /// The run of free addresses that one lies in.
    fn run_of(&self, address: u32) -> Option<(u32, u32)> {
        let (first, last) = self.free.range(..=address).next_back()?;
        (address <= *last).then_some((*first, *last))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn pool(range: &str) -> AddressPool {
        AddressPool::new(range.parse().unwrap())
    }

    #[test]
    fn a_full_range_is_an_error_until_an_address_comes_back() {
        let mut pool = pool("10.0.0.0/29");
        let given: Vec<_> = (0..5)
            .map(|_| pool.allocate().unwrap().to_string())
            .collect();
        assert_eq!(
            given,
            ["10.0.0.2", "10.0.0.3", "10.0.0.4", "10.0.0.5", "10.0.0.6"]
        );
        assert!(matches!(pool.allocate(), Err(PoolError::Full { .. })));
        pool.free(Ipv4Addr::new(10, 0, 0, 4));
        assert_eq!(pool.allocate(), Ok(Ipv4Addr::new(10, 0, 0, 4)));
    }

    #[test]
    fn an_address_that_came_back_is_given_last() {
        let mut pool = pool("10.0.0.0/24");
        let first = pool.allocate().unwrap();
        pool.free(first);
        let others: Vec<_> = (0..252).map(|_| pool.allocate().unwrap()).collect();
        assert!(!others.contains(&first));
        assert_eq!(pool.allocate(), Ok(first));
    }

    #[test]
    fn the_addresses_of_network_gateway_and_broadcast_are_no_guests() {
        let mut pool = pool("10.0.0.0/24");
        for address in [
            [10, 0, 0, 0],
            [10, 0, 0, 1],
            [10, 0, 0, 255],
            [10, 0, 1, 2],
            [0, 0, 0, 0],
            [255; 4],
        ] {
            let refused = pool.take(Ipv4Addr::from(address));
            assert!(
                matches!(refused, Err(PoolError::Outside { .. })),
                "{address:?}"
            );
            pool.free(Ipv4Addr::from(address));
            assert_eq!(pool.available(), 253);
        }
    }

    #[test]
    fn the_ranges_at_both_ends_of_all_addresses_work() {
        assert_eq!(
            pool("255.255.255.252/30").allocate(),
            Ok(Ipv4Addr::new(255, 255, 255, 254))
        );
        assert_eq!(pool("0.0.0.0/30").allocate(), Ok(Ipv4Addr::new(0, 0, 0, 2)));
        assert!(pool("10.0.0.0/31").allocate().is_err());
        assert!(pool("10.0.0.0/32").allocate().is_err());
    }

    proptest! {
        /// Against a set of the addresses in use: none is given twice, and all are given.
        #[test]
        fn no_address_is_given_twice_and_none_is_lost(steps in prop::collection::vec((any::<bool>(), 0_u8..70), 1..400)) {
            let mut pool = pool("10.0.0.64/26");
            let mut used = BTreeSet::new();
            for (allocates, number) in steps {
                let address = Ipv4Addr::new(10, 0, 0, 64 + number);
                if allocates {
                    if let Ok(address) = pool.allocate() {
                        prop_assert!(used.insert(address));
                    } else {
                        prop_assert_eq!(used.len(), 61);
                    }
                } else if number % 2 == 0 {
                    pool.free(address);
                    used.remove(&address);
                } else if pool.take(address).is_ok() {
                    prop_assert!(used.insert(address));
                } else {
                    prop_assert!(used.contains(&address) || !(2..63).contains(&number));
                }
                prop_assert_eq!(pool.available(), 61 - used.len() as u64);
            }
        }
    }
}
