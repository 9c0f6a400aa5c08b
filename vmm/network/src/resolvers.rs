//! The DNS servers of the host.

use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

/// Where the servers stand: the second is that of systemd-resolved, whose first names only itself.
const FILES: [&str; 2] = ["/etc/resolv.conf", "/run/systemd/resolve/resolv.conf"];

/// Why no server can be had of the host.
#[derive(Debug, thiserror::Error)]
pub enum ResolversError {
    /// None of the files names a server that another host could use.
    #[error("no file of {FILES:?} names a DNS server that guests could use; name one: dns=ADDRESS")]
    None,
    /// A file cannot be read.
    #[error("cannot read {}; name a DNS server: dns=ADDRESS", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// The DNS servers of the host that its guests can use too: none on the loopback, none of one link only.
///
/// # Errors
/// [`ResolversError`].
pub fn of_the_host() -> Result<Vec<IpAddr>, ResolversError> {
    for path in FILES.map(Path::new) {
        let text = match std::fs::read(path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(source) => {
                return Err(ResolversError::Read {
                    path: path.to_owned(),
                    source,
                });
            }
        };
        let servers = servers(&String::from_utf8_lossy(&text));
        if !servers.is_empty() {
            return Ok(servers);
        }
    }
    Err(ResolversError::None)
}

/// The servers of the text of a `resolv.conf` (resolv.conf(5)).
fn servers(text: &str) -> Vec<IpAddr> {
    let address = |line: &str| -> Option<IpAddr> {
        let mut words = line.split_ascii_whitespace();
        (words.next()? == "nameserver").then_some(())?;
        words.next()?.parse().ok()
    };
    let is_of_use = |address: &IpAddr| {
        let is_of_a_link =
            matches!(address, IpAddr::V6(address) if address.is_unicast_link_local());
        !address.is_loopback()
            && !address.is_unspecified()
            && !address.is_multicast()
            && !is_of_a_link
    };
    text.lines().filter_map(address).filter(is_of_use).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers_on_the_loopback_are_left_out() {
        let text = "# nameserver 192.0.2.9\nsearch a.b\nnameserver 127.0.0.53\nnameserver\t192.0.2.1 # x\n\
                    nameserver ::1\nnameserver fe80::1%eth0\nnameserver 2001:db8::1\nnameserver\nnameservers 192.0.2.3\n";
        assert_eq!(
            servers(text),
            [
                "192.0.2.1".parse::<IpAddr>().unwrap(),
                "2001:db8::1".parse().unwrap()
            ]
        );
        assert!(servers("options edns0\nnameserver 127.0.0.53").is_empty());
    }
}
