//! Kills a process at its N-th step: the N-th system call that others can see the effect of, before it is done. So a
//! test can go through all moments at which a process can be killed, whatever the machine is busy with.

use std::fs;
use std::io;
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::thread::{self, JoinHandle};

use rustix::process::{Pid, Signal, kill_process};

/// The process whose steps are counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Victim {
    /// The process that is watched.
    Itself,
    /// A process that the watched one starts.
    Child,
}

/// A thread that traces a process, and kills it at a step.
pub struct Killer {
    process: u32,
    over: Arc<AtomicBool>,
    thread: JoinHandle<Option<&'static str>>,
}

impl Killer {
    /// Kills a process at its step `number`, counted from now on.
    pub fn new(process: u32, victim: Victim, number: usize) -> Self {
        let over = Arc::new(AtomicBool::new(false));
        let (watches, ready) = channel();
        let thread = thread::spawn({
            let over = over.clone();
            move || Tracer::new(process, victim, number, &watches).run(&over)
        });
        ready.recv().expect("processes can be traced");
        Self {
            process,
            over,
            thread,
        }
    }

    /// The step at which the process was killed, if it came to that. `wake` has the traced process do anything, so that
    /// the tracer sees that it is to end.
    pub fn end(self, wake: impl FnOnce()) -> Option<&'static str> {
        self.over.store(true, Ordering::SeqCst);
        wake();
        // A traced process that only waits is interrupted by a signal that it ignores. It may have ended, so that this
        // fails.
        let _ = kill_process(
            Pid::from_raw(self.process.cast_signed()).unwrap(),
            Signal::CONT,
        );
        self.thread.join().unwrap()
    }
}

/// `struct ptrace_syscall_info` (ptrace(2)) of an entry.
#[repr(C)]
#[derive(Default)]
struct Call {
    op: u8,
    _pad: [u8; 3],
    _arch: u32,
    _instruction_pointer: u64,
    _stack_pointer: u64,
    number: u64,
    args: [u64; 6],
}

const OPTIONS: i32 = libc::PTRACE_O_TRACESYSGOOD
    | libc::PTRACE_O_TRACECLONE
    | libc::PTRACE_O_TRACEFORK
    | libc::PTRACE_O_TRACEVFORK
    | libc::PTRACE_O_TRACEEXEC;

struct Tracer {
    process: u32,
    victim: Victim,
    left: usize,
    /// Of writes that follow each other one stands for all.
    last: (i32, u64),
}

