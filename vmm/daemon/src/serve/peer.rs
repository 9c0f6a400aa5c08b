//! Which user is at the other end of the socket, and whether that user may call.
//!
//! Root and the user of the daemon may call, users that `--allow-uid` names, and members of the group of
//! `--socket-group`. Who a caller is comes from the kernel (`SO_PEERCRED`, `SO_PEERGROUPS`; unix(7)), and never from
//! the request.

use std::net::IpAddr;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Who may call.
#[derive(Clone, Debug, Default)]
pub struct Allowed {
    /// Users beside root and the daemon's.
    pub uids: Vec<u32>,
    /// A group.
    pub gid: Option<u32>,
}

/// The caller of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Caller {
    /// A user, by the socket.
    User(u32),
    /// Anybody, by the address for reading: the connection is to this one of the host's addresses.
    Web(IpAddr),
}

const MAX_GROUPS: usize = 1024;

/// The further groups of the process at the other end.
fn groups(socket: BorrowedFd<'_>) -> Vec<u32> {
    let mut groups = vec![0u32; MAX_GROUPS];
    let mut len = (MAX_GROUPS * size_of::<u32>()) as libc::socklen_t;
    // SAFETY: the kernel writes `len` bytes at most, which the vector has; a gid_t is an u32, and any bits are one.
    let done = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERGROUPS,
            groups.as_mut_ptr().cast(),
            &raw mut len,
        )
    };
    groups.truncate(if done == 0 {
        len as usize / size_of::<u32>()
    } else {
        0
    });
    groups
}

impl Allowed {
    /// Whether the user at the other end of `socket` may call.
    pub fn admits(&self, uid: u32, gid: u32, socket: BorrowedFd<'_>) -> bool {
        let own = rustix::process::geteuid().as_raw();
        uid == 0
            || uid == own
            || self.uids.contains(&uid)
            || self
                .gid
                .is_some_and(|wanted| wanted == gid || groups(socket).contains(&wanted))
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn only_those_who_are_named_may_call() {
        let (socket, _other) = UnixStream::pair().unwrap();
        let allowed = Allowed {
            uids: vec![12],
            gid: Some(34),
        };
        assert!(allowed.admits(0, 9, socket.as_fd()));
        assert!(allowed.admits(12, 9, socket.as_fd()));
        assert!(allowed.admits(13, 34, socket.as_fd()));
        let strangers = 4_000_000_000;
        assert!(!allowed.admits(strangers, strangers, socket.as_fd()));
    }
}
