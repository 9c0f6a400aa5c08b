//! The guest's neighbour on its link: it gives the guest its address, and answers for its router and its metadata.
//!
//! All of it is in the guest's own process, so that nobody else parses what a guest sends to find its place in a
//! network, and a guest's identity follows from the device that the frames come from, whatever they say. What the guest
//! is given is its [`LeaseConfig`]; nothing is kept of what it sends, but for answers that wait for its buffers and
//! connections to its metadata.

mod arp;
mod dhcp;
mod ipv6;
mod metadata;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use config::{LeaseConfig, MacAddress};
use devices::service::Service;
use devices::virtio::net::Station;
use smoltcp::wire::{EthernetAddress, EthernetFrame, EthernetProtocol, EthernetRepr};

use self::metadata::Metadata;

/// Answers that wait for buffers of the guest; more are dropped, as by any network.
const MAX_ANSWERS: usize = 16;
/// Its own address, where the guest has no router here.
const OWN_MAC: [u8; 5] = *b"coppi";

/// The guest's neighbour.
pub struct GuestStation {
    lease: LeaseConfig,
    mtu: Option<u16>,
    mac: EthernetAddress,
    answers: VecDeque<Vec<u8>>,
    metadata: Option<Metadata>,
    /// The guest's own address, as its packets for the metadata service have it.
    guest: EthernetAddress,
}

impl GuestStation {
    /// One that gives the guest a lease, and an MTU, and answers for its metadata at an address.
    pub fn new(
        lease: LeaseConfig,
        mtu: Option<u16>,
        metadata: Option<(Ipv4Addr, Arc<dyn Service>)>,
    ) -> Self {
        let mac = lease.gateway_mac.unwrap_or(MacAddress::local(OWN_MAC));
        Self {
            mac: EthernetAddress(mac.bytes()),
            lease,
            mtu,
            answers: VecDeque::new(),
            metadata: metadata.map(|(address, service)| Metadata::new(address, service)),
            guest: EthernetAddress::BROADCAST,
        }
    }

    /// Whether it answers for the router.
    fn is_router(&self) -> bool {
        self.lease.gateway_mac.is_some()
    }

    fn is_metadata(&self, address: Option<Ipv4Addr>) -> bool {
        let own = self.metadata.as_ref().map(Metadata::address);
        own.is_some() && own == address
    }

    /// Whether a packet of IPv4 is for the metadata service.
    fn is_for_metadata(&self, packet: &[u8]) -> bool {
        self.metadata
            .as_ref()
            .is_some_and(|metadata| metadata.takes(packet))
    }

    /// Gives the metadata service a frame that is for it. Whether it was.
    fn ask_metadata(&mut self, frame: &[u8], now: Instant) -> bool {
        let Ok(ethernet) = EthernetFrame::new_checked(frame) else {
            return false;
        };
        let is_ipv4 = ethernet.ethertype() == EthernetProtocol::Ipv4;
        if !is_ipv4 || !self.is_for_metadata(ethernet.payload()) {
            return false;
        }
        self.guest = ethernet.src_addr();
        if let Some(metadata) = &mut self.metadata {
            metadata.receive(ethernet.payload(), now);
        }
        true
    }

    /// The answer to a frame, if it is one that is answered.
    fn answer(&self, frame: &[u8]) -> Option<Answer> {
        let ethernet = EthernetFrame::new_checked(frame).ok()?;
        let payload = ethernet.payload();
        let sender = ethernet.src_addr();
        match ethernet.ethertype() {
            EthernetProtocol::Arp => {
                arp::answer(payload, self.lease.ipv4.map(|net| net.addr()), self.mac).map(
                    |payload| Answer {
                        to: sender,
                        protocol: EthernetProtocol::Arp,
                        payload,
                    },
                )
            }
            EthernetProtocol::Ipv4 => {
                dhcp::answer(payload, &self.lease, self.mtu).map(|payload| Answer {
                    to: sender,
                    protocol: EthernetProtocol::Ipv4,
                    payload,
                })
            }
            EthernetProtocol::Ipv6 => {
                let payload = ipv6::answer(payload, &self.lease, self.mtu, self.mac)?;
                Some(Answer {
                    to: sender,
                    protocol: EthernetProtocol::Ipv6,
                    payload,
                })
            }
            EthernetProtocol::Unknown(_) => None,
        }
    }
}

/// What is sent to the guest.
struct Answer {
    to: EthernetAddress,
    protocol: EthernetProtocol,
    payload: Vec<u8>,
}

impl Answer {
    fn frame(self, from: EthernetAddress) -> Vec<u8> {
        let Self {
            to,
            protocol,
            payload,
        } = self;
        let header = EthernetRepr {
            src_addr: from,
            dst_addr: to,
            ethertype: protocol,
        };
        let mut frame = vec![0; header.buffer_len() + payload.len()];
        let mut ethernet = EthernetFrame::new_unchecked(&mut *frame);
        header.emit(&mut ethernet);
        ethernet.payload_mut().copy_from_slice(&payload);
        frame
    }
}

impl Station for GuestStation {
    fn takes(&self, head: &[u8]) -> bool {
        let Ok(ethernet) = EthernetFrame::new_checked(head) else {
            return false;
        };
        let payload = ethernet.payload();
        match ethernet.ethertype() {
            EthernetProtocol::Arp => self.is_router() || self.is_metadata(arp::target(payload)),
            EthernetProtocol::Ipv4 if self.is_for_metadata(payload) => true,
            EthernetProtocol::Ipv4 => self.lease.ipv4.is_some() && dhcp::is_for_server(payload),
            EthernetProtocol::Ipv6 => match ipv6::neighbour_discovery(payload) {
                Some(ipv6::ROUTER_SOLICITATION) => self.lease.ipv6.is_some(),
                Some(_) => self.is_router(),
                None => false,
            },
            EthernetProtocol::Unknown(_) => false,
        }
    }

    fn receive(&mut self, frame: &[u8], now: Instant) {
        if self.ask_metadata(frame, now) {
            return;
        }
        if self.answers.len() < MAX_ANSWERS
            && let Some(answer) = self.answer(frame)
        {
            self.answers.push_back(answer.frame(self.mac));
        }
    }

    fn send(&mut self, buffer: &mut [u8], now: Instant) -> Option<usize> {
        let frame = match self.answers.pop_front() {
            Some(frame) => frame,
            None => Answer {
                to: self.guest,
                protocol: EthernetProtocol::Ipv4,
                payload: self.metadata.as_mut()?.send(now)?,
            }
            .frame(self.mac),
        };
        buffer.get_mut(..frame.len())?.copy_from_slice(&frame);
        Some(frame.len())
    }

    fn wait(&mut self, now: Instant) -> Option<Duration> {
        self.metadata.as_mut()?.wait(now)
    }

    fn reset(&mut self) {
        self.answers = VecDeque::new();
        if let Some(metadata) = &mut self.metadata {
            metadata.reset();
        }
    }
}
