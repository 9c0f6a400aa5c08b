//! Filters of system calls.
//!
//! The policies are `resources/seccomp/*.json`, which the build compiles. Threads inherit the filters of the thread
//! that starts them, and no thread can remove a filter:
//!
//! ```text
//! main thread, before any other ── main ── absent ── a rule about this process ──> every thread
//!                  before the vCPUs start: started (, unconnected) ──> every thread there is, and the vCPUs
//!                                                               each vCPU: vcpu
//! ```
//!
//! `main` lists the system calls that a guest process needs in its life. `started` forbids those that only building a
//! guest needs: to make rings of `io_uring`, whose operations no filter sees, and to make VMs, vCPUs and memory slots
//! of KVM. `unconnected` forbids to connect to a socket, which only a guest with a vsock device needs to do later.
//! `vcpu` lists the system calls of a thread that serves the guest's accesses, so that no file can be opened there.
//! `absent` has a system call fail as if the kernel did not have it, so that the C library does without.
//! `reader` is for a process of another kind, which reads a file that a guest may have written: see `reader`.
//!
//! A system call that is not listed stops the thread with `SIGSYS`, whose handler names the system call and ends the
//! process.

mod handler;

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};

use seccompiler::{
    BpfProgram, BpfProgramRef, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule, TargetArch, apply_filter, apply_filter_all_threads,
};
use serde::{Deserialize, Serialize};

pub use handler::log_to;

#[allow(clippy::unreadable_literal, reason = "nobody reads instructions")]
mod tables {
    use seccompiler::sock_filter;

    include!(concat!(env!("OUT_DIR"), "/seccomp.rs"));
}

/// What happens at a system call that is not in the policy.
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    Serialize,
    Deserialize,
    clap::ValueEnum,
    utoipa::ToSchema,
)]
#[serde(rename_all = "lowercase")]
pub enum SeccompMode {
    /// There is no filter.
    #[default]
    Off,
    /// The kernel logs it (audit, dmesg), and executes it.
    Log,
    /// It ends the process, which names it.
    Kill,
}

/// The mode of this process, for filters that are added later.
static MODE: AtomicU8 = AtomicU8::new(0);

/// Whether the system calls that only building a guest needs are forbidden already.
static STARTED: AtomicBool = AtomicBool::new(false);

/// Whether this process can still build a guest. It cannot if a guest failed to start after [`started`].
pub fn can_build() -> bool {
    !STARTED.load(Ordering::SeqCst)
}

fn mode() -> SeccompMode {
    match MODE.load(Ordering::SeqCst) {
        1 => SeccompMode::Log,
        2 => SeccompMode::Kill,
        _ => SeccompMode::Off,
    }
}

/// Filters this thread, and all threads that it starts from now on. To be called once, by the only thread of the
/// process.
///
/// # Errors
/// Where the kernel has no filters, or no signal handler can be set.
pub fn enter(wanted: SeccompMode) -> io::Result<()> {
    let (program, number): (BpfProgramRef<'_>, _) = match wanted {
        SeccompMode::Off => return Ok(()),
        SeccompMode::Log => (&tables::MAIN_LOG, 1),
        SeccompMode::Kill => (&tables::MAIN, 2),
    };
    if wanted == SeccompMode::Kill {
        handler::install()?;
    }
    let own = own_process(wanted)?;
    apply_filter(&tables::ABSENT).map_err(io::Error::other)?;
    apply_filter(&own).map_err(io::Error::other)?;
    apply_filter(program).map_err(io::Error::other)?;
    MODE.store(number, Ordering::SeqCst);
    Ok(())
}

/// A filter that allows signals to threads of this process alone. It is compiled now, because only now the number of
/// the process is known.
fn own_process(mode: SeccompMode) -> io::Result<BpfProgram> {
    let elsewhere = SeccompCondition::new(
        0,
        SeccompCmpArgLen::Dword,
        SeccompCmpOp::Ne,
        std::process::id().into(),
    );
    let rule =
        SeccompRule::new(vec![elsewhere.map_err(io::Error::other)?]).map_err(io::Error::other)?;
    let refuse = match mode {
        SeccompMode::Kill => SeccompAction::Trap,
        SeccompMode::Log | SeccompMode::Off => SeccompAction::Log,
    };
    let filter = SeccompFilter::new(
        BTreeMap::from([(libc::SYS_tgkill, vec![rule])]),
        SeccompAction::Allow,
        refuse,
        TargetArch::x86_64,
    );
    filter
        .map_err(io::Error::other)?
        .try_into()
        .map_err(io::Error::other)
}

/// Forbids the system calls that only building a guest needs, in every thread, before a vCPU has run. A process whose
/// guest `connects` to sockets of the host may still connect. Does nothing where the process is not filtered.
///
/// # Errors
/// Where the kernel refuses.
pub fn started(connects: bool) -> io::Result<()> {
    let (program, unconnected): (BpfProgramRef<'_>, BpfProgramRef<'_>) = match mode() {
        SeccompMode::Off => return Ok(()),
        SeccompMode::Log => (&tables::STARTED_LOG, &tables::UNCONNECTED_LOG),
        SeccompMode::Kill => (&tables::STARTED, &tables::UNCONNECTED),
    };
    STARTED.store(true, Ordering::SeqCst);
    if !connects {
        apply_filter_all_threads(unconnected).map_err(io::Error::other)?;
    }
    apply_filter_all_threads(program).map_err(io::Error::other)
}

/// Limits this thread to what reading and writing files takes that are open already. Another system call ends the
/// process.
///
/// # Errors
/// Where the kernel refuses.
pub(super) fn reader() -> io::Result<()> {
    apply_filter(&tables::READER).map_err(io::Error::other)
}

/// Limits this thread to the system calls that a vCPU needs. Does nothing where the process is not filtered.
///
/// # Errors
/// Where the kernel refuses.
pub fn vcpu() -> io::Result<()> {
    let program: BpfProgramRef<'_> = match mode() {
        SeccompMode::Off => return Ok(()),
        SeccompMode::Log => &tables::VCPU_LOG,
        SeccompMode::Kill => &tables::VCPU,
    };
    apply_filter(program).map_err(io::Error::other)
}
