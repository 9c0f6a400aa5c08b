//! CPUID of the guest: what the host's KVM supports, with topology and hypervisor bits of this guest.
//!
//! The guest sees one socket of cores, each with one thread or, with SMT, with two. Leaf numbers and fields: Intel SDM
//! volume 2, CPUID; AMD64 APM volume 3, appendix E; Linux Documentation/virt/kvm/x86/cpuid.rst.

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm};

use sha2::{Digest, Sha256};

use super::error::VmError;

const FEATURES: u32 = 0x1;
const CACHE: u32 = 0x4;
const PERFORMANCE_MONITORING: u32 = 0xa;
const TOPOLOGY: u32 = 0xb;
const TOPOLOGY_V2: u32 = 0x1f;
const KVM_FEATURES: u32 = 0x4000_0001;
const AMD_FEATURES: u32 = 0x8000_0001;
const AMD_SIZES: u32 = 0x8000_0008;
const AMD_CACHE: u32 = 0x8000_001d;
const AMD_TOPOLOGY: u32 = 0x8000_001e;
const AMD_PERFORMANCE_MONITORING: u32 = 0x8000_0022;
const AMD_TOPOLOGY_V2: u32 = 0x8000_0026;

/// Leaf 1 ECX: the MSR of performance capabilities.
const PDCM: u32 = 1 << 15;
/// Leaf 1 ECX: TSC-deadline timer of the local APIC.
const TSC_DEADLINE: u32 = 1 << 24;
/// Leaf 1 ECX: runs under a hypervisor.
const HYPERVISOR: u32 = 1 << 31;
/// Leaf 1 EDX: more than one logical processor in the package.
const HTT: u32 = 1 << 28;
/// Leaf `0x4000_0001` EAX: asynchronous page faults: the feature itself, their delivery as exits to a nested
/// hypervisor, and an interrupt when the page is present.
const ASYNC_PF: u32 = (1 << 4) | (1 << 10) | (1 << 14);
/// Leaf `0x8000_0001` ECX: the logical processors of the package are cores.
const CMP_LEGACY: u32 = 1 << 1;
/// Leaf `0x8000_0001` ECX: leaf `0x8000_001e` has the topology. Without it Linux looks at no leaf of threads.
const TOPOLOGY_EXTENSIONS: u32 = 1 << 22;
/// Leaf `0x8000_0001` ECX: six performance counters.
const PERFCTR_CORE: u32 = 1 << 23;

/// The CPUID that all vCPUs share; [`Self::for_vcpu`] makes it that of one.
pub(super) struct CommonCpuid {
    pub(super) entries: Vec<kvm_cpuid_entry2>,
    vcpus: u8,
    /// Whether each core has two threads, where there is more than one vCPU.
    pub(super) smt: bool,
    /// Whether the local APIC has a TSC-deadline timer: such a guest needs no PIT.
    pub(super) tsc_deadline: bool,
}

impl CommonCpuid {
    /// The CPUID that the host supports, for a guest of `vcpus` vCPUs.
    pub(super) fn of_host(kvm: &Kvm, vcpus: u8) -> Result<Self, VmError> {
        let supported = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(VmError::kvm("KVM_GET_SUPPORTED_CPUID"))?;
        // KVM does not list the bit as supported: user space has to set it where the irqchip is KVM's.
        let tsc_deadline = kvm.check_extension(Cap::TscDeadlineTimer);
        Ok(Self {
            entries: supported.as_slice().to_vec(),
            vcpus,
            smt: false,
            tsc_deadline,
        })
    }

    /// Bits of a guest physical address; 36 where the processor does not report them (SDM volume 3, 4.1.4).
    pub(super) fn physical_bits(&self) -> u32 {
        let sizes = self.entries.iter().find(|e| e.function == AMD_SIZES);
        sizes.map_or(36, |sizes| sizes.eax & 0xff)
    }

