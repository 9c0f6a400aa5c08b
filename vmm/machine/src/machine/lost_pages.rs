//! Pages of guest memory that are lost because the file under them was cut or cannot be read. Whoever touches one ends
//! the guest with a report.
//!
//! A vCPU that touches such a page leaves the guest with an error of `KVM_RUN`, and a system call on behalf of a device
//! returns `EFAULT`. Neither names the page, so all mapped files are searched for one that is lost. A thread of the
//! host is stopped by `SIGBUS`, which [`BusErrorWatch`] handles. The memory manager finds a file that was cut even
//! before anybody touches a lost page.

use std::io;
use std::sync::Arc;

use memshare::{FileChange, LostPage, SharedFile, SharedMemory};

use super::surroundings::OnEnd;
use crate::bus_error::{ADVICE, BusErrorWatch, GuestRange};
use crate::pmem::PmemMemory;
use host::exit::GuestEnd;
use host::report::chain;
use kvm::vm::VcpuExit;

/// The memory whose pages can be lost, and the function that ends the guest when one is.
pub(super) struct LostPages {
    memory: Arc<SharedMemory>,
    pmem: Vec<PmemMemory>,
    on_end: OnEnd,
}

impl LostPages {
    pub(super) fn new(
        memory: Arc<SharedMemory>,
        pmem: Vec<PmemMemory>,
        on_end: OnEnd,
    ) -> Arc<Self> {
        for file in pmem.iter().flat_map(PmemMemory::immutable_files) {
            memory.look_after(file);
        }
        let this = Arc::new(Self {
            memory,
            pmem,
            on_end,
        });
        let weak = Arc::downgrade(&this);
        this.memory.on_change(Box::new(move |file, change| {
            if let Some(lost_pages) = weak.upgrade() {
                lost_pages.file_changed(file, change);
            }
        }));
        this
    }

    /// Ends the process when one of its threads touches a lost page, for as long as the returned value lives.
    pub(super) fn watch(&self) -> io::Result<BusErrorWatch> {
        let ram = self.memory.regions().iter();
        let ram = ram.map(|region| GuestRange::new(region.start, &region.window));
        let ranges: Vec<_> = ram.chain(self.pmem.iter().map(PmemMemory::range)).collect();
        BusErrorWatch::start(&ranges)
    }

    fn lost_page(&self) -> Option<LostPage> {
        let pmem = || self.pmem.iter().find_map(PmemMemory::lost_page);
        self.memory.lost_page().or_else(pmem)
    }

    /// Why the guest ends after a vCPU has left it by `exit`.
    fn explained(&self, exit: VcpuExit) -> GuestEnd {
        // KVM reports a lost page by different errors, among them those for an instruction that it cannot emulate, so
        // every error is checked.
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

    /// Ends the guest, as a vCPU has left it for good.
    pub(super) fn vcpu_left(&self, exit: VcpuExit) {
        (self.on_end)(self.explained(exit));
    }

    /// Ends the guest if a page is lost, as the host could not reach the guest memory of a request.
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
            // The pages that the guest has may still be right, so it goes on; the memory manager has logged the error.
            FileChange::Written | FileChange::Gone => {}
        }
    }
}
