//! A page-fault handler for a guest: it provides each page from a memory file, and zeros for pages that were given
//! back.
//!
//! A handler has to do no more than this. It keeps the connection open for as long as it serves, reads all events that
//! there are before it answers the first, and tries again on `EAGAIN`, which the kernel returns while pages are being
//! given back.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, IoSliceMut, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use serde_json::Value;

const PAGE: u64 = 4096;
/// `UFFD_EVENT_PAGEFAULT`, with the address in the third word.
const FAULT: u8 = 0x12;
/// `UFFD_EVENT_REMOVE`, with the first address and the end in the second and third word.
const REMOVE: u8 = 0x15;
const UFFDIO_COPY: libc::c_ulong = 0xc028_aa03;
/// Longest message of a guest.
const LONGEST: usize = 1024;

/// What a handler has seen so far.
#[derive(Debug, Default)]
pub struct Seen {
    /// The mappings that the guest has sent.
    pub mappings: Value,
    /// Pages that were asked for, by offset in the memory file.
    pub given: BTreeSet<u64>,
    /// Pages that were given back.
    pub removed: BTreeSet<u64>,
}

/// A handler for one guest, on a thread of its own.
pub struct Handler {
    thread: Option<JoinHandle<()>>,
    seen: Arc<Mutex<Seen>>,
    /// The handler ends when this is closed.
    stop: Option<UnixStream>,
    /// Whether it answers no fault any more, while the connection stays open.
    silent: Arc<AtomicBool>,
}

impl Handler {
    /// Listens at `socket`, and gives the pages of `memory`.
    pub fn start(socket: &Path, memory: &Path) -> Self {
        let listener = UnixListener::bind(socket).unwrap();
        let memory = File::open(memory).unwrap();
        let (stop, end) = UnixStream::pair().unwrap();
        let (seen, silent) = (Arc::<Mutex<Seen>>::default(), Arc::<AtomicBool>::default());
        let thread = std::thread::spawn({
            let (seen, silent) = (seen.clone(), silent.clone());
            move || {
                if is_over(&listener, &end) {
                    return;
                }
                let (guest, _) = listener.accept().unwrap();
                serve(&guest, &end, &memory, &seen, &silent);
            }
        });
        Self {
            thread: Some(thread),
            seen,
            stop: Some(stop),
            silent,
        }
    }

    /// Passes to `look` what the handler has seen.
    pub fn seen<T>(&self, look: impl FnOnce(&Seen) -> T) -> T {
        look(&self.seen.lock().unwrap())
    }

    /// Answers no fault from now on.
    pub fn stop_answering(&self) {
        self.silent.store(true, Ordering::SeqCst);
    }

    /// Ends the handler, as if its process had ended.
    pub fn stop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

impl Drop for Handler {
    fn drop(&mut self) {
        drop(self.stop.take());
    }
}

/// Waits for `other` or the end; returns whether the handler is to end.
fn is_over(other: &impl std::os::fd::AsFd, end: &UnixStream) -> bool {
    let mut both = [
        PollFd::new(other, PollFlags::IN),
        PollFd::new(end, PollFlags::IN),
    ];
    poll(&mut both, None).unwrap();
    !both[1].revents().is_empty()
}

/// Receives the mappings, and the descriptor that came with them.
fn receive(guest: &UnixStream) -> Option<(Value, OwnedFd)> {
    let mut bytes = [0; LONGEST];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let buffer = &mut [IoSliceMut::new(&mut bytes)];
    let received = recvmsg(guest, buffer, &mut ancillary, RecvFlags::CMSG_CLOEXEC).unwrap();
    let descriptor = ancillary.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    });
    // A guest that could not be loaded sends nothing.
    let descriptor = descriptor?;
    Some((
        serde_json::from_slice(&bytes[..received.bytes]).unwrap(),
        descriptor,
    ))
}

