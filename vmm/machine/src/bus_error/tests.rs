//! Each case ends its process, so it runs in one of its own: this test binary again, with the case in its environment.

use std::fs::File;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Output};
use std::sync::{Arc, Mutex};

use memshare::{PAGE_SIZE, Window};

use super::*;

const CASE: &str = "COPPICE_BUS_ERROR_CASE";
const FILE: &str = "COPPICE_BUS_ERROR_FILE";
const LEN: u64 = 4 * PAGE_SIZE;
const ADDRESS: u64 = 0x10_0000;

/// Runs `child` in a process of its own, with a file of four pages.
fn run(case: &str, file: &tempfile::NamedTempFile) -> Output {
    file.as_file().set_len(LEN).unwrap();
    Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "bus_error::tests::child",
            "--ignored",
            "--nocapture",
        ])
        .env(CASE, case)
        .env(FILE, file.path())
        .output()
        .unwrap()
}

fn touch(window: &Window) {
    window.read(2 * PAGE_SIZE + 5, &mut [0]);
}

/// Not a test: the process that the tests below start.
#[test]
#[ignore = "the process that other tests start"]
fn child() {
    static HELD: Mutex<()> = Mutex::new(());
    let case = std::env::var(CASE).expect("run by the tests that start it");
    let file = File::options()
        .write(true)
        .read(true)
        .open(std::env::var(FILE).unwrap())
        .unwrap();
    let window = Arc::new(Window::reserve(LEN).unwrap());
    window.map_file(0, LEN, &file, 0).unwrap();
    let guest = vec![GuestRange::new(ADDRESS, &window)];
    let watch = BusErrorWatch::start(&guest).unwrap();
    touch(&window);
    file.set_len(2 * PAGE_SIZE).unwrap();
    match case.as_str() {
        "this thread" => touch(&window),
        "another thread" => {
            let other = std::thread::spawn({
                let window = window.clone();
                move || {
                    // The thread never releases these locks: the handler must not need them.
                    let _standard_error = io::stderr().lock();
                    let _held = HELD.lock().unwrap();
                    touch(&window);
                }
            });
            other.join().unwrap();
        }
        "all threads" => {
            let touch = |_| {
                let window = window.clone();
                std::thread::spawn(move || touch(&window))
            };
            let all: Vec<_> = (0..8).map(touch).collect();
            for thread in all {
                thread.join().unwrap();
            }
        }
        "other memory" => {
            let other = Window::reserve(LEN).unwrap();
            other.map_file(0, LEN, &file, 0).unwrap();
            touch(&other);
        }
        "sent" => {
            // SAFETY: a signal to this process.
            unsafe { libc::kill(libc::getpid(), libc::SIGBUS) };
        }
        "over" => {
            drop(watch);
            touch(&window);
        }
        _ => unreachable!("{case}"),
    }
    unreachable!("it goes on");
}

#[test]
fn a_thread_that_touches_a_page_of_a_cut_file_ends_the_process_with_a_report() {
    for case in ["this thread", "another thread", "all threads"] {
        let file = tempfile::NamedTempFile::new().unwrap();
        let output = run(case, &file);
        let printed = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{case}: {printed}");
        let expected = format!(
            "coppice: guest page 0x102000 is that of {} at offset 0x2000, and cannot be read: it was cut to 8192 bytes; {ADVICE}\n",
            file.path().display()
        );
        assert_eq!(printed, expected, "{case}");
    }
}

#[test]
fn any_other_bus_error_has_its_default_meaning() {
    for case in ["other memory", "sent", "over"] {
        let file = tempfile::NamedTempFile::new().unwrap();
        let output = run(case, &file);
        assert_eq!(output.status.signal(), Some(libc::SIGBUS), "{case}");
    }
}
