use std::io::Write;
use std::sync::mpsc;
use std::time::Duration;

use memshare::{Limits, Region, Window};

use self::page_server::Handler;
use super::*;

#[path = "../../../tests/page_server/mod.rs"]
mod page_server;

const PAGES: u64 = 8;

/// Two regions of memory, given from a file whose pages hold their numbers from 1 on.
struct Bench {
    folder: tempfile::TempDir,
    memory: SharedMemory,
}

impl Bench {
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
            .serve(&self.memory, bytes, Box::new(|why| panic!("{why}")))
            .unwrap()
    }

    fn holds(&self, region: usize, page: u64, byte: u8) -> bool {
        let window = &self.memory.regions()[region].window;
        window.holds(page * PAGE_SIZE, &[byte; PAGE_SIZE as usize])
    }
}

#[test]
fn pages_come_from_the_handler_when_they_are_touched_also_by_the_kernel_and_no_others() {
    let bench = Bench::new();
    let handler = bench.handler();
    let _served = bench.serve();
    assert!(bench.holds(0, 2, 3) && bench.holds(1, 1, PAGES as u8 + 2));
    // A system call that writes part of a page: the kernel itself touches it.
    let mut source = tempfile::tempfile().unwrap();
    source.write_all(&[0xee; 16]).unwrap();
    let target = bench.memory.regions()[0]
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
    let window = &bench.memory.regions()[0].window;
    assert!(window.holds(5 * PAGE_SIZE, &[0xee; 16]));
    assert!(window.holds(5 * PAGE_SIZE + 16, &[6; 4080]));
    let given = handler.seen(|seen| seen.given.clone());
    let expected = [2, 5, PAGES + 1].map(|page| page * PAGE_SIZE);
    assert_eq!(given.into_iter().collect::<Vec<_>>(), expected);
}

#[test]
fn the_handler_is_told_of_the_memory_in_firecrackers_words() {
    let bench = Bench::new();
    let handler = bench.handler();
    let _served = bench.serve();
    assert!(bench.holds(0, 0, 1));
    let mapping = |region: usize, offset| {
        serde_json::json!({
            "base_host_virt_addr": bench.memory.regions()[region].window.as_ptr() as u64,
            "size": PAGES * PAGE_SIZE, "offset": offset, "page_size": 4096, "page_size_kib": 4096,
        })
    };
    let expected = serde_json::json!([mapping(0, 0), mapping(1, PAGES * PAGE_SIZE)]);
    assert_eq!(handler.seen(|seen| seen.mappings.clone()), expected);
}

#[test]
fn what_is_given_back_is_told_and_reads_as_zeros_and_a_mapped_file_needs_no_handler() {
    let bench = Bench::new();
    let mut handler = bench.handler();
    let served = bench.serve();
    assert!(bench.holds(0, 3, 4));
    // Touched before, and not.
    bench
        .memory
        .give_back(3 * PAGE_SIZE, 2 * PAGE_SIZE)
        .unwrap();
    assert!(bench.holds(0, 3, 0) && bench.holds(0, 4, 0) && bench.holds(0, 5, 6));
    let removed = handler.seen(|seen| seen.removed.clone());
    assert_eq!(
        removed.into_iter().collect::<Vec<_>>(),
        [3 * PAGE_SIZE, 4 * PAGE_SIZE]
    );
    let file = std::fs::File::open(bench.folder.path().join("memory")).unwrap();
    let file = bench.memory.files().share(&Arc::new(file)).unwrap();
    bench
        .memory
        .map(0, PAGE_SIZE, &file, 7 * PAGE_SIZE)
        .unwrap();
    assert!(bench.holds(0, 0, 8));
    // Given back again, it is fresh memory of this process.
    bench.memory.give_back(0, PAGE_SIZE).unwrap();
    assert!(bench.holds(0, 0, 0));
    assert!(!handler.seen(|seen| seen.given.contains(&0) || seen.removed.contains(&0)));
    drop(served);
    handler.die();
}

#[test]
fn a_handler_that_goes_is_told_once_and_nothing_is_made_up_for_what_it_has_not_given() {
    let bench = Arc::new(Bench::new());
    let mut handler = bench.handler();
    let (told, lost) = mpsc::channel();
    let server = PageServer::connect(&bench.socket()).unwrap();
    let on_lost = Box::new(move |why| told.send(why).unwrap());
    let bytes = 2 * PAGES * PAGE_SIZE;
    let served = server.serve(&bench.memory, bytes, on_lost).unwrap();
    assert!(bench.holds(0, 0, 1));
    handler.fall_silent();
    let (touched, page) = mpsc::channel();
    std::thread::spawn({
        let bench = bench.clone();
        move || touched.send(bench.holds(0, 1, 0))
    });
    handler.die();
    let why = lost.recv_timeout(Duration::from_secs(20)).unwrap();
    assert!(why.contains("uffd.sock has closed its connection"), "{why}");
    // Whoever waits for the page goes on waiting: not with zeros.
    let waited = page.recv_timeout(Duration::from_millis(300));
    assert_eq!(waited, Err(mpsc::RecvTimeoutError::Timeout));
    // In order, before the process is ended for it: then it is let go.
    drop((served, server));
    assert_eq!(page.recv_timeout(Duration::from_secs(20)), Ok(true));
    assert!(lost.recv().is_err());
}

#[test]
fn a_socket_that_nobody_listens_at_and_memory_of_another_size_are_refused() {
    let bench = Bench::new();
    let error = PageServer::connect(&bench.socket()).unwrap_err();
    assert!(error.to_string().contains("uffd.sock"), "{error}");
    let _handler = bench.handler();
    let server = PageServer::connect(&bench.socket()).unwrap();
    let error = server.serve(&bench.memory, PAGE_SIZE, Box::new(|_| ()));
    assert!(matches!(error, Err(UffdError::Size { .. })));
    // And nothing is registered by then.
    assert!(bench.holds(0, 0, 0));
}