fn serve(
    guest: &UnixStream,
    end: &UnixStream,
    memory: &File,
    seen: &Mutex<Seen>,
    silent: &AtomicBool,
) {
    let Some((mappings, uffd)) = receive(guest) else {
        return;
    };
    seen.lock().unwrap().mappings = mappings.clone();
    let page_size = mappings[0]["page_size"].as_u64().unwrap();
    let uffd = File::from(uffd);
    let mut asked = BTreeSet::new();
    loop {
        let mut all = [
            PollFd::new(&uffd, PollFlags::IN),
            PollFd::new(guest, PollFlags::IN),
            PollFd::new(end, PollFlags::IN),
        ];
        poll(&mut all, None).unwrap();
        if !all[1].revents().is_empty() || !all[2].revents().is_empty() {
            return;
        }
        if silent.load(Ordering::SeqCst) {
            std::thread::sleep(std::time::Duration::from_millis(1));
            continue;
        }
        while !asked.is_empty() || all[0].revents().contains(PollFlags::IN) {
            let mut faults = BTreeSet::new();
            events(&uffd, &mappings, &mut faults, &mut seen.lock().unwrap());
            asked.extend(faults.iter().map(|address| address / page_size * page_size));
            // Events that arrived in the meantime have just been taken.
            if silent.load(Ordering::SeqCst) {
                break;
            }
            let Some(address) = asked.pop_first() else {
                break;
            };
            let offset = offset_of(&mappings, address);
            let mut page = vec![0; page_size as usize];
            let mut seen = seen.lock().unwrap();
            if !seen.removed.contains(&offset) {
                memory.read_exact_at(&mut page, offset).unwrap();
            }
            match copy(&uffd, address, &page).map_err(|error| error.raw_os_error()) {
                Ok(()) => {
                    seen.given.insert(offset);
                }
                Err(Some(libc::EAGAIN)) => {
                    asked.insert(address);
                }
                // Another fault of the same page was answered, or its process is gone.
                Err(Some(libc::EEXIST | libc::ESRCH | libc::ENOENT)) => {}
                Err(error) => panic!("{error:?}"),
            }
        }
    }
}

/// Takes all events that there are.
fn events(mut uffd: &File, mappings: &Value, asked: &mut BTreeSet<u64>, seen: &mut Seen) {
    let mut message = [0; 32];
    loop {
        match uffd.read(&mut message) {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
            Err(error) => panic!("the userfaultfd cannot be read: {error:?}"),
        }
        let word = |index: usize| {
            u64::from_ne_bytes(message[index * 8..index * 8 + 8].try_into().unwrap())
        };
        match message[0] {
            FAULT => {
                asked.insert(word(2) / PAGE * PAGE);
            }
            REMOVE => {
                let pages = (word(1)..word(2)).step_by(PAGE as usize);
                seen.removed
                    .extend(pages.map(|address| offset_of(mappings, address)));
            }
            other => panic!("{other:#x}"),
        }
    }
}

fn offset_of(mappings: &Value, address: u64) -> u64 {
    let regions = mappings.as_array().unwrap().iter();
    let mut offsets = regions.filter_map(|region| {
        let field = |name: &str| region[name].as_u64().unwrap();
        let at = address.checked_sub(field("base_host_virt_addr"))?;
        (at < field("size")).then(|| field("offset") + at)
    });
    offsets.next().unwrap()
}

fn copy(uffd: &File, address: u64, page: &[u8]) -> io::Result<()> {
    // `struct uffdio_copy`: destination, source, length, mode, and how much was copied.
    let mut request = [address, page.as_ptr() as u64, page.len() as u64, 0, 0];
    // SAFETY: UFFDIO_COPY reads and writes five words, which live through the call as the source does; it fills pages
    // of the process that made the descriptor, where there are none.
    let done = unsafe { libc::ioctl(uffd.as_raw_fd(), UFFDIO_COPY, &raw mut request) };
    if done == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
