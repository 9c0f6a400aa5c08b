//! A tap of the host: a network interface whose frames are read and written through descriptors (Linux,
//! Documentation/networking/tuntap.rst).

use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use libc::c_ulong;

use super::features::Offloads;
use super::header::HEADER_LEN;
use super::link::Link;

/// Longest name of an interface in bytes (`IFNAMSIZ` less its end).
pub const LONGEST_NAME: usize = libc::IFNAMSIZ - 1;

const TUN: &str = "/dev/net/tun";

/// A tap cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// The name cannot be one of an interface.
    #[error(
        "{0:.40?} is no name of a network interface: 1 to {LONGEST_NAME} bytes without / and spaces"
    )]
    Name(String),
    /// There is no such interface.
    #[error("there is no interface {name}: make it with `ip tuntap add dev {name} mode tap`")]
    Missing {
        /// The name.
        name: String,
    },
    /// Another process has it.
    #[error("the tap {name} is in use: a tap belongs to one guest")]
    InUse {
        /// The name.
        name: String,
    },
    /// The interface is no tap, or one with another number of queues.
    #[error(
        "{name} is no tap with {}: make it with `ip tuntap add dev {name} mode tap{}`",
        if *.pairs > 1 { "several queues" } else { "one queue" },
        if *.pairs > 1 { " multi_queue" } else { "" },
    )]
    OtherType {
        /// The name.
        name: String,
        /// How many pairs of queues were asked for.
        pairs: u16,
    },
    /// This user may not use it.
    #[error(
        "the tap {name} is another user's: `ip tuntap add dev {name} mode tap user USER` makes it a user's own"
    )]
    NotAllowed {
        /// The name.
        name: String,
    },
    /// A descriptor is none of a tap with headers.
    #[error("descriptor {fd} is none of a tap with headers (IFF_TAP, IFF_NO_PI and IFF_VNET_HDR)")]
    NotATap {
        /// The descriptor.
        fd: i32,
    },
    /// The host refuses something else.
    #[error("the tap {name}: {what}")]
    Host {
        /// The name, or the number of the descriptor.
        name: String,
        /// What was tried.
        what: &'static str,
        /// The host's error.
        source: io::Error,
    },
}

/// `IFF_ATTACH_QUEUE` and `IFF_DETACH_QUEUE` of `linux/if_tun.h`.
const ATTACH_QUEUE: libc::c_short = 0x0200;
const DETACH_QUEUE: libc::c_short = 0x0400;

/// A tap, by one descriptor for each pair of queues.
#[derive(Debug)]
pub struct Tap {
    queues: Vec<OwnedFd>,
    has_uso: bool,
}

/// The interface's name for `ioctl(2)`.
fn request(name: &str) -> Option<libc::ifreq> {
    // SAFETY: all of it is numbers and arrays of them, for which zeros are values.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    let is_name = (1..=LONGEST_NAME).contains(&name.len())
        && name != "."
        && name != ".."
        && name
            .bytes()
            .all(|byte| byte.is_ascii_graphic() && byte != b'/' && byte != b':');
    if !is_name {
        return None;
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    Some(request)
}

/// Whether `name` can be one of an interface of the host.
pub fn is_interface_name(name: &str) -> bool {
    request(name).is_some()
}

fn open(path: &Path) -> io::Result<File> {
    let flags = libc::O_NONBLOCK | libc::O_CLOEXEC;
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(flags)
        .open(path)
}

/// Attaches a new queue to an interface.
fn attach(file: &File, request: &mut libc::ifreq) -> io::Result<()> {
    // SAFETY: TUNSETIFF reads and writes an `ifreq`, which `request` is.
    let set = unsafe {
        libc::ioctl(
            file.as_raw_fd(),
            libc::TUNSETIFF,
            std::ptr::from_mut(request),
        )
    };
    if set < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// The flags of the interface behind a descriptor.
fn flags(tap: BorrowedFd<'_>) -> io::Result<libc::c_int> {
    // SAFETY: see `request`.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // SAFETY: TUNGETIFF writes an `ifreq`, which `request` is.
    if unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNGETIFF, &raw mut request) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: TUNGETIFF sets the flags.
    Ok(libc::c_int::from(unsafe { request.ifr_ifru.ifru_flags }))
}

fn set_header_len(tap: BorrowedFd<'_>) -> io::Result<()> {
    let len: libc::c_int = 12;
    debug_assert_eq!(len.cast_unsigned() as usize, HEADER_LEN);
    // SAFETY: TUNSETVNETHDRSZ reads an int, which `len` is.
    if unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const len) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn set_offload(tap: BorrowedFd<'_>, flags: libc::c_uint) -> io::Result<()> {
    // SAFETY: TUNSETOFFLOAD takes a number.
    if unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETOFFLOAD, c_ulong::from(flags)) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Has frames of the interface come by a queue, or not.
fn set_attached(tap: BorrowedFd<'_>, is_attached: bool) -> io::Result<()> {
    // SAFETY: see `request`.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_ifru.ifru_flags = if is_attached {
        ATTACH_QUEUE
    } else {
        DETACH_QUEUE
    };
    // SAFETY: TUNSETQUEUE reads an `ifreq`, which `request` is.
    if unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETQUEUE, &raw mut request) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn offload_flags(offloads: Offloads) -> libc::c_uint {
    let Offloads {
        csum,
        tso4,
        tso6,
        ecn,
        ufo,
        uso4,
        uso6,
    } = offloads;
    [
        (csum, libc::TUN_F_CSUM),
        (tso4, libc::TUN_F_TSO4),
        (tso6, libc::TUN_F_TSO6),
        (ecn, libc::TUN_F_TSO_ECN),
        (ufo, libc::TUN_F_UFO),
        (uso4, libc::TUN_F_USO4),
        (uso6, libc::TUN_F_USO6),
    ]
    .into_iter()
    .filter_map(|(is_on, flag)| is_on.then_some(flag))
    .fold(0, |all, flag| all | flag)
}

