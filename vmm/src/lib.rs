//! Coppice, a minimal KVM virtual machine monitor.
//!
//! ```text
//! cli ──┐                       ┌─ boot   kernel, initrd, ACPI into guest memory
//!       ├─ control ── machine ──┼─ vm     KVM: memory slots, irqchip, vCPU threads, exits
//! api ──┘   (state)   (devices) └─ devices, storage (crates)
//!                                memshare (crate): which pages of guest memory are files'
//! ```
//!
//! [`serve`] is the host daemon: it starts a `coppice run` for each guest, and [`remote`] is its client.
//!
//! [`config`] is what a user asks for, checked field by field. [`control`] takes it, from the command line or the
//! REST socket ([`api`]), and refuses what comes in the wrong state. [`machine`] builds the guest and its devices and
//! owns their threads: one for each vCPU, one for all devices, one for the REST socket where there is one. [`pmem`] maps disks into the
//! guest's memory, and has a thread for each that the guest has flushed. [`fault`] ends a guest of which a mapped page is lost.
//! [`jail`] takes from the process, before any of that, what it does not need.

pub mod api;
pub mod bench;
pub mod boot;
pub mod cli;
pub mod config;
pub mod console;
pub mod control;
pub mod disk_tool;
pub mod doctor;
pub mod exit;
pub mod fault;
pub mod heap;
pub mod jail;
pub mod layout;
pub mod logging;
pub mod machine;
pub mod metrics;
pub mod mmds;
pub mod pmem;
pub mod procfs;
pub mod reference;
pub mod remote;
pub mod report;
pub mod run;
pub mod serve;
pub mod signals;
pub mod snapshot;
mod stack;
pub mod text_table;
pub mod top;
pub mod vm;
pub mod zygote;
