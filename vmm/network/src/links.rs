//! The requests by which the host learns of guests, and what it has of them.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use config::MacAddress;
use ipnet::IpNet;
use netlink_packet_route::address::{
    AddressAttribute, AddressHeaderFlags, AddressMessage, AddressProtocol, AddressScope,
};
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use crate::attachment::TapName;
use crate::mac::gateway_mac;
use crate::netlink::{Netlink, NetlinkError, Request};

/// Routes and addresses of ours carry this number (`/etc/iproute2/rt_protos`), by which the next start finds them.
const PROTOCOL: u8 = 142;
/// The name of our addresses for kernels before 5.18, which know no number of an address.
const LABEL: &str = "lo:coppice";
/// Every network namespace has it first.
const LOOPBACK: u32 = 1;
/// The kernel's own limit of 1000 packets would cost a tap 8 KiB.
const TX_QUEUE_LEN: u32 = 32;
/// The group of interfaces that are about to be deleted: a number that nobody else has.
const LEAVING: u32 = u32::from_be_bytes(*b"copp");

/// Brings a tap up: as the host's end of it has no part in ARP, it is told where the guest is.
pub(crate) fn bring_up(name: TapName, index: u32, mtu: u16) -> Request {
    let mut link = LinkMessage::default();
    let flags = LinkFlags::Up | LinkFlags::Noarp;
    (
        link.header.index,
        link.header.flags,
        link.header.change_mask,
    ) = (index, flags, flags);
    link.attributes = vec![
        LinkAttribute::Address(gateway_mac().bytes().to_vec()),
        LinkAttribute::TxQueueLen(TX_QUEUE_LEN),
        LinkAttribute::Mtu(mtu.into()),
        LinkAttribute::Group(0),
    ];
    Request::change(
        format!("bring the tap {name} up"),
        RouteNetlinkMessage::SetLink(link),
    )
}

/// Deletes taps, all of them in one step: the kernel waits for all CPUs at each, which is 18 ms for one as for a
/// thousand.
pub(crate) fn delete(netlink: &mut Netlink, taps: &[(TapName, u32)]) -> Result<(), NetlinkError> {
    if taps.is_empty() {
        return Ok(());
    }
    let leave = |(name, index): &(TapName, u32)| {
        let mut link = LinkMessage::default();
        link.header.index = *index;
        link.attributes.push(LinkAttribute::Group(LEAVING));
        let what = format!("mark the tap {name} for deletion");
        Request::change(what, RouteNetlinkMessage::SetLink(link))
    };
    netlink.send_all_but_gone(taps.iter().map(leave).collect())?;
    let mut all = LinkMessage::default();
    all.attributes.push(LinkAttribute::Group(LEAVING));
    let delete = Request::change("delete taps", RouteNetlinkMessage::DelLink(all));
    netlink.send_all_but_gone(vec![delete])
}

/// The guest of a tap, as the way to its IPv6 network: one neighbour stands for all addresses that the guest takes.
pub(crate) const GUEST6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 2);

/// Leads packets for what is a guest's to its tap. What the host itself sends there has the gateway's address.
pub(crate) fn route(to: IpNet, tap: TapName, index: u32, from: Option<IpAddr>) -> Request {
    let mut route = route_message(to, RouteType::Unicast);
    let attributes = &mut route.attributes;
    attributes.push(RouteAttribute::Oif(index));
    if let IpNet::V6(_) = to {
        attributes.push(RouteAttribute::Gateway(IpAddr::V6(GUEST6).into()));
    }
    attributes.extend(from.map(|from| RouteAttribute::PrefSource(from.into())));
    let what = format!("route {to} to {tap}");
    Request::put(what, RouteNetlinkMessage::NewRoute(route))
}

/// Refuses packets for addresses of a network that no guest has, which the default route would take out of the host.
pub(crate) fn unreachable(range: IpNet) -> Request {
    let route = route_message(range, RouteType::Unreachable);
    Request::put(
        format!("refuse what is sent to unused addresses of {range}"),
        RouteNetlinkMessage::NewRoute(route),
    )
}

fn route_message(to: IpNet, kind: RouteType) -> RouteMessage {
    let mut route = RouteMessage::default();
    route.header = RouteHeader {
        address_family: family(to.addr()),
        destination_prefix_length: to.prefix_len(),
        table: RouteHeader::RT_TABLE_MAIN,
        protocol: RouteProtocol::Other(PROTOCOL),
        scope: match (kind, to) {
            (RouteType::Unicast, IpNet::V4(_)) => RouteScope::Link,
            _ => RouteScope::Universe,
        },
        kind,
        ..RouteHeader::default()
    };
    route
        .attributes
        .push(RouteAttribute::Destination(to.addr().into()));
    route
}

