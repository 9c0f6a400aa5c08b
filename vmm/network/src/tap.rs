//! Taps: an Ethernet interface of the host whose other end is a descriptor (Linux, Documentation/networking/tuntap).
//!
//! A tap lives as long as its descriptor is open anywhere. The daemon opens it and hands it to the guest's process: the
//! device goes with that process, whatever becomes of the daemon, and a daemon that starts anew finds it by its name.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use rustix::net::{AddressFamily, SocketFlags, SocketType, netdevice, socket_with};

use crate::attachment::TapName;

/// What a virtio-net device puts before each frame: the header of VIRTIO 1.2, 5.1.6, with `num_buffers`.
pub const HEADER_SIZE: u8 = 12;

/// The device that taps are made of.
pub const TUN_DEVICE: &str = "/dev/net/tun";

/// Why a tap cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// The kernel has no taps.
    #[error("there is no {TUN_DEVICE}: load the kernel's module tun (modprobe tun)")]
    Missing,
    /// The device cannot be opened.
    #[error("cannot open {TUN_DEVICE}: root may, or who has CAP_NET_ADMIN and may write to it")]
    Open(#[source] io::Error),
    /// An interface has the name already.
    #[error("the interface {0} is there already, and another process holds it")]
    InUse(TapName),
    /// The kernel refuses the interface.
    #[error("cannot make the tap {name}")]
    Create {
        /// The tap.
        name: TapName,
        /// Why.
        source: io::Error,
    },
}

/// Opens the device that taps are made of, which says whether there can be any.
///
/// # Errors
/// `Missing` and `Open`.
pub fn open_device() -> Result<File, TapError> {
    let opened = OpenOptions::new().read(true).write(true).open(TUN_DEVICE);
    opened.map_err(|error| match error.raw_os_error() {
        // Without the module, the name leads to no driver.
        Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => TapError::Missing,
        _ => TapError::Open(error),
    })
}

/// Makes a tap of one queue, whose frames have a header of [`HEADER_SIZE`]. It is down.
///
/// One queue, as a device of many costs 6 MiB of kernel memory where one of one costs 56 KiB.
///
/// # Errors
/// [`TapError`].
pub fn create(name: TapName) -> Result<OwnedFd, TapError> {
    let device = open_device()?;
    let failed = |source: io::Error| match source.raw_os_error() {
        Some(libc::EBUSY | libc::EEXIST) => TapError::InUse(name),
        _ => TapError::Create { name, source },
    };
    // TUN_EXCL refuses a device that is there: nobody else's becomes a guest's.
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | libc::IFF_TUN_EXCL;
    request(&device, &name.to_string(), flags).map_err(failed)?;
    let size = libc::c_int::from(HEADER_SIZE);
    // SAFETY: the request reads an int, which lives until the call has returned.
    let set = unsafe { libc::ioctl(device.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const size) };
    if set < 0 {
        return Err(failed(io::Error::last_os_error()));
    }
    Ok(device.into())
}

pub(crate) fn request(device: &File, name: &str, flags: libc::c_int) -> io::Result<()> {
    // SAFETY: a structure of integers and unions of them, for which all zeros is a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // A zero ends the name.
    for (to, from) in request
        .ifr_name
        .iter_mut()
        .take(libc::IFNAMSIZ - 1)
        .zip(name.bytes())
    {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: the request reads and writes an `ifreq`, which lives until the call has returned.
    let set = unsafe { libc::ioctl(device.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    if set < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// The number of the interface with a name.
///
/// # Errors
/// Where there is none, or no socket can be had.
pub fn index(name: TapName) -> io::Result<u32> {
    let socket = socket_with(
        AddressFamily::INET,
        SocketType::DGRAM,
        SocketFlags::CLOEXEC,
        None,
    )?;
    Ok(netdevice::name_to_index(&socket, &name.to_string())?)
}
