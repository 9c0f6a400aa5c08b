//! Guest memory whose pages another process gives, one by one, when they are first touched: Firecracker's `mem_backend`
//! of type `Uffd`.
//!
//! ```text
//! connect ── (jail) ── serve: register RAM ── mappings + descriptor ─> handler
//!                        vCPU, device, KVM touch a page ── fault ────> handler ── UFFDIO_COPY ─> they go on
//!                        a page is given back ── UFFD_EVENT_REMOVE ──> handler, which gives zeros from then on
//!                        the handler goes ── hangup of the socket ───> the guest ends
//! ```
//!
//! This process keeps the descriptor as well. If it did not, the kernel would give zeros for all pages that are left
//! once the handler has gone, and the guest would go on with those; so it waits, and is ended.
//!
//! What the memory manager maps over registered pages is registered no more, and needs nobody to give it.

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

use memshare::{PAGE_SIZE, SharedMemory};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde::Serialize;

use self::sys::{OpenFailure, Userfault};
use self::watch::Watch;

/// Why a guest cannot have its memory from a handler.
#[derive(Debug, thiserror::Error)]
pub enum UffdError {
    /// Nobody listens.
    #[error(
        "cannot connect to the page-fault handler at {} (start it first, and let it listen there; in a jail, its socket has to be given as allow=)",
        path.display()
    )]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// The process may not have a descriptor that sees what KVM touches.
    #[error(
        "cannot make a userfaultfd that sees the kernel's faults: {call}, and /dev/userfaultfd: {device}; set vm.unprivileged_userfaultfd to 1, or let the guest's user read and write /dev/userfaultfd (in a jail, with allow=/dev/userfaultfd), or load by coppice run --restore with CAP_SYS_PTRACE"
    )]
    Open {
        /// What userfaultfd(2) said.
        call: io::Error,
        /// What the device said.
        device: io::Error,
    },
    /// A kernel without what is needed.
    #[error(
        "the host's userfaultfd does not tell of pages that are given back (UFFD_FEATURE_EVENT_REMOVE), as Linux from 4.11 on does"
    )]
    Features(#[source] io::Error),
    /// RAM cannot be registered.
    #[error("cannot register guest RAM with userfaultfd")]
    Register(#[source] io::Error),
    /// RAM of another size.
    #[error("the state says memory is {saved:#x} bytes, and the guest has {present:#x}")]
    Size {
        /// By the state.
        saved: u64,
        /// By the guest.
        present: u64,
    },
    /// The handler does not take what it is to have.
    #[error("the page-fault handler at {} does not take the descriptor", path.display())]
    Send {
        /// The socket.
        path: PathBuf,
        /// What the host said.
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

/// Where a region of RAM is in this process, and where its bytes are in the memory file: as Firecracker tells it.
#[derive(Debug, Serialize)]
struct Mapping {
    base_host_virt_addr: u64,
    size: u64,
    offset: u64,
    page_size: u64,
    /// In bytes, whatever its name says: so it is in Firecracker, whose handlers read it.
    page_size_kib: u64,
}

fn mappings(memory: &SharedMemory) -> Vec<Mapping> {
    let mut offset = 0;
    let regions = memory.regions().iter();
    regions
        .map(|region| {
            let size = region.window.len();
            let mapping = Mapping {
                base_host_virt_addr: region.window.as_ptr() as u64,
                size,
                offset,
                page_size: PAGE_SIZE,
                page_size_kib: PAGE_SIZE,
            };
            offset += size;
            mapping
        })
        .collect()
}

/// A handler that has not been asked for anything yet.
#[derive(Debug)]
pub struct PageServer {
    path: PathBuf,
    socket: UnixStream,
    uffd: Arc<Userfault>,
}

impl PageServer {
    /// Connects to the handler that listens at `path`, and makes the descriptor. Where that is before the jail, the
    /// jail needs neither.
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

    /// Has the handler give the pages of RAM that nobody has touched, `bytes` by the state. Should it go while the
    /// answer lives, `on_lost` is told why the guest ends; and the process is ended, where that has not come of it a
    /// moment later.
    ///
    /// # Errors
    /// `Size`, `Register`, `Send`, `Watch`.
    pub fn serve(
        &self,
        memory: &SharedMemory,
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
        self.send(&mappings(memory))
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

    /// All in one message: the descriptor goes with its first byte.
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

/// Guest memory that a handler gives, as long as this lives. What it has not given by then reads as zeros: no vCPU and
/// no device may come to it.
#[derive(Debug)]
pub struct Served {
    /// Goes first: the handler is free to go once it sees that this process has.
    _watch: Watch,
    _uffd: Arc<Userfault>,
}
