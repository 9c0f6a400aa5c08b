//! The virtual machine: where things lie in it ([`layout`]), what it boots from ([`boot`]), and its life in KVM
//! ([`vm`]).
//!
//! ```text
//! boot   kernel, initrd, ACPI tables ──> guest memory, registers of the first vCPU
//! vm     memory slots, irqchip, a thread for each vCPU, exits ──> the buses that devices are on
//! ```
//!
//! What a thread of a vCPU gives away before it enters the guest is decided by who makes the VM: see
//! [`vm::VmSettings::confine_vcpu`].

pub mod boot;
pub mod layout;
pub mod vm;
