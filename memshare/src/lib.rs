//! The memory manager that lets guests share one host page per file page, copied on write.
//!
//! A page of a file that does not change is in the host's page cache once. The manager maps that page, privately, where a guest wants its
//! content: the guests of all processes then have the same page of RAM, and a guest that writes to it gets a copy of its own from the host's kernel.
//! Nothing looks for pages that happen to be alike, so that no guest learns what another holds.
//!
//! ```text
//!  kernel, initrd ── map ──────────┐
//!  a device's read ── note_read ── Candidate ── merger: compare, hold, compare ──┐
//!                  └─ place ───────┤                                             v
//!                                  └──────────────────────────> Table + Window: the file's page in the guest
//!  what a guest frees ── give_back ──────────────────────────> its own memory again, of which it has touched none
//! ```
//!
//! - [`Window`] is memory whose mappings can be exchanged: the only module with `unsafe`.
//! - [`Table`] records, for each page of a guest, the file and the place in it, and whether the guest has written to it since.
//! - [`FileRegistry`] has one record of each file, and tells when one has changed that should not have.
//! - [`SharedMemory`] joins them for a guest, and [`Merger`] is the thread that turns copies into shared pages, off the path of any request.
//!
//! What can go wrong leaves the guest with more memory of its own, never with other bytes: a limit that is reached, a merger that is killed, a
//! file that changes. A file that is cut under a mapping cannot be helped: who touches the page gets `SIGBUS`, and [`SharedMemory::lost_page`] says
//! which page that is. [`SharedMemory::on_change`] tells of it before, where the merger finds out first.
//!
//! The crate knows nothing of KVM or virtio: [`StandStill`] is what it needs of a guest.

mod compared;
mod file;
mod lost;
mod memory;
mod merge;
mod merger;
mod page;
mod policy;
mod sampled;
mod snapshot;
mod stats;
mod table;
mod window;
mod zeros;

#[cfg(test)]
mod tests;

pub use file::{
    Admission, FileChange, FileIdentity, FileRegistry, OnChange, ShareError, SharedFile, data_range,
};
pub use lost::LostPage;
pub use memory::{IsBusy, Region, SharedMemory, StandStill, Usage};
pub use merger::Merger;
pub use page::is_zero;
pub use policy::{Limits, ShareMode, ShareModeError, max_map_count};
pub use snapshot::Content;
pub use stats::{Refusal, Stats};
pub use table::{Backing, PageState, Run, Table};
pub use window::{PAGE_SIZE, PageKind, Window};