    /// The CPUID of the vCPU with local APIC ID `apic_id`.
    pub(super) fn for_vcpu(&self, apic_id: u8) -> Result<CpuId, VmError> {
        let mut entries = self.entries.clone();
        // These leaves have the host's topology; the guest's is in leaf 0xb alone.
        entries.retain(|e| !matches!(e.function, TOPOLOGY | TOPOLOGY_V2 | AMD_TOPOLOGY_V2));
        for entry in &mut entries {
            self.adapt(entry, u32::from(apic_id));
        }
        entries.extend(self.topology(apic_id));
        CpuId::from_entries(&entries).map_err(|_| VmError::CpuidTooLong(entries.len()))
    }

    /// A digest of all leaves, which distinguishes this CPU from others as guests see them.
    pub(super) fn digest(&self) -> Result<Vec<u8>, VmError> {
        let mut digest = Sha256::new();
        for entry in self.for_vcpu(0)?.as_slice() {
            let words = [
                entry.function,
                entry.index,
                entry.eax,
                entry.ebx,
                entry.ecx,
                entry.edx,
            ];
            for word in words {
                digest.update(word.to_le_bytes());
            }
        }
        Ok(digest.finalize().to_vec())
    }

    /// Bits of the APIC ID that number the logical processors of the package.
    fn package_bits(&self) -> u32 {
        u32::from(self.vcpus).next_power_of_two().trailing_zeros()
    }

    /// Threads of a core, of which the APIC IDs follow each other.
    fn threads(&self) -> u32 {
        if self.smt && self.vcpus > 1 { 2 } else { 1 }
    }

