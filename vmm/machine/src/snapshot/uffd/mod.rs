//! Guest memory whose pages another process, the page-fault handler, provides one by one when they are first touched:
//! Firecracker's `mem_backend` of type `Uffd`.
//!
//! ```text
//! connect ── (jail) ── serve: register RAM ── mappings + descriptor ─> handler
//!                        vCPU, device, KVM touch a page ── fault ────> handler ── UFFDIO_COPY ─> they go on
//!                        a page is given back ── UFFD_EVENT_REMOVE ──> handler, which gives zeros from then on
//!                        the handler goes ── hangup of the socket ───> the guest ends
//! ```
//!
//! This process keeps the descriptor as well. If it did not, the kernel would provide zeros for all remaining pages
//! once the handler has ended, and the guest would go on with those. As it does, a thread that touches such a page
//! waits, and the guest is ended.
//!
//! Pages of files that the memory manager maps over registered pages are not registered, so the handler need not
//! provide them.

mod sys;
#[cfg(test)]
mod tests;
mod watch;

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memshare::SharedMemory;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde::Serialize;

use self::sys::{OpenFailure, Userfault};
use self::watch::Watch;

/// Why a guest cannot get its memory from a page-fault handler.
#[derive(Debug, thiserror::Error)]
pub enum UffdError {
    /// Nobody listens at the socket.
    #[error(
        "cannot connect to the page-fault handler at {} (start it first, and let it listen there; in a jail, its socket has to be given as allow=)",
        path.display()
    )]
    Connect {
        /// The socket.
        path: PathBuf,
        /// The host's error.
        source: io::Error,
    },
    /// The process may not have a descriptor that reports the pages that KVM touches.
    #[error(
        "cannot make a userfaultfd that sees the kernel's faults: {call}; set vm.unprivileged_userfaultfd to 1, or let the guest's user read and write /dev/userfaultfd (in a jail, with allow=/dev/userfaultfd), or load by coppice run --restore with CAP_SYS_PTRACE; /dev/userfaultfd"
    )]
    Open {
        /// The error of userfaultfd(2); the source is that of the device, which was asked last.
        call: io::Error,
        /// The error of `/dev/userfaultfd`.
        #[source]
        device: io::Error,
    },
    /// The kernel does not have the features that are needed.
    #[error(
        "the host's userfaultfd does not tell of pages that are given back (UFFD_FEATURE_EVENT_REMOVE), as Linux from 4.11 on does"
    )]
    Features(#[source] io::Error),
    /// RAM cannot be registered with the descriptor.
    #[error("cannot register guest RAM with userfaultfd")]
    Register(#[source] io::Error),
    /// The saved RAM is of another size than the guest's.
    #[error("the state says memory is {saved:#x} bytes, and the guest has {present:#x}")]
    Size {
        /// Bytes by the state.
        saved: u64,
        /// Bytes of the guest.
        present: u64,
    },
    /// The handler does not take the descriptor.
    #[error("the page-fault handler at {} does not take the descriptor", path.display())]
    Send {
        /// The socket.
        path: PathBuf,
        /// The host's error.
        source: io::Error,
    },
    /// The host has no thread or descriptor left.
    #[error("cannot watch over the page-fault handler")]
    Watch(#[source] io::Error),
}

impl From<OpenFailure> for UffdError {
    fn from(failure: OpenFailure) -> Self {
        match failure {
            OpenFailure::Refused { call, device } => Self::Open { call, device },
            OpenFailure::Features(error) => Self::Features(error),
        }
    }
}

/// Where a region of RAM is in this process, and where its bytes are in the memory file, as Firecracker sends it to
/// handlers.
#[derive(Debug, Serialize)]
struct Mapping {
    base_host_virt_addr: u64,
    size: u64,
    offset: u64,
    page_size: u64,
    /// In bytes, in spite of its name: Firecracker sends bytes, and its handlers expect them.
    page_size_kib: u64,
}

fn mappings(memory: &SharedMemory, page_size: u64) -> Vec<Mapping> {
    let mut offset = 0;
    let regions = memory.regions().iter();
    regions
        .map(|region| {
            let size = region.window.len();
            let mapping = Mapping {
                base_host_virt_addr: region.window.as_ptr() as u64,
                size,
                offset,
                page_size,
                page_size_kib: page_size,
            };
            offset += size;
            mapping
        })
        .collect()
}

/// The connection to a page-fault handler that provides no pages yet.
#[derive(Debug)]
pub struct PageServer {
    path: PathBuf,
    socket: UnixStream,
    uffd: Arc<Userfault>,
}

impl PageServer {
    /// Connects to the handler that listens at `path`, and makes the descriptor. When both are made before the jail is
    /// entered, the jail needs to allow neither.
    ///
    /// # Errors
    /// `Connect`, `Open`, `Features`.
    pub fn connect(path: &Path) -> Result<Self, UffdError> {
        let socket = UnixStream::connect(path).map_err(|source| UffdError::Connect {
            path: path.to_owned(),
            source,
        })?;
        let uffd = Userfault::open()?;
        Ok(Self {
            path: path.to_owned(),
            socket,
            uffd: Arc::new(uffd),
        })
    }

    /// Has the handler provide the pages of RAM, each of `page_size` bytes, which nobody has touched yet, and which is
    /// `bytes` long by the state. If the handler ends while the returned value lives, `on_lost` is called with the
    /// reason for the guest's end, and the process is ended if it has not ended by itself a few seconds later.
    ///
    /// # Errors
    /// `Size`, `Register`, `Send`, `Watch`.
    pub fn serve(
        &self,
        (memory, page_size): (&SharedMemory, u64),
        bytes: u64,
        on_lost: Box<dyn Fn(String) + Send>,
    ) -> Result<Served, UffdError> {
        let present = memory.bytes();
        if present != bytes {
            return Err(UffdError::Size {
                saved: bytes,
                present,
            });
        }
        for region in memory.regions() {
            self.uffd
                .register(&region.window)
                .map_err(UffdError::Register)?;
        }
        memory.untouched_is_unknown();
        self.send(&mappings(memory, page_size))
            .map_err(|source| UffdError::Send {
                path: self.path.clone(),
                source,
            })?;
        let socket = self.socket.try_clone().map_err(UffdError::Watch)?;
        let watch = Watch::start(socket, &self.path, on_lost).map_err(UffdError::Watch)?;
        Ok(Served {
            _watch: watch,
            _uffd: self.uffd.clone(),
        })
    }

    /// Sends everything in one message, because the descriptor is received with the first byte.
    fn send(&self, mappings: &[Mapping]) -> io::Result<()> {
        let json = serde_json::to_vec(mappings)?;
        let descriptors = [self.uffd.as_fd()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !ancillary.push(SendAncillaryMessage::ScmRights(&descriptors)) {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        let sent = sendmsg(
            &self.socket,
            &[IoSlice::new(&json)],
            &mut ancillary,
            SendFlags::NOSIGNAL,
        )?;
        if sent != json.len() {
            return Err(io::ErrorKind::WriteZero.into());
        }
        Ok(())
    }
}

/// Guest memory that a handler provides for as long as this lives. After that, the pages that are missing read as
/// zeros, so no vCPU and no device may touch them.
#[derive(Debug)]
pub struct Served {
    /// The watch is dropped before the descriptor: the handler may end as soon as it sees the descriptor closed.
    _watch: Watch,
    _uffd: Arc<Userfault>,
}
