//! Guests whose RAM is in huge pages that the host has reserved.

use super::*;
use crate::layout::HUGETLBFS_PAGE;

const MEMORY: u64 = 8 << 20;

fn made(memory_bytes: u64) -> Result<Vm, VmError> {
    Vm::new(VmSettings {
        memory_bytes,
        vcpus: 1,
        smt: false,
        cpu: GuestCpu::Host,
        is_saved: false,
        huge_pages: HugePages::Hugetlbfs,
        confine_vcpu: || Ok(()),
    })
}

#[test]
fn a_guest_runs_in_reserved_huge_pages() {
    let Some(_reserved) = skip::HugePages::reserve(MEMORY / HUGETLBFS_PAGE) else {
        return;
    };
    let vm = made(MEMORY).unwrap();
    let host = memory::slots(vm.memory()).next().unwrap().3;
    // out PORT, al; hlt
    let guest = run(vm, &[0xe6, 0x10, 0xf4], Mode::Real);
    assert!(matches!(
        guest.accesses.recv().unwrap(),
        Access::Write(0, _)
    ));
    let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let of_ram = smaps.split_once(&format!("{host:x}-")).unwrap().1;
    let page = of_ram
        .lines()
        .find(|line| line.starts_with("KernelPageSize:"));
    assert!(page.unwrap().ends_with("2048 kB"), "{page:?}");
}

#[test]
fn huge_pages_that_the_host_does_not_have_are_refused_when_the_guest_is_made() {
    // No host of a test has reserved 1 TiB.
    let error = made(1 << 40).err().expect("a guest of 1 TiB").to_string();
    for part in [
        "524288 huge pages",
        "machine-config.huge_pages",
        "vm.nr_hugepages",
    ] {
        assert!(error.contains(part), "{error}");
    }
    assert!(matches!(
        made(MEMORY + 4096),
        Err(VmError::HugePageSize { size }) if size == MEMORY + 4096
    ));
}
