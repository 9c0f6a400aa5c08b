//! Ethernet addresses of guests, and the IPv6 addresses that follow from them.

use std::net::{Ipv4Addr, Ipv6Addr};

use config::MacAddress;
use ipnet::Ipv6Net;

/// The address of the host's end of every tap, so that a clone finds the gateway where its template had it.
pub fn gateway_mac() -> MacAddress {
    MacAddress::local([0, 0, 0, 0, 1])
}

/// The address of the guest that has `address`: another one for each IP address.
pub fn mac_of(address: Ipv4Addr) -> MacAddress {
    let [first, second, third, fourth] = address.octets();
    MacAddress::local([0, first, second, third, fourth])
}

/// The address that a guest with an interface gives itself in a prefix of 64 bits, unless it hides its interface (RFC
/// 4291, appendix A).
pub fn address_in(prefix: Ipv6Net, mac: MacAddress) -> Ipv6Addr {
    let [first, second, third, fourth, fifth, sixth] = mac.bytes();
    let interface = [first ^ 2, second, third, 0xff, 0xfe, fourth, fifth, sixth];
    let interface = u128::from(u64::from_be_bytes(interface));
    Ipv6Addr::from_bits(prefix.network().to_bits() | interface)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_interface_identifier_is_that_of_rfc_4291() {
        let mac = "34:56:78:9a:bc:de".parse().unwrap();
        let address = address_in("fd00:1::/64".parse().unwrap(), mac);
        assert_eq!(address.to_string(), "fd00:1::3656:78ff:fe9a:bcde");
    }

    #[test]
    fn a_guest_has_another_address_than_its_gateway() {
        let mac = mac_of(Ipv4Addr::new(172, 16, 0, 2));
        assert_eq!(mac.to_string(), "02:00:ac:10:00:02");
        assert_eq!(gateway_mac().to_string(), "02:00:00:00:00:01");
    }
}
