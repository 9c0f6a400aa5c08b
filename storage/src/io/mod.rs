//! Moves bytes between the extents of a disk and buffers, asynchronously.
//!
//! ```text
//!             submit                       ┌─ io_uring ─────── extents' files
//! caller ──> DiskQueue ── transfers ──────┤
//!    ^       (resolve, split)              └─ worker thread ── extents' files, Disk::flush, discard, …
//!    └────── completions <── eventfd ───────────┘
//! ```
//!
//! A [`DiskQueue`] belongs to one thread, which submits requests and takes completions when the queue's eventfd becomes readable. Transfers go
//! through io_uring where the kernel allows it. What blocks by nature (a flush that has metadata to write, a discard) and, where io_uring
//! is forbidden, every transfer, goes to one worker thread, which is started when it is first needed.
//!
//! A buffer is owned by the queue from submission to completion, so that its memory outlives every access by
//! the kernel, and dropping the queue waits for what is in flight.

mod buffer;
mod engine;
mod queue;
mod transfer;
mod uring;
mod worker;

pub use buffer::{IoBuffer, OwnedBuffer};
pub use engine::EngineKind;
pub use queue::{Completion, DiskQueue, IoError, Request};
