//! The virtual machine: its address layout ([`layout`]), how it boots ([`boot`]), and its life in KVM ([`vm`]).
//!
//! ```text
//! boot   kernel, initrd, ACPI tables ──> guest memory, registers of the first vCPU
//! vm     memory slots, irqchip, a thread for each vCPU, exits ──> the buses that devices are on
//! ```
//!
//! Whoever makes the VM decides which rights the thread of a vCPU gives up before it enters the guest: see
//! [`vm::VmSettings::confine_vcpu`].

pub mod boot;
pub mod layout;
pub mod vm;
