//! Settings of the kernel below `/proc/sys/net`. They are those of the network namespace of the calling thread.

use std::io;
use std::path::{Path, PathBuf};

/// A setting that cannot be read or written.
#[derive(Debug, thiserror::Error)]
#[error("cannot set {}; where /proc/sys cannot be written, as in a container, set it outside", path.display())]
pub struct SysctlError {
    path: PathBuf,
    source: io::Error,
}

const IPV4: &str = "/proc/sys/net/ipv4/conf";
const IPV6: &str = "/proc/sys/net/ipv6/conf";

/// What a tap has of IPv4: it forwards, and answers nothing by itself. The rules drop what a guest sends to the
/// loopback; that the host can reach a published port by it needs `route_localnet`.
const TAP4: [(&str, &str); 5] = [
    ("forwarding", "1"),
    ("rp_filter", "1"),
    ("accept_redirects", "0"),
    ("send_redirects", "0"),
    ("route_localnet", "1"),
];

/// What a tap has of IPv6: no address of its own, and nothing of what a guest says of routes or neighbours is taken.
const TAP6: [(&str, &str); 5] = [
    ("addr_gen_mode", "1"),
    ("accept_ra", "0"),
    ("accept_redirects", "0"),
    ("accept_dad", "0"),
    ("dad_transmits", "0"),
];

/// Sets what a tap needs. It has to be down: IPv6 takes memory of an interface when that goes up.
pub(crate) fn set_tap(name: &str, has_ipv6: bool) -> Result<(), SysctlError> {
    for (setting, value) in TAP4 {
        write(&Path::new(IPV4).join(name).join(setting), value)?;
    }
    let folder = Path::new(IPV6).join(name);
    if has_ipv6 {
        for (setting, value) in TAP6 {
            write(&folder.join(setting), value)?;
        }
    } else if folder.exists() {
        write(&folder.join("disable_ipv6"), "1")?;
    }
    Ok(())
}

/// Lets what arrives at an interface be forwarded, as answers to guests have to be.
///
/// The setting of all interfaces would make the host a router between any two of them.
pub(crate) fn forward_from(interface: &str) -> Result<(), SysctlError> {
    set(&Path::new(IPV4).join(interface).join("forwarding"), "1")
}

/// Lets the host forward IPv6, which only can be said of all interfaces.
///
/// A host that forwards takes no more routes from router advertisements, unless it is told to: an interface that took
/// them goes on to.
pub(crate) fn forward_ipv6() -> Result<(), SysctlError> {
    let all = Path::new(IPV6).join("all/forwarding");
    if read(&all)? == "1" {
        return Ok(());
    }
    let failed = |source| SysctlError {
        path: IPV6.into(),
        source,
    };
    for entry in Path::new(IPV6).read_dir().map_err(failed)? {
        let accept = entry.map_err(failed)?.path().join("accept_ra");
        // An interface may go while the others are looked at.
        if read(&accept).is_ok_and(|value| value == "1") {
            write(&accept, "2")?;
        }
    }
    write(&all, "1")
}

fn set(path: &Path, value: &str) -> Result<(), SysctlError> {
    if read(path)? == value {
        Ok(())
    } else {
        write(path, value)
    }
}

fn read(path: &Path) -> Result<String, SysctlError> {
    let text = std::fs::read_to_string(path);
    let failed = |source| SysctlError {
        path: path.to_owned(),
        source,
    };
    text.map(|text| text.trim().to_owned()).map_err(failed)
}

fn write(path: &Path, value: &str) -> Result<(), SysctlError> {
    let failed = |source| SysctlError {
        path: path.to_owned(),
        source,
    };
    std::fs::write(path, value).map_err(failed)
}
