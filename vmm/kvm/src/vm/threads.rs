//! The vCPU threads: start, pause, resume and stop.
//!
//! Each thread owns its vCPU. What they share is a table under one mutex: the state they should be in, how many are
//! parked, and for each the `immediate_exit` byte of its `kvm_run` page. To get a vCPU out of the guest, the state is
//! changed, `immediate_exit` set, and the thread signalled. The signal ends a `KVM_RUN` that is under way; one that has
//! not begun yet returns at once because of `immediate_exit`. So no order of events loses a kick.

use std::os::unix::thread::JoinHandleExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use devices::GuestMemory;
use host::report::chain;
use kvm_ioctls::VmFd;
use memshare::Window;
use parking_lot::{Condvar, Mutex, MutexGuard};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler, unblock_signal};

use super::error::VmError;
use super::exits::{ExitCounters, ExitKind};
use super::settings::{Buses, ConfineThread};
use super::state::{self, StateError, VcpuState, VmState};
use super::vcpu::{Step, Vcpu, VcpuError, VcpuExit};

/// A vCPU thread runs device register accesses and little else.
const STACK_SIZE: usize = 128 << 10;

/// What all vCPUs should do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Target {
    Run,
    Pause,
    Stop,
}

/// What a vCPU does next, after [`Shared::wait_while_paused`].
enum Next {
    /// Run the guest. `waited` is set if the vCPU was paused.
    Run { waited: bool },
    /// End its thread.
    Stop,
}

/// The `immediate_exit` byte of a vCPU's `kvm_run` page.
struct ExitByte(*mut u8);

// SAFETY: the pointer is used only under the table's mutex and only for atomic stores of a byte.
unsafe impl Send for ExitByte {}

struct Table {
    target: Target,
    /// The number of [`VcpuHold`]s, which keep all vCPUs out of the guest for a moment, whatever the target is.
    holds: usize,
    /// By vCPU; `None` once its thread has left its loop, before the vCPU is dropped.
    exit_bytes: Vec<Option<ExitByte>>,
    parked: usize,
    /// By vCPU, while a save waits for the states of all.
    states: Option<Vec<Option<Result<VcpuState, StateError>>>>,
}

impl Table {
    fn live(&self) -> usize {
        self.exit_bytes.iter().flatten().count()
    }

    /// Whether vCPUs have to stay out of the guest for now.
    fn must_stay_out(&self) -> bool {
        match self.target {
            Target::Run => self.holds > 0,
            Target::Pause => true,
            Target::Stop => false,
        }
    }

    /// The place for the state of a vCPU, if a save still waits for it.
    fn requested_state(&mut self, index: u8) -> Option<&mut Option<Result<VcpuState, StateError>>> {
        let slot = self.states.as_mut()?.get_mut(usize::from(index))?;
        slot.is_none().then_some(slot)
    }

    fn set_immediate_exit(&self, index: usize, value: u8) {
        if let Some(Some(byte)) = self.exit_bytes.get(index) {
            // SAFETY: the byte lies in the `kvm_run` mapping of a vCPU whose thread still owns it: the thread takes its
            // entry out of the table, under the mutex that is held here, before it drops the vCPU. All user-space
            // stores are atomic.
            unsafe { AtomicU8::from_ptr(byte.0) }.store(value, Ordering::SeqCst);
        }
    }
}

struct Shared {
    table: Mutex<Table>,
    changed: Condvar,
    /// The threads, until they are joined. This lock is taken after the table's.
    threads: Mutex<Vec<JoinHandle<()>>>,
    ended: AtomicBool,
    on_exit: Box<dyn Fn(VcpuExit) + Send + Sync>,
    /// The VM itself. KVM removes its irqfds when its last descriptor is closed, even though vCPUs still refer to the
    /// VM.
    vm: Arc<VmFd>,
}