/// Tells the host the Ethernet address of a guest for good.
///
/// An IPv4 address is the one that the guest has of itself: the kernel looks the neighbour up after the rules have
/// translated a packet's destination.
pub(crate) fn neighbour(address: IpAddr, tap: TapName, index: u32, mac: MacAddress) -> Request {
    let mut neighbour = NeighbourMessage::default();
    neighbour.header.family = family(address);
    neighbour.header.ifindex = index;
    neighbour.header.state = NeighbourState::Permanent;
    let to = match address {
        IpAddr::V4(address) => NeighbourAddress::Inet(address),
        IpAddr::V6(address) => NeighbourAddress::Inet6(address),
    };
    neighbour.attributes = vec![
        NeighbourAttribute::Destination(to),
        NeighbourAttribute::LinkLayerAddress(mac.bytes().to_vec()),
    ];
    let what = format!("enter {mac} as the neighbour {address} at {tap}");
    Request::put(what, RouteNetlinkMessage::NewNeighbour(neighbour))
}

/// Gives the host the address of a gateway, on its loopback: errors are sent from there, and guests that may reach the
/// host have one address for it.
pub(crate) fn gateway(address: IpAddr) -> Request {
    let message = RouteNetlinkMessage::NewAddress(address_message(address));
    Request::put(format!("take the gateway's address {address}"), message)
}

fn address_message(address: IpAddr) -> AddressMessage {
    let mut message = AddressMessage::default();
    let host = IpNet::from(address);
    message.header.family = family(address);
    message.header.prefix_len = host.prefix_len();
    message.header.scope = AddressScope::Universe;
    message.header.index = LOOPBACK;
    message.attributes = vec![
        AddressAttribute::Local(address),
        AddressAttribute::Address(address),
        AddressAttribute::Protocol(AddressProtocol::Other(PROTOCOL)),
    ];
    match address {
        IpAddr::V4(_) => message
            .attributes
            .push(AddressAttribute::Label(LABEL.to_owned())),
        // Nobody else on the loopback could have the address.
        IpAddr::V6(_) => message.header.flags = AddressHeaderFlags::Nodad,
    }
    message
}

fn family(address: IpAddr) -> AddressFamily {
    match address {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    }
}

/// A tap of ours that the host has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Tap {
    pub(crate) name: TapName,
    pub(crate) index: u32,
    pub(crate) counters: Counters,
}

/// What has passed a guest's tap, as the guest sees it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Bytes of frames that the guest received.
    pub received_bytes: u64,
    /// Frames that the guest received.
    pub received_packets: u64,
    /// Frames that were lost as the guest did not take them in time.
    pub received_dropped: u64,
    /// Bytes of frames that the guest sent.
    pub sent_bytes: u64,
    /// Frames that the guest sent.
    pub sent_packets: u64,
}

impl Tap {
    pub(crate) fn id(&self) -> (TapName, u32) {
        (self.name, self.index)
    }
}

/// The taps of ours.
pub(crate) fn taps(netlink: &mut Netlink) -> Result<Vec<Tap>, NetlinkError> {
    let links = netlink.dump(RouteNetlinkMessage::GetLink(LinkMessage::default()))?;
    Ok(links.iter().filter_map(tap).collect())
}

fn tap(message: &RouteNetlinkMessage) -> Option<Tap> {
    let RouteNetlinkMessage::NewLink(link) = message else {
        return None;
    };
    let name = |attribute: &LinkAttribute| match attribute {
        LinkAttribute::IfName(name) => TapName::parse(name),
        _ => None,
    };
    // What the host's end received is what the guest sent.
    let counters = |attribute: &LinkAttribute| match attribute {
        LinkAttribute::Stats64(stats) => Some(Counters {
            received_bytes: stats.tx_bytes,
            received_packets: stats.tx_packets,
            received_dropped: stats.tx_dropped,
            sent_bytes: stats.rx_bytes,
            sent_packets: stats.rx_packets,
        }),
        _ => None,
    };
    Some(Tap {
        name: link.attributes.iter().find_map(name)?,
        index: link.header.index,
        counters: link
            .attributes
            .iter()
            .find_map(counters)
            .unwrap_or_default(),
    })
}

