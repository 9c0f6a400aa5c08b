//! The offset of a vCPU's TSC to the host's: an attribute of the vCPU since Linux 5.16 (Documentation/virt/kvm/devices/
//! vcpu.rst, `KVM_VCPU_TSC_OFFSET`).

use kvm_bindings::{KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, KVMIO, kvm_device_attr};
use kvm_ioctls::VcpuFd;
use vmm_sys_util::errno;
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iow_nr;

ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, KVMIO, 0xe1, kvm_device_attr);
ioctl_iow_nr!(KVM_GET_DEVICE_ATTR, KVMIO, 0xe2, kvm_device_attr);

fn attribute(value: *const u64) -> kvm_device_attr {
    kvm_device_attr {
        flags: 0,
        group: KVM_VCPU_TSC_CTRL,
        attr: KVM_VCPU_TSC_OFFSET.into(),
        addr: value as u64,
    }
}

/// The offset of a vCPU.
///
/// # Errors
/// KVM's error: most likely it is too old.
pub(super) fn get(vcpu: &VcpuFd) -> Result<u64, errno::Error> {
    let mut offset = 0;
    let attribute = attribute(&raw mut offset);
    // SAFETY: the descriptor is a vCPU's, and KVM writes the 8 bytes of this attribute to `offset`, which outlives the
    // call.
    match unsafe { ioctl_with_ref(vcpu, KVM_GET_DEVICE_ATTR(), &attribute) } {
        0 => Ok(offset),
        _ => Err(errno::Error::last()),
    }
}

/// Sets the offset of a vCPU that has not run.
///
/// # Errors
/// KVM's error: most likely it is too old.
pub(super) fn set(vcpu: &VcpuFd, offset: u64) -> Result<(), errno::Error> {
    let attribute = attribute(&raw const offset);
    // SAFETY: the descriptor is a vCPU's, and KVM reads the 8 bytes of this attribute from `offset`, which outlives the
    // call.
    match unsafe { ioctl_with_ref(vcpu, KVM_SET_DEVICE_ATTR(), &attribute) } {
        0 => Ok(()),
        _ => Err(errno::Error::last()),
    }
}
