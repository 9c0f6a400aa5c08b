//! A host with one way out, and guests.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::OwnedFd;
use std::process::Command;

use rustix::fs::{OFlags, fcntl_setfl};
use rustix::thread::{UnshareFlags, unshare_unsafe};

use super::frames::{Frame, is_chatter};
use crate::attachment::Attachment;
use crate::host::{HostNetworks, remove_all};
use crate::mac::{address_in, gateway_mac, mac_of};
use crate::spec::{Network, Networks};
use crate::tap;

/// What stands before a frame.
const HEADER_SIZE: usize = tap::HEADER_SIZE as usize;
/// The host outside.
pub(super) const HOST4: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
pub(super) const HOST6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1);
/// A server that the default route leads to.
pub(super) const SERVER4: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 7);
pub(super) const SERVER6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 7, 0, 0, 0, 0, 7);
/// The host's Ethernet address outside, and that of its router.
pub(super) const OUTSIDE_MAC: [u8; 6] = [2, 0, 0, 0, 1, 1];
pub(super) const ROUTER_MAC: [u8; 6] = [2, 0, 0, 0, 1, 2];

/// An end of a tap: what is written arrives at the host.
pub(super) struct End(File);

impl End {
    pub(super) fn new(descriptor: OwnedFd) -> Self {
        fcntl_setfl(&descriptor, OFlags::RDWR | OFlags::NONBLOCK).unwrap();
        Self(descriptor.into())
    }

    /// The host handles a frame before the call returns.
    pub(super) fn send(&mut self, frame: &[u8]) {
        self.send_with([0; HEADER_SIZE], frame);
    }

    pub(super) fn send_with(&mut self, header: [u8; HEADER_SIZE], frame: &[u8]) {
        let mut bytes = header.to_vec();
        bytes.extend_from_slice(frame);
        // The kernel refuses a frame without an Ethernet header, which is as good as dropping it.
        let _ = self.0.write(&bytes);
    }

    /// All frames that have arrived, but what the kernel says of itself.
    pub(super) fn received(&mut self) -> Vec<Frame> {
        let mut frames = Vec::new();
        let mut buffer = vec![0; 70_000];
        loop {
            match self.0.read(&mut buffer) {
                Ok(length) => {
                    let frame = &buffer[HEADER_SIZE..length];
                    if !is_chatter(frame) {
                        frames.push(Frame::parse(frame));
                    }
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return frames,
                Err(error) => panic!("{error}"),
            }
        }
    }

    /// The one frame that has arrived.
    pub(super) fn one(&mut self) -> Frame {
        let mut frames = self.received();
        assert_eq!(frames.len(), 1, "{frames:?}");
        frames.remove(0)
    }
}

/// A guest, which does by hand what a driver would.
pub(super) struct Guest {
    pub(super) attachment: Attachment,
    pub(super) end: End,
}

impl Guest {
    pub(super) fn mac(&self) -> [u8; 6] {
        self.attachment.mac.bytes()
    }
    pub(super) fn v4(&self) -> Ipv4Addr {
        self.attachment.inner.v4
    }
    pub(super) fn v6(&self) -> Ipv6Addr {
        address_in(self.attachment.inner.v6.unwrap(), self.attachment.mac)
    }

    /// Sends what `build` makes of the guest's and the gateway's Ethernet addresses.
    pub(super) fn send(&mut self, packet: &[u8]) {
        let frame = super::frames::ethernet(self.mac(), gateway_mac().bytes(), packet);
        self.end.send(&frame);
    }

    /// The guest's address of the same family.
    pub(super) fn address_like(&self, other: IpAddr) -> IpAddr {
        if other.is_ipv4() {
            self.v4().into()
        } else {
            self.v6().into()
        }
    }
}

pub(super) struct World {
    pub(super) host: HostNetworks,
    pub(super) outside: End,
}

impl World {
    pub(super) fn with(networks: Vec<Network>) -> Self {
        let outside = outside();
        let host = HostNetworks::rebuild(Networks::new(networks).unwrap(), Vec::new()).unwrap();
        Self { host, outside }
    }

