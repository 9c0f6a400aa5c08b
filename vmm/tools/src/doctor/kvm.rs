//! Checks `/dev/kvm`: whether it exists and can be used, has all capabilities, and is fast.

use kvm_bindings::KVM_API_VERSION;
use kvm_ioctls::Kvm;

use super::check::Check;
use super::speed;
use host::report::chain;
use kvm::vm::{REQUIRED_CAPABILITIES, open_advice};

const DEVICE: &str = "kvm";
const API: &str = "kvm_api";
const CAPABILITIES: &str = "kvm_capabilities";

/// The checks of KVM. After one that fails, those that depend on it are left out, as they would only repeat the
/// failure.
pub(super) fn checks() -> Vec<Check> {
    let kvm = match Kvm::new() {
        Ok(kvm) => kvm,
        Err(error) => {
            let found = format!("/dev/kvm does not open: {}", chain(&error));
            return vec![Check::fail(DEVICE, found, open_advice(error))];
        }
    };
    let mut checks = vec![Check::ok(DEVICE, "/dev/kvm opens for reading and writing")];
    let version = kvm.get_api_version();
    if u32::try_from(version) != Ok(KVM_API_VERSION) {
        let found = format!("API version {version}, not {KVM_API_VERSION}");
        checks.push(Check::fail(API, found, "use a Linux kernel with real KVM"));
        return checks;
    }
    checks.push(Check::ok(API, format!("version {version}")));
    let missing: Vec<&str> = REQUIRED_CAPABILITIES
        .iter()
        .filter(|(capability, _)| !kvm.check_extension(*capability))
        .map(|(_, name)| *name)
        .collect();
    if missing.is_empty() {
        let found = format!("all {} that are needed", REQUIRED_CAPABILITIES.len());
        checks.push(Check::ok(CAPABILITIES, found));
        checks.push(speed::check());
    } else {
        let found = format!("without {}", missing.join(", "));
        checks.push(Check::fail(
            CAPABILITIES,
            found,
            "use a newer Linux kernel on the host",
        ));
    }
    checks
}