impl Shared {
    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock()
    }

    /// Waits while the vCPUs are paused or held. Saves the vCPU's state meanwhile, if that is requested.
    fn wait_while_paused(&self, vcpu: &Vcpu) -> Next {
        let mut table = self.table();
        table.set_immediate_exit(vcpu.index.into(), 0);
        // A hold is too short for the guest to notice.
        let mut waited = false;
        while table.must_stay_out() {
            waited |= table.target == Target::Pause;
            if let Some(slot) = table.requested_state(vcpu.index) {
                *slot = Some(vcpu.save());
            }
            table.parked += 1;
            self.changed.notify_all();
            self.changed.wait(&mut table);
            table.parked -= 1;
        }
        match table.target {
            Target::Stop => Next::Stop,
            Target::Run | Target::Pause => Next::Run { waited },
        }
    }

    /// Makes every vCPU leave the guest, and call [`Shared::wait_while_paused`].
    fn kick(&self, table: &Table) {
        let threads = self.threads.lock();
        for (index, thread) in threads.iter().enumerate() {
            table.set_immediate_exit(index, 1);
            if let Err(error) = thread.kill(kick_signal()) {
                tracing::debug!(error = %chain(&error), index, "kick of a vCPU thread that has ended");
            }
        }
    }

    /// Waits until every vCPU is parked, for as long as vCPUs have to stay out of the guest.
    fn wait_for_parked(&self, mut table: MutexGuard<'_, Table>) {
        self.changed.wait_while(&mut table, |table| {
            table.must_stay_out() && table.parked < table.live()
        });
    }

    fn end(&self, exit: VcpuExit) {
        if !self.ended.swap(true, Ordering::SeqCst) {
            (self.on_exit)(exit);
        }
    }

    fn leave(&self, index: u8) {
        let mut table = self.table();
        if let Some(entry) = table.exit_bytes.get_mut(usize::from(index)) {
            *entry = None;
        }
        self.changed.notify_all();
    }
}

/// The running vCPUs of a VM. Dropping it stops them.
pub struct Vcpus {
    shared: Arc<Shared>,
    has_pit: bool,
    /// By vCPU.
    exits: Vec<Arc<ExitCounters>>,
    /// The memory of the VM's slots, which must stay mapped while a vCPU can run.
    _memory: (GuestMemory, Vec<Arc<Window>>),
}

/// The values that the vCPU threads are started with.
pub(super) struct Parts {
    pub(super) vm: Arc<VmFd>,
    pub(super) vcpus: Vec<Vcpu>,
    pub(super) has_pit: bool,
    pub(super) memory: (GuestMemory, Vec<Arc<Window>>),
    /// Whether the vCPUs' state was restored, so that they have run before.
    pub(super) restored: bool,
    /// See [`super::VmSettings::confine_vcpu`].
    pub(super) confine: ConfineThread,
}

extern "C" fn on_kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

fn kick_signal() -> libc::c_int {
    SIGRTMIN()
}

impl Vcpus {
    /// Starts the threads, which wait until [`Vcpus::resume`].
    pub(super) fn start(
        parts: Parts,
        buses: Buses,
        on_exit: Box<dyn Fn(VcpuExit) + Send + Sync>,
    ) -> Result<Self, VmError> {
        let Parts {
            vm,
            mut vcpus,
            has_pit,
            memory,
            restored,
            confine,
        } = parts;
        register_signal_handler(kick_signal(), on_kick).map_err(VmError::kvm("sigaction"))?;
        let exit_bytes = vcpus
            .iter_mut()
            .map(|v| Some(ExitByte(&raw mut v.fd.get_kvm_run().immediate_exit)))
            .collect();
        let shared = Arc::new(Shared {
            table: Mutex::new(Table {
                target: Target::Pause,
                holds: 0,
                exit_bytes,
                parked: 0,
                states: None,
            }),
            changed: Condvar::new(),
            threads: Mutex::new(Vec::with_capacity(vcpus.len())),
            ended: AtomicBool::new(false),
            on_exit,
            vm,
        });
        let exits = vcpus.iter().map(|vcpu| vcpu.exits.clone()).collect();
        let buses = Arc::new(buses);
        let this = Self {
            shared,
            has_pit,
            exits,
            _memory: memory,
        };
        for vcpu in vcpus {
            let (shared, buses) = (this.shared.clone(), buses.clone());
            let index = vcpu.index;
            let thread = std::thread::Builder::new()
                .name(format!("vcpu{index}"))
                .stack_size(STACK_SIZE)
                .spawn(move || thread_main(&shared, &buses, vcpu, (restored, confine)));
            match thread {
                Ok(thread) => this.threads().push(thread),
                Err(source) => {
                    // The vCPUs without a thread were dropped with the closure that owned them, and their `kvm_run`
                    // pages were unmapped.
                    let started = this.threads().len();
                    this.shared.table().exit_bytes.truncate(started);
                    return Err(VmError::Thread { index, source });
                }
            }
        }
        Ok(this)
    }