/// An address of the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct HostAddress {
    pub(crate) address: IpAddr,
    pub(crate) is_ours: bool,
}

/// All addresses of the host.
pub(crate) fn addresses(netlink: &mut Netlink) -> Result<Vec<HostAddress>, NetlinkError> {
    let found = netlink.dump(RouteNetlinkMessage::GetAddress(AddressMessage::default()))?;
    let address = |message: &RouteNetlinkMessage| {
        let RouteNetlinkMessage::NewAddress(message) = message else {
            return None;
        };
        let is_ours = message.header.index == LOOPBACK && message.attributes.iter().any(is_mark);
        let address = |attribute: &AddressAttribute| match attribute {
            AddressAttribute::Address(address) => Some(*address),
            _ => None,
        };
        let local = |attribute: &AddressAttribute| match attribute {
            AddressAttribute::Local(address) => Some(*address),
            _ => None,
        };
        let attributes = &message.attributes;
        let address = attributes
            .iter()
            .find_map(local)
            .or_else(|| attributes.iter().find_map(address))?;
        Some(HostAddress { address, is_ours })
    };
    Ok(found.iter().filter_map(address).collect())
}

fn is_mark(attribute: &AddressAttribute) -> bool {
    match attribute {
        AddressAttribute::Protocol(protocol) => *protocol == AddressProtocol::Other(PROTOCOL),
        AddressAttribute::Label(label) => label == LABEL,
        _ => false,
    }
}

pub(crate) fn delete_address(address: IpAddr) -> Request {
    let message = RouteNetlinkMessage::DelAddress(address_message(address));
    Request::change(format!("give the address {address} up"), message)
}

/// The routes of the main table.
pub(crate) fn routes(netlink: &mut Netlink) -> Result<Vec<RouteMessage>, NetlinkError> {
    let mut found = Vec::new();
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        let mut all = RouteMessage::default();
        all.header.address_family = family;
        for message in netlink.dump(RouteNetlinkMessage::GetRoute(all))? {
            if let RouteNetlinkMessage::NewRoute(route) = message
                && route.header.table == RouteHeader::RT_TABLE_MAIN
            {
                found.push(route);
            }
        }
    }
    Ok(found)
}

/// Whether a route is one of ours.
pub(crate) fn is_ours(route: &RouteMessage) -> bool {
    route.header.protocol == RouteProtocol::Other(PROTOCOL)
}

/// Where a route leads to; `None` for what is neither IPv4 nor IPv6.
pub(crate) fn destination(route: &RouteMessage) -> Option<IpNet> {
    let address = |attribute: &RouteAttribute| match attribute {
        RouteAttribute::Destination(RouteAddress::Inet(address)) => Some(IpAddr::V4(*address)),
        RouteAttribute::Destination(RouteAddress::Inet6(address)) => Some(IpAddr::V6(*address)),
        _ => None,
    };
    // A default route has no destination.
    let any = match route.header.address_family {
        AddressFamily::Inet => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        AddressFamily::Inet6 => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        _ => return None,
    };
    let address = route.attributes.iter().find_map(address).unwrap_or(any);
    IpNet::new(address, route.header.destination_prefix_length).ok()
}

/// The interfaces that a route leads to.
pub(crate) fn interfaces(route: &RouteMessage) -> Vec<u32> {
    let of = |attribute: &RouteAttribute| match attribute {
        RouteAttribute::Oif(index) => vec![*index],
        RouteAttribute::MultiPath(hops) => hops.iter().map(|hop| hop.interface_index).collect(),
        _ => Vec::new(),
    };
    route.attributes.iter().flat_map(of).collect()
}

pub(crate) fn delete_route(route: RouteMessage) -> Request {
    let to = destination(&route)
        .map(|to| to.to_string())
        .unwrap_or_default();
    Request::change(
        format!("delete the route to {to}"),
        RouteNetlinkMessage::DelRoute(route),
    )
}

/// The name of an interface.
pub(crate) fn interface_name(
    netlink: &mut Netlink,
    index: u32,
) -> Result<Option<String>, NetlinkError> {
    let links = netlink.dump(RouteNetlinkMessage::GetLink(LinkMessage::default()))?;
    Ok(links.into_iter().find_map(|message| match message {
        RouteNetlinkMessage::NewLink(link) if link.header.index == index => link
            .attributes
            .into_iter()
            .find_map(|attribute| match attribute {
                LinkAttribute::IfName(name) => Some(name),
                _ => None,
            }),
        _ => None,
    }))
}
