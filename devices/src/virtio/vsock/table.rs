//! The connections of a guest, and the memory that they may take.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::Arc;

use super::connection::{Connection, Peer, Stage};
use super::metrics::VsockMetrics;
use super::packet::Key;
use crate::metrics::add;

/// Bytes that all connections together may keep for the host, however slow that is.
const POOL: u32 = 512 << 10;
/// The room of a connection is this part of what is left of the pool, in whole pages.
const PART: u32 = 16;
const PAGE: u32 = 4096;
/// Connections to services at the same time.
const MAX_SERVED: usize = 4;
/// Ports that connections of the host have on its side, as with Firecracker.
const FIRST_PORT: u32 = 1 << 30;
const PORTS: u32 = 1 << 30;

/// There is no room for one more.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Full;

pub(super) struct Table {
    connections: BTreeMap<Key, Connection>,
    /// What of the pool no connection has.
    left: u32,
    next_port: u32,
    /// The connection that had the last turn.
    last: Key,
    metrics: Arc<VsockMetrics>,
}

impl Table {
    pub(super) fn new(metrics: Arc<VsockMetrics>) -> Self {
        Self {
            connections: BTreeMap::new(),
            left: POOL,
            next_port: 0,
            last: Key { guest: 0, host: 0 },
            metrics,
        }
    }

    /// The room that one more connection would have; the first have more than those that come when there are many.
    fn share(&self) -> Result<u32, Full> {
        let share = (self.left / PART / PAGE * PAGE).max(PAGE);
        if share <= self.left {
            Ok(share)
        } else {
            Err(Full)
        }
    }

    /// Adds a connection. There is none of that name.
    ///
    /// # Errors
    /// `Full`.
    pub(super) fn open(&mut self, key: Key, peer: Peer, stage: Stage) -> Result<(), Full> {
        let share = self.share()?;
        let connection = Connection::new(peer, stage, share);
        let mut others = self.connections.values();
        if connection.is_service()
            && others.by_ref().filter(|c| c.is_service()).count() >= MAX_SERVED
        {
            return Err(Full);
        }
        self.left -= share;
        self.connections.insert(key, connection);
        add(&self.metrics.opened, 1);
        add(&self.metrics.connections, 1);
        Ok(())
    }

    pub(super) fn has_room(&self) -> bool {
        self.share().is_ok()
    }

    /// A port of the host's side for a connection to `guest`.
    pub(super) fn free_port(&mut self, guest: u32) -> Key {
        loop {
            let host = FIRST_PORT + self.next_port % PORTS;
            self.next_port = (self.next_port + 1) % PORTS;
            let key = Key { guest, host };
            // There are fewer connections than ports.
            if !self.connections.contains_key(&key) {
                return key;
            }
        }
    }

    pub(super) fn get(&mut self, key: Key) -> Option<&mut Connection> {
        self.connections.get_mut(&key)
    }

    /// Ends a connection: what it kept goes, and the host's side is closed. Whether there was one.
    pub(super) fn close(&mut self, key: Key) -> bool {
        let Some(connection) = self.connections.remove(&key) else {
            return false;
        };
        self.left += connection.buf_alloc();
        self.metrics
            .connections
            .fetch_sub(1, std::sync::atomic::Ordering::Relaxed);
        true
    }

    pub(super) fn clear(&mut self) {
        let keys: Vec<_> = self.connections.keys().copied().collect();
        for key in keys {
            self.close(key);
        }
    }

    /// The next connection that may have a packet for the guest: each has its turn.
    pub(super) fn next(&mut self) -> Option<Key> {
        let behind = (Bound::Excluded(self.last), Bound::Unbounded);
        let before = (Bound::Unbounded, Bound::Included(self.last));
        let turn = self.connections.range(behind);
        let mut turn = turn.chain(self.connections.range(before));
        let (key, _) = turn.find(|(_, connection)| connection.wants())?;
        self.last = *key;
        Some(*key)
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.connections.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Silent;

    impl crate::service::Session for Silent {
        fn receive(&mut self, _: &[u8]) {}
        fn send(&mut self, _: &mut [u8]) -> Option<usize> {
            None
        }
    }

    fn stream() -> Peer {
        Peer::Stream(std::os::unix::net::UnixStream::pair().unwrap().0)
    }

    #[test]
    fn all_connections_together_have_no_more_room_than_the_pool() {
        let mut table = Table::new(Arc::default());
        let mut shares = Vec::new();
        while table.has_room() {
            let key = table.free_port(1);
            table.open(key, stream(), Stage::Open).unwrap();
            shares.push(table.get(key).unwrap().buf_alloc());
        }
        assert_eq!(shares.iter().sum::<u32>(), POOL);
        assert_eq!((shares[0], shares.last()), (32 << 10, Some(&PAGE)));
        assert_eq!(shares.len(), 56);
        let key = table.free_port(1);
        assert_eq!(table.open(key, stream(), Stage::Open), Err(Full));
        table.clear();
        assert_eq!((table.len(), table.left), (0, POOL));
    }

    #[test]
    fn few_connections_go_to_services() {
        let mut table = Table::new(Arc::default());
        for port in 0..=MAX_SERVED as u32 {
            let key = Key {
                guest: port,
                host: 80,
            };
            let opened = table.open(key, Peer::Service(Box::new(Silent)), Stage::Open);
            assert_eq!(opened.is_ok(), (port as usize) < MAX_SERVED);
        }
    }

    #[test]
    fn each_connection_has_its_turn() {
        let mut table = Table::new(Arc::default());
        for host in 0..3 {
            let key = Key { guest: 1, host };
            table.open(key, stream(), Stage::ToRequest).unwrap();
        }
        let turns: Vec<_> = (0..6).map(|_| table.next().unwrap().host).collect();
        assert_eq!(turns, [0, 1, 2, 0, 1, 2]);
    }
}
