//! The end of a guest's process: why it came, and what becomes of the guest.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::sleep;

use super::Daemon;
use super::events::EventKind;
use super::jail::Jailed;
use super::lifecycle::blocking;
use super::process::{Exit, Process};
use super::spec::RestartPolicy;
use super::status::{Ended, State, now_ms};
use super::store;
use super::vm::Vm;
use host::exit::{EndKind, EndReport};
use jail::{CgroupConfig, LimitHits};

/// Restarts in a row, after none of which a guest ran for [`LONG`].
const RESTARTS: u32 = 5;
const LONG: Duration = Duration::from_mins(1);
/// Longest reason, in characters.
const LONGEST_TEXT: usize = 4096;

impl Daemon {
    /// Waits for the end of a process, and says so. Its control group had met its limits so often before.
    pub(super) fn watch(self: &Arc<Self>, vm: &Arc<Vm>, process: &Arc<Process>, before: LimitHits) {
        let (daemon, vm, process) = (self.clone(), vm.clone(), process.clone());
        tokio::spawn(async move {
            let exit = process.ended().await;
            daemon.ended(&vm, exit, before).await;
        });
    }

    pub(super) async fn ended(self: &Arc<Self>, vm: &Arc<Vm>, exit: Exit, before: LimitHits) {
        let folder = vm.folder.clone();
        let group = vm.now().jail.as_ref().and_then(Jailed::cgroup);
        let report = blocking(move || {
            let hits = group.as_ref().map(CgroupConfig::hits).unwrap_or_default();
            let killed = group.as_ref().filter(|_| hits.killed > before.killed);
            let mut report = reason(&folder, exit, killed);
            let refused = group.as_ref().filter(|_| hits.refused > before.refused);
            if let (EndKind::Failed, Some(group)) = (report.kind, refused) {
                report.text = format!("{}: {}", report.text, group.few_threads());
            }
            report
        });
        let report = report.await;
        let report = report.unwrap_or_else(|fault| EndReport::failed(&fault));
        tracing::info!(vm = %vm.id, ?report, "a process has ended");
        let settled = vm.change(|now| {
            let ran = now.since.take().map(|since| since.elapsed());
            now.process = None;
            now.measured = None;
            now.end = Some(Ended {
                report,
                time_ms: now_ms(),
            });
            // Where none was there to see it end, it is once for each daemon at most.
            if ran.is_none_or(|ran| ran >= LONG) {
                now.failures = 0;
            }
            match now.state {
                // Whoever makes, starts or deletes it goes on from here.
                State::Creating | State::Starting | State::Deleting => false,
                State::NotStarted
                | State::Running
                | State::Paused
                | State::Stopped
                | State::Failed
                | State::Restarting => true,
            }
        });
        if settled {
            self.settle(vm);
            self.save(vm).await;
        }
    }

    /// Decides what becomes of a guest that has no process; leaves alone one that has.
    pub(super) fn settle(self: &Arc<Self>, vm: &Arc<Vm>) {
        let (kind, text, delay) = {
            let mut now = vm.now();
            let (None, Some(end)) = (&now.process, now.end.clone()) else {
                return;
            };
            let in_order = match end.report.kind {
                EndKind::PowerOff | EndKind::Quit | EndKind::Signal => true,
                EndKind::Reset
                | EndKind::Panic
                | EndKind::Crash
                | EndKind::Failed
                | EndKind::Killed
                | EndKind::Unknown => false,
            };
            let text = end.report.text;
            let again = match vm.spec.restart {
                // One that waits to be told has not run.
                _ if now.stopping || now.state == State::NotStarted => false,
                RestartPolicy::Never => false,
                RestartPolicy::OnFailure => !in_order,
                RestartPolicy::Always => true,
            };
            if !again {
                let stopped = now.stopping || in_order || end.report.kind == EndKind::Reset;
                let (state, kind) = if stopped {
                    (State::Stopped, EventKind::Stopped)
                } else {
                    (State::Failed, EventKind::Failed)
                };
                now.state = state;
                (kind, text, None)
            } else if now.failures >= RESTARTS {
                now.state = State::Failed;
                let text = format!(
                    "{text}; it has ended so soon {RESTARTS} times in a row, and is not started again: find out why, and start it"
                );
                (EventKind::RestartsExhausted, text, None)
            } else {
                let delay = Duration::from_secs(1 << now.failures);
                now.state = State::Restarting;
                now.failures += 1;
                let text = format!("{text}; it is started again in {} s", delay.as_secs());
                (EventKind::Restarting, text, Some(delay))
            }
        };
        vm.change(|_| ());
        self.events.tell(kind, Some(&vm.id), Some(text));
        if let Some(delay) = delay {
            self.restart_later(vm, delay);
        }
    }

    pub(super) fn restart_later(self: &Arc<Self>, vm: &Arc<Vm>, delay: Duration) {
        let (daemon, vm) = (self.clone(), vm.clone());
        tokio::spawn(async move {
            sleep(delay).await;
            let _operation = vm.operation.lock().await;
            if vm.state() != State::Restarting {
                return;
            }
            vm.change(|now| now.restarts += 1);
            daemon.metrics.restarted();
            if let Err(fault) = daemon.start_again(&vm).await {
                tracing::warn!(vm = %vm.id, %fault, "a guest could not be started again");
            }
        });
    }
}

/// Why a process ended: as it says itself, or else as far as it can be told.
/// `killed` is its control group, where one of that was killed for want of memory.
fn reason(folder: &Path, exit: Exit, killed: Option<&CgroupConfig>) -> EndReport {
    match store::read(&folder.join("end.json")) {
        Ok(Some(EndReport { kind, text, code })) => {
            // It is the process's own word, and told to many.
            let text = text.chars().take(LONGEST_TEXT).collect();
            return EndReport { kind, text, code };
        }
        Ok(None) => {}
        Err(error) => tracing::warn!(%error, "the reason of an end cannot be read"),
    }
    let (kind, text, code) = match (exit, killed) {
        (Exit::Signal(9) | Exit::Unseen, Some(group)) => (EndKind::Killed, group.shortage(), None),
        (Exit::Code(code), _) => {
            let text = format!("the process ended with code {code}");
            (EndKind::Failed, text, Some(code))
        }
        (Exit::Signal(9), None) => {
            let text = "the process was killed (SIGKILL): by a user, or by the kernel for want of memory, which dmesg would tell";
            (EndKind::Killed, text.to_owned(), None)
        }
        (Exit::Signal(number), _) => {
            let text = format!("the process crashed, or was killed, by signal {number}");
            (EndKind::Killed, text, None)
        }
        (Exit::Unseen, None) => {
            let text = "the process is gone, and has left no reason: it was killed, or the host was restarted";
            (EndKind::Unknown, text.to_owned(), None)
        }
    };
    let log = std::fs::read_to_string(folder.join("log")).unwrap_or_default();
    let text = match log.lines().next_back() {
        Some(line) => format!("{text}; its log ends with: {line:.300}"),
        None => text,
    };
    EndReport { kind, text, code }
}