    fn threads(&self) -> MutexGuard<'_, Vec<JoinHandle<()>>> {
        self.shared.threads.lock()
    }

    fn set_target(&self, target: Target) -> MutexGuard<'_, Table> {
        let mut table = self.shared.table();
        if table.target != Target::Stop {
            table.target = target;
        }
        self.shared.kick(&table);
        self.shared.changed.notify_all();
        table
    }

    /// Takes all vCPUs out of the guest. Returns when none is in it and every device access of the guest is complete.
    ///
    /// It waits for device accesses that are in progress, so it must not be called with a device locked, nor by a vCPU
    /// thread.
    pub fn pause(&self) {
        let table = self.set_target(Target::Pause);
        self.shared.wait_for_parked(table);
    }

    /// Lets the vCPUs run again.
    pub fn resume(&self) {
        drop(self.set_target(Target::Run));
    }

    /// The state of the guest, which is paused: of the VM, and of each vCPU.
    ///
    /// # Errors
    /// [`StateError`].
    pub fn save(&self) -> Result<(VmState, Vec<VcpuState>), StateError> {
        state::check_size(&self.shared.vm)?;
        let mut table = self.shared.table();
        table.states = Some(table.exit_bytes.iter().map(|_| None).collect());
        self.shared.changed.notify_all();
        // A vCPU whose thread has left its loop, or leaves it now, never stores its state.
        let waiting = |table: &mut Table| {
            let live = table.exit_bytes.iter().map(Option::is_some);
            let states = table.states.iter().flatten();
            live.zip(states)
                .any(|(lives, state)| lives && state.is_none())
        };
        self.shared.changed.wait_while(&mut table, waiting);
        let states = table.states.take().unwrap_or_default();
        drop(table);
        let vcpus = (0..)
            .zip(states)
            .map(|(index, state)| state.unwrap_or(Err(StateError::Ended(index))));
        let vcpus = vcpus.collect::<Result<_, _>>()?;
        Ok((VmState::of(&self.shared.vm, self.has_pit)?, vcpus))
    }

    /// kvm-clock in nanoseconds.
    #[cfg(test)]
    pub(super) fn clock_ns(&self) -> u64 {
        self.shared.vm.get_clock().unwrap().clock
    }

    /// How often the vCPUs have left the guest, by kind of exit.
    pub fn exits(&self) -> Vec<(ExitKind, u64)> {
        let all = |kind| self.exits.iter().map(|vcpu| vcpu.get(kind)).sum();
        ExitKind::ALL.map(|kind| (kind, all(kind))).to_vec()
    }

    /// A value to hold the vCPUs with, which may outlive this one.
    pub fn holder(&self) -> VcpuHolder {
        VcpuHolder(self.shared.clone())
    }

    /// Takes all vCPUs out of the guest for good and ends their threads.
    pub fn stop(&mut self) {
        drop(self.set_target(Target::Stop));
        let threads = std::mem::take(&mut *self.threads());
        for thread in threads {
            // A panic of the thread was reported through `on_exit`.
            let _ = thread.join();
        }
    }
}

