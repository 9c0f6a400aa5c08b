//! Pages of guest memory that are lost, as a file under them is cut or fails: whoever meets one ends the guest, with a report.
//!
//! A vCPU that touches such a page leaves the guest with an error of `KVM_RUN`, and a system call on behalf of a device returns `EFAULT`: then all
//! files are asked which page it can be. A thread of the host is stopped by `SIGBUS`, which [`FaultWatch`] sees to. The memory manager tells of a
//! file that was cut before anybody has met one.

use std::io;
use std::sync::Arc;

use memshare::{FileChange, LostPage, SharedFile, SharedMemory};

use super::surroundings::OnEnd;
use crate::fault::{ADVICE, FaultWatch, GuestRange};
use crate::pmem::PmemMemory;
use host::exit::GuestEnd;
use host::report::chain;
use kvm::vm::VcpuExit;

/// Whose pages can be lost, and who is to know.
pub(super) struct Faults {
    memory: Arc<SharedMemory>,
    pmem: Vec<PmemMemory>,
    on_end: OnEnd,
}

impl Faults {
    pub(super) fn new(
        memory: Arc<SharedMemory>,
        pmem: Vec<PmemMemory>,
        on_end: OnEnd,
    ) -> Arc<Self> {
        for file in pmem.iter().flat_map(PmemMemory::settled_files) {
            memory.look_after(file);
        }
        let this = Arc::new(Self {
            memory,
            pmem,
            on_end,
        });
        let told = Arc::downgrade(&this);
        this.memory.on_change(Box::new(move |file, change| {
            if let Some(faults) = told.upgrade() {
                faults.file_changed(file, change);
            }
        }));
        this
    }

    /// Ends the process, as long as the answer lives, where one of its threads touches a lost page.
    pub(super) fn watch(&self) -> io::Result<FaultWatch> {
        let ram = self.memory.regions().iter();
        let ram = ram.map(|region| GuestRange::new(region.start, &region.window));
        let ranges: Vec<_> = ram.chain(self.pmem.iter().map(PmemMemory::range)).collect();
        FaultWatch::start(&ranges)
    }

    fn lost_page(&self) -> Option<LostPage> {
        let pmem = || self.pmem.iter().find_map(PmemMemory::lost_page);
        self.memory.lost_page().or_else(pmem)
    }

    /// Why the guest ends that a vCPU has left so.
    fn explained(&self, exit: VcpuExit) -> GuestEnd {
        // KVM has other words for it where it looks at the guest's instructions itself.
        let lost = match &exit {
            VcpuExit::Failed(_) => self.lost_page(),
            VcpuExit::Shutdown | VcpuExit::Reset | VcpuExit::Crash | VcpuExit::TripleFault => None,
        };
        match (lost, exit) {
            (Some(lost), VcpuExit::Failed(error)) => {
                GuestEnd::Failed(format!("{lost}; {ADVICE} ({})", chain(&error)))
            }
            (_, exit) => exit.into(),
        }
    }

    /// A vCPU has left the guest for good.
    pub(super) fn vcpu_left(&self, exit: VcpuExit) {
        (self.on_end)(self.explained(exit));
    }

    /// The host could not reach the guest memory of a request.
    pub(super) fn request_failed(&self) {
        if let Some(lost) = self.lost_page() {
            (self.on_end)(GuestEnd::Failed(format!("{lost}; {ADVICE}")));
        } else {
            devices::limited!(
                warn,
                "the host cannot reach guest memory, and no file says why"
            );
        }
    }

    fn file_changed(&self, file: &SharedFile, change: FileChange) {
        match change {
            FileChange::Truncated { .. } => {
                let report = self.lost_page().map_or_else(
                    || {
                        format!(
                            "{}, whose pages the guest has: {change}",
                            file.path().display()
                        )
                    },
                    |lost| lost.to_string(),
                );
                (self.on_end)(GuestEnd::Failed(format!("{report}; {ADVICE}")));
            }
            // What the guest has may be right or not; the log has the error.
            FileChange::Written | FileChange::Gone => {}
        }
    }
}