    pub(super) fn guest(&mut self, attachment: Attachment) -> Guest {
        let tap = self
            .host
            .attach(std::slice::from_ref(&attachment))
            .unwrap()
            .remove(0);
        Guest {
            attachment,
            end: End::new(tap),
        }
    }

    /// A frame from the outside to the host.
    pub(super) fn arrives(&mut self, packet: &[u8]) {
        self.outside
            .send(&super::frames::ethernet(ROUTER_MAC, OUTSIDE_MAC, packet));
    }
}

/// A network of IPv4 and IPv6.
pub(super) fn lan() -> Network {
    let mut lan = Network::new("lan", "10.1.0.0/16".parse().unwrap());
    lan.prefix = Some("fd00:1::/48".parse().unwrap());
    lan
}

/// A guest of a network with these last two bytes of its address.
pub(super) fn attachment(network: &Network, c: u8, d: u8) -> Attachment {
    let v4 =
        Ipv4Addr::from_bits(network.range.network().to_bits() | u32::from_be_bytes([0, 0, c, d]));
    let (mac, addresses) = (mac_of(v4), network.addresses_of(v4));
    Attachment {
        network: network.name.clone(),
        outer: addresses,
        inner: addresses,
        mac,
        published: Vec::new(),
    }
}

fn outside() -> End {
    let device = tap::open_device().unwrap();
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    tap::request(&device, "out0", flags).unwrap();
    let size = libc::c_int::from(tap::HEADER_SIZE);
    // SAFETY: the request reads an int, which lives until the call has returned.
    let set = unsafe {
        libc::ioctl(
            std::os::fd::AsRawFd::as_raw_fd(&device),
            libc::TUNSETVNETHDRSZ,
            &raw const size,
        )
    };
    assert_eq!(set, 0);
    for line in [
        "link set lo up",
        "link set out0 address 02:00:00:00:01:01",
        "link set out0 up",
        "address add 192.0.2.1/24 dev out0",
        "address add 2001:db8::1/64 dev out0 nodad",
        "neighbour add 192.0.2.2 lladdr 02:00:00:00:01:02 dev out0 nud permanent",
        "neighbour add 2001:db8::2 lladdr 02:00:00:00:01:02 dev out0 nud permanent",
        "route add default via 192.0.2.2",
        "route add default via 2001:db8::2",
    ] {
        ip(line);
    }
    End::new(device.into())
}

/// Runs ip(8). Returns what it prints.
pub(super) fn ip(arguments: &str) -> String {
    let output = Command::new("ip")
        .args(arguments.split(' '))
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "ip {arguments}: {said}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// What the host has of networks: interfaces, addresses, routes, neighbours and rules.
pub(super) fn state() -> String {
    let nft = Command::new("nft")
        .args(["list", "ruleset"])
        .output()
        .unwrap();
    let listed = [
        "-br address",
        "-4 route",
        "-6 route",
        "-6 route show type unreachable",
        "neighbour show nud permanent",
    ]
    .map(ip);
    listed.join("\n") + &String::from_utf8_lossy(&nft.stdout)
}

/// Runs a test in a network namespace of its own, where the machine allows that. The thread and its namespace end with
/// the test.
pub(super) fn in_namespace(test: impl FnOnce() + Send + 'static) {
    if !skip::unless_root() {
        return;
    }
    if let Err(error) = tap::open_device() {
        return skip::because(&report::chain(&error).to_string());
    }
    for program in ["nft", "ip"] {
        if Command::new(program).arg("-V").output().is_err() {
            return skip::because(&format!("there is no program {program}"));
        }
    }
    let name = std::thread::current().name().unwrap_or_default().to_owned();
    let in_thread = std::thread::Builder::new().name(name).spawn(|| {
        // SAFETY: only the network namespace of this thread changes, and no descriptor of the old one is used in it.
        unsafe { unshare_unsafe(UnshareFlags::NEWNET) }.unwrap();
        test();
        remove_all().unwrap();
    });
    if let Err(panic) = in_thread.unwrap().join() {
        std::panic::resume_unwind(panic);
    }
}
