use std::os::unix::net::UnixStream;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use event_manager::{EventManager, SubscriberOps};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};

use host::terminal::{RawMode, is_raw};

use super::*;

/// A serial port with room for a few bytes.
#[derive(Clone, Default)]
struct Port {
    got: Arc<Mutex<Vec<u8>>>,
    room: Arc<AtomicUsize>,
}

impl Port {
    fn with_room(room: usize) -> Self {
        Self {
            room: Arc::new(room.into()),
            ..Self::default()
        }
    }

    fn got(&self) -> Vec<u8> {
        self.got.lock().unwrap().clone()
    }
}

impl SerialInput for Port {
    fn input(&mut self, bytes: &[u8]) -> usize {
        let taken = bytes.len().min(self.room.load(Ordering::SeqCst));
        self.room.fetch_sub(taken, Ordering::SeqCst);
        self.got.lock().unwrap().extend(&bytes[..taken]);
        taken
    }
}

struct Bench {
    manager: EventManager<Arc<Mutex<Console>>>,
    console: Arc<Mutex<Console>>,
    quits: Arc<AtomicUsize>,
}

impl Bench {
    fn new(input: impl Into<OwnedFd>) -> Self {
        let quits = Arc::new(AtomicUsize::new(0));
        let counter = quits.clone();
        let on_quit = Arc::new(move || {
            counter.fetch_add(1, Ordering::SeqCst);
        });
        let console = Arc::new(Mutex::new(Console::new(input.into(), on_quit).unwrap()));
        let mut manager = EventManager::new().unwrap();
        manager.add_subscriber(console.clone());
        Self {
            manager,
            console,
            quits,
        }
    }

    fn connect(&mut self, port: &Port) {
        self.console.lock().unwrap().connect(Box::new(port.clone()));
        self.run_until_idle();
    }

    fn make_room(&mut self, port: &Port, room: usize) {
        port.room.store(room, Ordering::SeqCst);
        self.console
            .lock()
            .unwrap()
            .drained()
            .unwrap()
            .write(1)
            .unwrap();
        self.run_until_idle();
    }

    /// Serves all that is there to be served.
    fn run_until_idle(&mut self) {
        while self.manager.run_with_timeout(0).unwrap() > 0 {}
    }

    /// Waits for what a terminal passes on in its own time.
    fn until(&mut self, seen: impl Fn(&Console) -> bool) {
        while !seen(&self.console.lock().unwrap()) {
            self.manager.run().unwrap();
        }
    }
}

fn pty() -> (OwnedFd, OwnedFd) {
    let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    grantpt(&master).unwrap();
    unlockpt(&master).unwrap();
    let name = ptsname(&master, Vec::new()).unwrap();
    let flags = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::NOCTTY;
    let slave = rustix::fs::open(name.as_c_str(), flags, rustix::fs::Mode::empty()).unwrap();
    (master, slave)
}

#[test]
fn a_pipe_is_read_as_fast_as_the_guest_takes_it_and_nothing_is_lost() {
    let (mut writer, reader) = UnixStream::pair().unwrap();
    let mut bench = Bench::new(reader);
    let text: Vec<u8> = (0..5000_u32).map(|n| b'a' + (n % 26) as u8).collect();
    writer.write_all(&text).unwrap();
    bench.run_until_idle();
    let port = Port::with_room(10);
    bench.connect(&port);
    assert_eq!(port.got(), text[..10]);
    assert!(bench.console.lock().unwrap().pending.len() <= CHUNK);
    drop(writer);
    while port.got().len() < text.len() {
        let before = port.got().len();
        bench.make_room(&port, 100);
        assert!(port.got().len() > before, "stuck at {before}");
    }
    assert_eq!(port.got(), text);
    assert_eq!(bench.console.lock().unwrap().source, Source::Ended);
    assert_eq!(
        bench.manager.run_with_timeout(0).unwrap(),
        0,
        "a pipe at its end is not polled"
    );
}

#[test]
fn a_file_and_dev_null_are_read_to_their_end() {
    let mut file = tempfile::tempfile().unwrap();
    let text = vec![b'z'; 3000];
    file.write_all(&text).unwrap();
    io::Seek::rewind(&mut file).unwrap();
    let mut bench = Bench::new(file);
    let port = Port::with_room(64);
    bench.connect(&port);
    assert_eq!(port.got().len(), 64);
    bench.make_room(&port, 100_000);
    assert_eq!(port.got(), text);
    assert_eq!(bench.console.lock().unwrap().source, Source::Ended);

    let mut bench = Bench::new(File::open("/dev/null").unwrap());
    let port = Port::with_room(64);
    bench.connect(&port);
    assert_eq!(bench.console.lock().unwrap().source, Source::Ended);
}

#[test]
fn keys_of_coppice_work_before_the_guest_runs_and_while_it_reads_nothing() {
    let (master, slave) = pty();
    let raw = RawMode::enter(&slave).unwrap().unwrap();
    let mut bench = Bench::new(slave);
    let quits = bench.quits.clone();
    rustix::io::write(&master, b"early\x01x").unwrap();
    bench.until(|_| quits.load(Ordering::SeqCst) == 1);
    let port = Port::with_room(2);
    bench.connect(&port);
    rustix::io::write(&master, b"keys\x01\x01\x01x").unwrap();
    bench.until(|_| quits.load(Ordering::SeqCst) == 2);
    assert_eq!(
        port.got(),
        b"ke",
        "what was typed before the guest was there is gone"
    );
    bench.make_room(&port, 100);
    assert_eq!(port.got(), b"keys\x01");
    drop(raw);
}

#[test]
fn what_is_typed_ahead_is_bounded() {
    let (master, slave) = pty();
    let raw = RawMode::enter(&slave).unwrap().unwrap();
    let mut bench = Bench::new(slave);
    let port = Port::with_room(0);
    bench.connect(&port);
    for sent in 1..=17 {
        rustix::io::write(&master, &[b'k'; 1000]).unwrap();
        bench.until(|console| console.pending.len() == TYPED_AHEAD.min(sent * 1000));
    }
    rustix::io::write(&master, b"lost\x01x").unwrap();
    let quits = bench.quits.clone();
    bench.until(|_| quits.load(Ordering::SeqCst) == 1);
    assert_eq!(bench.console.lock().unwrap().pending.len(), TYPED_AHEAD);
    drop(raw);
}

#[test]
fn the_terminal_is_raw_while_the_guard_lives() {
    let (_master, slave) = pty();
    let modes = |terminal: &OwnedFd| rustix::termios::tcgetattr(terminal).unwrap().local_modes;
    let before = modes(&slave);
    let raw = RawMode::enter(&slave).unwrap().unwrap();
    assert!(is_raw() && modes(&slave) != before);
    drop(raw);
    assert!(!is_raw() && modes(&slave) == before);
    assert!(
        RawMode::enter(File::open("/dev/null").unwrap())
            .unwrap()
            .is_none()
    );
}
