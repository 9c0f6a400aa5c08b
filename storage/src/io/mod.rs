//! Moves bytes between the extents of a disk and buffers, asynchronously.
//!
//! ```text
//!            submit                       ┌── io_uring ────── files of the extents
//! caller ──> DiskQueue ── transfers ──────┤
//!    ^       (resolve, split)             └── worker thread ─ the same, and Disk::flush, discard, …
//!    └────── completions <── eventfd ─────────┘
//! ```
//!
//! A [`DiskQueue`] belongs to one thread, which submits requests and takes completions when the queue's eventfd becomes
//! readable; it outlives its requests, since the kernel gives up the I/O of a thread that ends. Transfers go through
//! `io_uring` where the kernel allows it. What blocks by nature (a flush that has metadata to write, a discard) and,
//! where `io_uring` is forbidden, every transfer, goes to one worker thread, which is started when it is first needed.
//!
//! A buffer is owned by the queue from submission to completion, so that its memory outlives every access by
//! the kernel, and dropping the queue waits for what is in flight.

mod buffer;
mod engine;
mod queue;
mod transfer;
mod uring;
mod worker;

pub use buffer::{IoBuffer, OwnedBuffer, Source};
pub use engine::EngineKind;
pub use queue::{Completion, DiskQueue, IoError, Request};