    fn adapt(&self, entry: &mut kvm_cpuid_entry2, apic_id: u32) {
        let vcpus = u32::from(self.vcpus);
        let many = vcpus > 1;
        let threads = self.threads();
        let cores = vcpus / threads;
        // Logical processors that share a cache of a level - 1.
        let sharing = |eax: u32| match (eax >> 5) & 7 {
            3.. => vcpus - 1,
            _ => threads - 1,
        };
        let set = |register: &mut u32, bit: u32, on: bool| {
            *register = if on {
                *register | bit
            } else {
                *register & !bit
            }
        };
        match entry.function {
            FEATURES => {
                entry.ebx =
                    (apic_id << 24) | (vcpus.next_power_of_two() << 16) | (entry.ebx & 0xffff);
                set(&mut entry.ecx, HYPERVISOR, true);
                set(&mut entry.ecx, TSC_DEADLINE, self.tsc_deadline);
                set(&mut entry.ecx, PDCM, false);
                set(&mut entry.edx, HTT, many);
            }
            // EAX 31:26 cores of the package - 1, 25:14 logical processors that share this cache - 1.
            CACHE if entry.eax & 0x1f != 0 => {
                entry.eax = (entry.eax & 0x3fff) | (sharing(entry.eax) << 14) | ((cores - 1) << 26);
            }
            // No virtual PMU.
            PERFORMANCE_MONITORING | AMD_PERFORMANCE_MONITORING => {
                (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
            }
            // A guest with anonymous memory hardly ever has such a fault. A guest whose memory is mapped from files has
            // many, and on AMD processors they have led to tasks that wait for ever and to vCPUs that spin
            // (cloud-hypervisor #2277, firecracker #3020 and #3043).
            KVM_FEATURES => set(&mut entry.eax, ASYNC_PF, false),
            AMD_FEATURES => {
                set(&mut entry.ecx, CMP_LEGACY, many);
                // The leaf is the guest's own, whatever the host has; only AMD's processors have one of that number.
                let has_topology = self.entries.iter().any(|e| e.function == AMD_TOPOLOGY);
                if threads > 1 && has_topology {
                    set(&mut entry.ecx, TOPOLOGY_EXTENSIONS, true);
                }
                set(&mut entry.ecx, PERFCTR_CORE, false);
            }
            // ECX 15:12 APIC ID size, 7:0 logical processors - 1.
            AMD_SIZES => {
                entry.ecx = (entry.ecx & !0xf0ff) | (self.package_bits() << 12) | (vcpus - 1);
            }
            AMD_CACHE if entry.eax & 0x1f != 0 => {
                entry.eax = (entry.eax & 0x3fff) | (sharing(entry.eax) << 14);
            }
            // EAX extended APIC ID; EBX 15:8 threads of the core - 1, 7:0 core; ECX one node.
            AMD_TOPOLOGY => {
                let core = apic_id / threads;
                (entry.eax, entry.ebx, entry.ecx) = (apic_id, ((threads - 1) << 8) | core, 0);
            }
            _ => {}
        }
    }

    /// Leaf `0xb`: the threads of a core, and the logical processors of all cores.
    fn topology(&self, apic_id: u8) -> [kvm_cpuid_entry2; 2] {
        let level = |index: u32, shift: u32, processors: u32, kind: u32| kvm_cpuid_entry2 {
            function: TOPOLOGY,
            index,
            flags: kvm_bindings::KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            eax: shift,
            ebx: processors,
            ecx: (kind << 8) | index,
            edx: u32::from(apic_id),
            ..Default::default()
        };
        [
            level(0, self.threads().trailing_zeros(), self.threads(), 1),
            level(1, self.package_bits(), u32::from(self.vcpus), 2),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, index: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            index,
            eax: 0x7f,
            ebx: u32::MAX,
            ecx: u32::MAX,
            edx: u32::MAX,
            ..Default::default()
        }
    }

    fn template(vcpus: u8) -> CommonCpuid {
        let leaves = [
            FEATURES,
            CACHE,
            PERFORMANCE_MONITORING,
            TOPOLOGY_V2,
            AMD_FEATURES,
            AMD_SIZES,
            AMD_TOPOLOGY,
            AMD_PERFORMANCE_MONITORING,
            AMD_TOPOLOGY_V2,
        ];
        CommonCpuid {
            entries: leaves.iter().map(|f| entry(*f, 0)).collect(),
            vcpus,
            smt: false,
            tsc_deadline: false,
        }
    }

    fn find(cpuid: &CpuId, function: u32, index: u32) -> kvm_cpuid_entry2 {
        *cpuid
            .as_slice()
            .iter()
            .find(|e| e.function == function && e.index == index)
            .unwrap()
    }

    #[test]
    fn topology_is_one_socket_of_single_threaded_cores() {
        let cpuid = template(6).for_vcpu(5).unwrap();
        let features = find(&cpuid, FEATURES, 0);
        assert_eq!(features.ebx >> 24, 5);
        assert_eq!((features.ebx >> 16) & 0xff, 8);
        assert_eq!(features.edx & HTT, HTT);
        assert_eq!(find(&cpuid, CACHE, 0).eax >> 26, 5);
        let (thread, core) = (find(&cpuid, TOPOLOGY, 0), find(&cpuid, TOPOLOGY, 1));
        assert_eq!(
            (thread.eax, thread.ebx, thread.ecx, thread.edx),
            (0, 1, 0x100, 5)
        );
        assert_eq!((core.eax, core.ebx, core.ecx, core.edx), (3, 6, 0x201, 5));
        let sizes = find(&cpuid, AMD_SIZES, 0);
        assert_eq!((sizes.ecx & 0xff, (sizes.ecx >> 12) & 0xf), (5, 3));
        assert_eq!(find(&cpuid, AMD_TOPOLOGY, 0).eax, 5);
        for hosts in [TOPOLOGY_V2, AMD_TOPOLOGY_V2] {
            assert!(cpuid.as_slice().iter().all(|e| e.function != hosts));
        }
    }

    #[test]
    fn with_smt_two_vcpus_after_each_other_are_the_threads_of_a_core() {
        let smt = |vcpus| CommonCpuid {
            smt: true,
            ..template(vcpus)
        };
        for (vcpu, core) in [(0, 0), (1, 0), (4, 2), (5, 2)] {
            let cpuid = smt(6).for_vcpu(vcpu).unwrap();
            let apic_id = u32::from(vcpu);
            let features = find(&cpuid, FEATURES, 0);
            assert_eq!(features.ebx >> 24, apic_id);
            assert_eq!((features.ebx >> 16) & 0xff, 8);
            assert_eq!(features.edx & HTT, HTT);
            // Level 3 is shared by all 6, and there are three cores.
            let cache = find(&cpuid, CACHE, 0).eax;
            assert_eq!(((cache >> 14) & 0xfff, cache >> 26), (5, 2));
            let (thread, all) = (find(&cpuid, TOPOLOGY, 0), find(&cpuid, TOPOLOGY, 1));
            assert_eq!((thread.eax, thread.ebx, thread.ecx), (1, 2, 0x100));
            assert_eq!((all.eax, all.ebx, all.ecx), (3, 6, 0x201));
            assert_eq!((thread.edx, all.edx), (apic_id, apic_id));
            let sizes = find(&cpuid, AMD_SIZES, 0);
            assert_eq!((sizes.ecx & 0xff, (sizes.ecx >> 12) & 0xf), (5, 3));
            let amd = find(&cpuid, AMD_TOPOLOGY, 0);
            assert_eq!((amd.eax, amd.ebx), (apic_id, 0x100 | core));
            let features = find(&cpuid, AMD_FEATURES, 0);
            assert_ne!(features.ecx & TOPOLOGY_EXTENSIONS, 0);
        }
        let cpuid = smt(1).for_vcpu(0).unwrap();
        assert_eq!(find(&cpuid, FEATURES, 0).edx & HTT, 0);
        let thread = find(&cpuid, TOPOLOGY, 0);
        assert_eq!((thread.eax, thread.ebx), (0, 1));
        assert_eq!(find(&cpuid, AMD_TOPOLOGY, 0).ebx, 0);
        // Caches of levels 1 and 2 are a core's.
        for (level, shared) in [(1, 1), (2, 1), (3, 5)] {
            for (function, bits) in [(CACHE, 0xfff), (AMD_CACHE, 0xfff)] {
                let mut entry = entry(function, 0);
                entry.eax = (level << 5) | 1;
                smt(6).adapt(&mut entry, 0);
                assert_eq!((entry.eax >> 14) & bits, shared, "{function:#x} {level}");
            }
        }
    }

    #[test]
    fn a_single_vcpu_claims_no_siblings() {
        let cpuid = template(1).for_vcpu(0).unwrap();
        assert_eq!(find(&cpuid, FEATURES, 0).edx & HTT, 0);
        assert_eq!(find(&cpuid, AMD_FEATURES, 0).ecx & CMP_LEGACY, 0);
        assert_eq!(find(&cpuid, TOPOLOGY, 1).eax, 0);
    }

    #[test]
    fn the_guest_sees_a_hypervisor_and_no_pmu() {
        let cpuid = template(1).for_vcpu(0).unwrap();
        assert_eq!(
            find(&cpuid, FEATURES, 0).ecx & (HYPERVISOR | TSC_DEADLINE),
            HYPERVISOR
        );
        assert_eq!(find(&cpuid, PERFORMANCE_MONITORING, 0).eax, 0);
        assert_eq!(find(&cpuid, AMD_PERFORMANCE_MONITORING, 0).eax, 0);
        assert_eq!(find(&cpuid, FEATURES, 0).ecx & PDCM, 0);
        assert_eq!(find(&cpuid, AMD_FEATURES, 0).ecx & PERFCTR_CORE, 0);
    }

    #[test]
    fn no_page_fault_is_asynchronous() {
        let hosts = kvm_cpuid_entry2 {
            eax: u32::MAX,
            ..entry(KVM_FEATURES, 0)
        };
        let template = CommonCpuid {
            entries: vec![hosts],
            ..template(1)
        };
        let cpuid = template.for_vcpu(0).unwrap();
        assert_eq!(find(&cpuid, KVM_FEATURES, 0).eax, !ASYNC_PF);
    }
}