impl Tap {
    /// The tap of a name, which has to be there. It may also be a macvtap.
    ///
    /// # Errors
    /// [`TapError`], except `NotATap`.
    pub fn open(name: &str, pairs: u16) -> Result<Self, TapError> {
        let request = request(name).ok_or_else(|| TapError::Name(name.to_owned()))?;
        let owned = || name.to_owned();
        // TUNSETIFF would make one that is not there.
        let c_name = CString::new(name).map_err(|_| TapError::Name(owned()))?;
        // SAFETY: it reads a string that ends in a zero, which `c_name` is.
        let index = unsafe { libc::if_nametoindex(c_name.as_ptr()) };
        if index == 0 {
            return Err(TapError::Missing { name: owned() });
        }
        let macvtap = Path::new("/sys/class/net")
            .join(name)
            .join("macvtap")
            .exists();
        let path = if macvtap {
            format!("/dev/tap{index}")
        } else {
            TUN.to_owned()
        };
        let host = |what| {
            move |source| TapError::Host {
                name: owned(),
                what,
                source,
            }
        };
        let mut queues = Vec::new();
        for _ in 0..pairs {
            let file = open(Path::new(&path)).map_err(host("its device cannot be opened"))?;
            if !macvtap {
                let several = if pairs > 1 { libc::IFF_MULTI_QUEUE } else { 0 };
                let wanted = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | several;
                let mut request = request;
                request.ifr_ifru.ifru_flags = wanted as libc::c_short;
                attach(&file, &mut request).map_err(|source| match source.raw_os_error() {
                    Some(libc::EBUSY) => TapError::InUse { name: owned() },
                    Some(libc::EINVAL) => TapError::OtherType {
                        name: owned(),
                        pairs,
                    },
                    Some(libc::EPERM) => TapError::NotAllowed { name: owned() },
                    _ => host("it cannot be attached to")(source),
                })?;
            }
            queues.push(OwnedFd::from(file));
        }
        Self::checked(queues)
    }

    /// The tap that descriptors are of, one for each pair of queues. Whoever opened them may be another process.
    ///
    /// # Errors
    /// `NotATap`, `Host`.
    pub fn from_descriptors(queues: Vec<OwnedFd>) -> Result<Self, TapError> {
        Self::checked(queues)
    }

    fn checked(queues: Vec<OwnedFd>) -> Result<Self, TapError> {
        let mut has_uso = true;
        for queue in &queues {
            let fd = queue.as_raw_fd();
            let host = |what| {
                move |source| TapError::Host {
                    name: format!("of descriptor {fd}"),
                    what,
                    source,
                }
            };
            let wanted = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
            match flags(queue.as_fd()) {
                Ok(flags) if flags & (wanted | libc::IFF_TUN) == wanted => {}
                Ok(_) | Err(_) => return Err(TapError::NotATap { fd }),
            }
            set_header_len(queue.as_fd()).map_err(host("it has no headers of virtio 1"))?;
            // The read of a descriptor that another process has opened may wait.
            rustix::io::ioctl_fionbio(queue, true)
                .map_err(|error| host("it cannot be read without waiting")(error.into()))?;
            let all = Offloads {
                csum: true,
                uso4: true,
                uso6: true,
                ..Offloads::default()
            };
            has_uso &= set_offload(queue.as_fd(), offload_flags(all)).is_ok();
            set_offload(queue.as_fd(), 0).map_err(host("its offloads cannot be set"))?;
        }
        Ok(Self { queues, has_uso })
    }
}

impl Link for Tap {
    fn pairs(&self) -> u16 {
        self.queues.len() as u16
    }

    fn queue(&self, pair: u16) -> Option<BorrowedFd<'_>> {
        self.queues.get(usize::from(pair)).map(AsFd::as_fd)
    }

    fn has_uso(&self) -> bool {
        self.has_uso
    }

    fn use_pairs(&self, pairs: u16) -> io::Result<()> {
        if self.queues.len() == 1 {
            return Ok(());
        }
        for (pair, queue) in (0..).zip(&self.queues) {
            match set_attached(queue.as_fd(), pair < pairs) {
                // It is so already.
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
                set => set?,
            }
        }
        Ok(())
    }

    fn set_offloads(&self, offloads: Offloads) -> io::Result<()> {
        let flags = offload_flags(offloads);
        self.queues
            .iter()
            .try_for_each(|queue| set_offload(queue.as_fd(), flags))
    }
}