/// CPU time of a thread; `None` where it has ended.
fn thread_time(thread: &JoinHandle<()>) -> Option<Duration> {
    let mut clock = 0;
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the thread is not joined as long as its handle exists, so that the name is valid, and the clock's number
    // is written to a place of its own.
    let found = unsafe { libc::pthread_getcpuclockid(thread.as_pthread_t(), &raw mut clock) };
    // SAFETY: any number may be asked for, and the time is written to a place of its own.
    if found != 0 || unsafe { libc::clock_gettime(clock, &raw mut time) } != 0 {
        return None;
    }
    let seconds = u64::try_from(time.tv_sec).ok()?;
    Some(Duration::new(seconds, u32::try_from(time.tv_nsec).ok()?))
}

/// Takes [`VcpuHold`]s of the vCPUs of a VM, whether it is paused or not.
#[derive(Clone)]
pub struct VcpuHolder(Arc<Shared>);

/// A hold: no vCPU is in the guest for as long as this lives.
#[must_use = "the vCPUs go on when this is dropped"]
pub struct VcpuHold<'a>(&'a Shared);

impl VcpuHolder {
    /// CPU time that the threads of the vCPUs have used so far, without threads that have ended.
    pub fn cpu_time(&self) -> Duration {
        let threads = self.0.threads.lock();
        threads.iter().filter_map(thread_time).sum()
    }

    /// Takes all vCPUs out of the guest, as [`Vcpus::pause`] does, until what is returned is dropped. `None` once they
    /// are stopped for good.
    pub fn hold(&self) -> Option<VcpuHold<'_>> {
        let mut table = self.0.table();
        if table.target == Target::Stop {
            return None;
        }
        table.holds += 1;
        let hold = VcpuHold(&self.0);
        self.0.kick(&table);
        self.0.wait_for_parked(table);
        Some(hold)
    }
}

impl Drop for VcpuHold<'_> {
    fn drop(&mut self) {
        self.0.table().holds -= 1;
        self.0.changed.notify_all();
    }
}

impl Drop for Vcpus {
    fn drop(&mut self) {
        self.stop();
    }
}

fn thread_main(
    shared: &Shared,
    buses: &Buses,
    mut vcpu: Vcpu,
    (restored, confine): (bool, ConfineThread),
) {
    let index = vcpu.index;
    // Threads inherit the mask of signals, and the thread that starts this one may have blocked all of them, to read
    // them by signalfd.
    if let Err(why) = unblock_signal(kick_signal()) {
        tracing::warn!(%why, index, "the kick signal stays as it was");
    }
    let exit = match confine() {
        Ok(()) => {
            let looped = catch_unwind(AssertUnwindSafe(|| {
                run_loop(shared, buses, &mut vcpu, restored)
            }));
            looped.unwrap_or(Some(VcpuExit::Failed(VcpuError::Panicked { index })))
        }
        Err(error) => {
            let reason = chain(&error).to_string();
            Some(VcpuExit::Failed(VcpuError::Filter { index, reason }))
        }
    };
    shared.leave(index);
    drop(vcpu);
    if let Some(exit) = exit {
        shared.end(exit);
    }
}

/// Runs the vCPU until it is to stop (`None`) or the guest ends.
fn run_loop(shared: &Shared, buses: &Buses, vcpu: &mut Vcpu, restored: bool) -> Option<VcpuExit> {
    // Every vCPU waits until all are started. The guest can only notice a pause after that, or the time between its
    // save and its restore.
    let mut entered = restored;
    while let Next::Run { waited } = shared.wait_while_paused(vcpu) {
        if waited
            && entered
            && let Err(error) = vcpu.fd.kvmclock_ctrl()
        {
            // EINVAL means that the guest has not set up its kvm-clock, so that it need not be notified of the pause.
            tracing::debug!(error = %chain(&error), "KVM_KVMCLOCK_CTRL");
        }
        entered = true;
        loop {
            match vcpu.run(buses) {
                Step::Handled => {}
                Step::Interrupted => {
                    vcpu.exits.count(ExitKind::Interrupted);
                    break;
                }
                Step::Ended(exit) => {
                    vcpu.exits.count(ExitKind::Ended);
                    return Some(exit);
                }
            }
        }
    }
    None
}
