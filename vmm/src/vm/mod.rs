//! The virtual machine as KVM sees it.