fn ptrace(request: libc::c_uint, thread: i32, address: usize, data: usize) -> io::Result<()> {
    // SAFETY: none of the requests used here has the kernel write to this process, but for `call`, which passes the
    // address and size of a `Call`.
    let done = unsafe {
        libc::ptrace(
            request,
            thread,
            ptr::without_provenance_mut::<libc::c_void>(address),
            ptr::with_exposed_provenance_mut::<libc::c_void>(data),
        )
    };
    if done < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// The system call that a thread is about to enter; `None` where it returns from one.
fn call(thread: i32) -> Option<Call> {
    let mut call = Call::default();
    let at = (&raw mut call).expose_provenance();
    ptrace(libc::PTRACE_GET_SYSCALL_INFO, thread, size_of::<Call>(), at).ok()?;
    (call.op == libc::PTRACE_SYSCALL_INFO_ENTRY).then_some(call)
}

impl Tracer {
    fn new(process: u32, victim: Victim, number: usize, watches: &Sender<()>) -> Self {
        let mut seized = Vec::new();
        loop {
            let tasks = fs::read_dir(format!("/proc/{process}/task")).unwrap();
            let names = tasks.flatten().map(|entry| entry.file_name());
            let threads = names.filter_map(|name| name.to_str()?.parse::<i32>().ok());
            let new: Vec<_> = threads.filter(|id| !seized.contains(id)).collect();
            if new.is_empty() {
                break;
            }
            for thread in new {
                // A thread that has ended meanwhile takes no more steps.
                if ptrace(libc::PTRACE_SEIZE, thread, 0, OPTIONS as usize).is_ok() {
                    let _ = ptrace(libc::PTRACE_INTERRUPT, thread, 0, 0);
                }
                seized.push(thread);
            }
        }
        watches.send(()).unwrap();
        Self {
            process,
            victim,
            left: number,
            last: (0, 0),
        }
    }

    /// Traces until the end of this thread, with which the kernel lets all traced threads run on.
    fn run(mut self, over: &AtomicBool) -> Option<&'static str> {
        loop {
            let mut status = 0;
            // SAFETY: the call writes to `status` alone. No child of another thread of the test is waited for.
            let thread =
                unsafe { libc::waitpid(-1, &raw mut status, libc::__WALL | libc::__WNOTHREAD) };
            if thread < 0 || over.load(Ordering::SeqCst) {
                return None;
            }
            if !libc::WIFSTOPPED(status) {
                continue;
            }
            let (signal, event) = (libc::WSTOPSIG(status), status >> 16);
            let passed_on = match (signal, event) {
                (signal, 0) if signal == libc::SIGTRAP | 0x80 => {
                    if let Some(step) = self.step(thread) {
                        return Some(step);
                    }
                    0
                }
                (signal, 0) => signal,
                (_, _) => 0,
            };
            let _ = ptrace(
                libc::PTRACE_SYSCALL,
                thread,
                0,
                passed_on.unsigned_abs() as usize,
            );
        }
    }

    /// The step before which the process of this thread was killed just now.
    fn step(&mut self, thread: i32) -> Option<&'static str> {
        let call = call(thread)?;
        let name = name(&call)?;
        let status = fs::read_to_string(format!("/proc/{thread}/status")).ok()?;
        let group = status.lines().find_map(|line| line.strip_prefix("Tgid:"))?;
        let group: u32 = group.trim().parse().ok()?;
        if (group == self.process) != (self.victim == Victim::Itself) {
            return None;
        }
        let this = (thread, call.number);
        let is_more = std::mem::replace(&mut self.last, this) == this && name.contains("write");
        if is_more {
            return None;
        }
        self.left -= 1;
        if self.left > 0 {
            return None;
        }
        kill_process(Pid::from_raw(group.cast_signed()).unwrap(), Signal::KILL).unwrap();
        Some(name)
    }
}

/// What a system call does that others can see.
fn name(call: &Call) -> Option<&'static str> {
    let makes = libc::O_CREAT | libc::O_TMPFILE & !libc::O_DIRECTORY;
    Some(match call.number.cast_signed() {
        libc::SYS_openat if call.args[2] as i32 & makes != 0 => "create a file",
        libc::SYS_open if call.args[1] as i32 & makes != 0 => "create a file",
        libc::SYS_mkdir | libc::SYS_mkdirat => "mkdir",
        libc::SYS_rename | libc::SYS_renameat | libc::SYS_renameat2 => "rename",
        libc::SYS_link | libc::SYS_linkat => "link",
        libc::SYS_unlink | libc::SYS_unlinkat | libc::SYS_rmdir => "unlink",
        libc::SYS_fchown | libc::SYS_fchownat | libc::SYS_fchmod | libc::SYS_chown => "give",
        libc::SYS_ftruncate | libc::SYS_fallocate => "truncate",
        libc::SYS_fsync | libc::SYS_fdatasync => "sync",
        libc::SYS_pwrite64 => "pwrite",
        // An eventfd takes 8 bytes.
        libc::SYS_write if call.args[2] != 8 => "write",
        libc::SYS_writev | libc::SYS_sendto | libc::SYS_sendmsg => "send",
        libc::SYS_connect => "connect",
        libc::SYS_bind => "bind",
        libc::SYS_flock => "lock",
        // Threads are made when there are too few of them, which is another number each time; so clone3, whose flags
        // are not seen here, is left out.
        libc::SYS_clone if call.args[0] as i32 & libc::CLONE_THREAD != 0 => return None,
        libc::SYS_clone | libc::SYS_vfork | libc::SYS_fork => "clone",
        libc::SYS_execve => "execute",
        libc::SYS_mount | libc::SYS_pivot_root | libc::SYS_umount2 => "mount",
        libc::SYS_pidfd_open | libc::SYS_pidfd_send_signal => "pidfd",
        _ => return None,
    })
}
