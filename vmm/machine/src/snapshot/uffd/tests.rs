use std::io::Write;
use std::sync::mpsc;
use std::time::Duration;

use memshare::{Limits, PAGE_SIZE, Region, Window};

use self::page_server::Handler;
use super::*;

#[path = "../../../tests/page_server/mod.rs"]
mod page_server;

const PAGES: u64 = 8;

/// Two regions of memory, which a handler provides from a file whose pages hold their numbers from 1 on.
struct ServedRegions {
    folder: tempfile::TempDir,
    memory: SharedMemory,
}

impl ServedRegions {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut file = std::fs::File::create(folder.path().join("memory")).unwrap();
        for page in 1..=2 * PAGES {
            file.write_all(&[page as u8; PAGE_SIZE as usize]).unwrap();
        }
        let region = |start| Region {
            start,
            window: Window::reserve(PAGES * PAGE_SIZE).unwrap(),
        };
        Self {
            folder,
            memory: SharedMemory::new(vec![region(0), region(4 << 30)], Limits::of_host(5, false)),
        }
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("uffd.sock")
    }

    fn handler(&self) -> Handler {
        Handler::start(&self.socket(), &self.folder.path().join("memory"))
    }

    fn serve(&self) -> Served {
        let server = PageServer::connect(&self.socket()).unwrap();
        let bytes = 2 * PAGES * PAGE_SIZE;
        server
            .serve(
                (&self.memory, PAGE_SIZE),
                bytes,
                Box::new(|why| panic!("{why}")),
            )
            .unwrap()
    }

    fn holds(&self, region: usize, page: u64, byte: u8) -> bool {
        let window = &self.memory.regions()[region].window;
        window.holds(page * PAGE_SIZE, &[byte; PAGE_SIZE as usize])
    }
}

#[test]
fn pages_come_from_the_handler_when_they_are_touched_also_by_the_kernel_and_no_others() {
    let guest = ServedRegions::new();
    let handler = guest.handler();
    let _served = guest.serve();
    assert!(guest.holds(0, 2, 3) && guest.holds(1, 1, PAGES as u8 + 2));
    // The kernel itself touches a page, in a system call that writes part of it.
    let mut source = tempfile::tempfile().unwrap();
    source.write_all(&[0xee; 16]).unwrap();
    let target = guest.memory.regions()[0]
        .window
        .as_ptr()
        .wrapping_add(5 * PAGE_SIZE as usize);
    // SAFETY: the 16 bytes lie in the window.
    let read = unsafe {
        libc::pread(
            std::os::fd::AsRawFd::as_raw_fd(&source),
            target.cast(),
            16,
            0,
        )
    };
    assert_eq!(read, 16);
    let window = &guest.memory.regions()[0].window;
    assert!(window.holds(5 * PAGE_SIZE, &[0xee; 16]));
    assert!(window.holds(5 * PAGE_SIZE + 16, &[6; 4080]));
    let given = handler.seen(|seen| seen.given.clone());
    let expected = [2, 5, PAGES + 1].map(|page| page * PAGE_SIZE);
    assert_eq!(given.into_iter().collect::<Vec<_>>(), expected);
}

#[test]
fn the_handler_gets_the_mappings_in_firecrackers_format() {
    let guest = ServedRegions::new();
    let handler = guest.handler();
    let _served = guest.serve();
    assert!(guest.holds(0, 0, 1));
    let mapping = |region: usize, offset| {
        serde_json::json!({
            "base_host_virt_addr": guest.memory.regions()[region].window.as_ptr() as u64,
            "size": PAGES * PAGE_SIZE, "offset": offset, "page_size": 4096, "page_size_kib": 4096,
        })
    };
    let expected = serde_json::json!([mapping(0, 0), mapping(1, PAGES * PAGE_SIZE)]);
    assert_eq!(handler.seen(|seen| seen.mappings.clone()), expected);
}

#[test]
fn a_page_that_is_given_back_is_reported_and_reads_as_zeros_and_a_mapped_file_needs_no_handler() {
    let guest = ServedRegions::new();
    let mut handler = guest.handler();
    let served = guest.serve();
    assert!(guest.holds(0, 3, 4));
    // One page was touched before it is given back, and one was not.
    guest
        .memory
        .give_back(3 * PAGE_SIZE, 2 * PAGE_SIZE)
        .unwrap();
    assert!(guest.holds(0, 3, 0) && guest.holds(0, 4, 0) && guest.holds(0, 5, 6));
    let removed = handler.seen(|seen| seen.removed.clone());
    assert_eq!(
        removed.into_iter().collect::<Vec<_>>(),
        [3 * PAGE_SIZE, 4 * PAGE_SIZE]
    );
    let file = std::fs::File::open(guest.folder.path().join("memory")).unwrap();
    let file = guest.memory.files().share(&Arc::new(file)).unwrap();
    guest
        .memory
        .map(0, PAGE_SIZE, &file, 7 * PAGE_SIZE)
        .unwrap();
    assert!(guest.holds(0, 0, 8));
    // A mapped page that is given back is fresh memory of this process.
    guest.memory.give_back(0, PAGE_SIZE).unwrap();
    assert!(guest.holds(0, 0, 0));
    assert!(!handler.seen(|seen| seen.given.contains(&0) || seen.removed.contains(&0)));
    drop(served);
    handler.stop();
}

#[test]
fn the_end_of_a_handler_is_reported_once_and_missing_pages_are_never_made_up() {
    let guest = Arc::new(ServedRegions::new());
    let mut handler = guest.handler();
    let (report, lost) = mpsc::channel();
    let server = PageServer::connect(&guest.socket()).unwrap();
    let on_lost = Box::new(move |why| report.send(why).unwrap());
    let bytes = 2 * PAGES * PAGE_SIZE;
    let served = server
        .serve((&guest.memory, PAGE_SIZE), bytes, on_lost)
        .unwrap();
    assert!(guest.holds(0, 0, 1));
    handler.stop_answering();
    let (touched, page) = mpsc::channel();
    std::thread::spawn({
        let guest = guest.clone();
        move || touched.send(guest.holds(0, 1, 0))
    });
    handler.stop();
    let why = lost.recv_timeout(Duration::from_secs(20)).unwrap();
    assert!(why.contains("uffd.sock has closed its connection"), "{why}");
    // The thread that waits for the page goes on waiting, and does not get zeros.
    let waited = page.recv_timeout(Duration::from_millis(300));
    assert_eq!(waited, Err(mpsc::RecvTimeoutError::Timeout));
    // The guest ends in order before its process would be ended, so the watch is dropped.
    drop((served, server));
    assert_eq!(page.recv_timeout(Duration::from_secs(20)), Ok(true));
    assert!(lost.recv().is_err());
}

#[test]
fn a_socket_that_nobody_listens_at_and_memory_of_another_size_are_refused() {
    let guest = ServedRegions::new();
    let error = PageServer::connect(&guest.socket()).unwrap_err();
    assert!(error.to_string().contains("uffd.sock"), "{error}");
    let _handler = guest.handler();
    let server = PageServer::connect(&guest.socket()).unwrap();
    let error = server.serve((&guest.memory, PAGE_SIZE), PAGE_SIZE, Box::new(|_| ()));
    assert!(matches!(error, Err(UffdError::Size { .. })));
    // A refused handler has no memory registered.
    assert!(guest.holds(0, 0, 0));
}
