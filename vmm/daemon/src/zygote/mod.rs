//! Guests' processes that are copies (`fork`) of a process that has been loaded already: the *zygote*, as Android and
//! Chromium call it.
//!
//! ```text
//! coppice serve ── SOCK_SEQPACKET: arguments, descriptors ──> coppice zygote
//!       │                                                           │ clone(CLONE_PARENT)
//!       └── its parent, as if it had started the process itself ──> coppice run ...
//! ```
//!
//! A program that can be loaded at any address has some 200 KiB of pointers that are relocated when it is loaded, which
//! makes those pages private. A process that is executed has its own copy of them. Copies of the zygote share its
//! relocated pages (copy on write), and start sooner. In return, all of them have the zygote's addresses of program,
//! heap, stack and mappings, and its pointer guard; each has a stack canary of its own. `coppice serve --own-layout`
//! has each process executed instead, so that all of these differ.
//!
//! The zygote has one thread, no descriptor but the socket and the log, and ends with the daemon.

mod canary;
mod client;
mod fork;
mod server;
mod title;
mod wire;

pub use client::{MANAGER, SpawnOptions, Zygote};
pub use server::{Spawned, serve};
