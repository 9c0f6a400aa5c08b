//! What a guest sees of its CPU: templates and threads.

use config::{
    Bitmap, CpuConfig, CpuTemplate, CpuidModifier, CpuidRegister, MsrModifier, Number,
    RegisterModifier,
};

use kvm_bindings::KVM_MAX_CPUID_ENTRIES;

use super::*;

const MEMORY: u64 = 4 << 20;
const MISC_ENABLE: u32 = 0x1a0;

fn settings(vcpus: u8, cpu: GuestCpu) -> VmSettings {
    VmSettings {
        memory_bytes: MEMORY,
        vcpus,
        smt: false,
        cpu,
        is_saved: false,
        huge_pages: HugePages::Never,
        confine_vcpu: || Ok(()),
    }
}

/// CMPXCHG16B (leaf 1 ECX), which every processor with KVM has.
const FEATURE: u32 = 1 << 13;

/// Clears [`FEATURE`], and sets bit 3 of `IA32_MISC_ENABLE`.
fn custom() -> CpuConfig {
    CpuConfig {
        cpuid_modifiers: vec![CpuidModifier {
            leaf: Number(1),
            subleaf: Number(0),
            flags: 0,
            modifiers: vec![RegisterModifier {
                register: CpuidRegister::Ecx,
                bitmap: Bitmap::new(FEATURE.into(), 0),
            }],
        }],
        msr_modifiers: vec![MsrModifier {
            addr: Number(MISC_ENABLE),
            bitmap: Bitmap::new(1 << 3, 1 << 3),
        }],
        ..CpuConfig::default()
    }
}

/// ECX of leaf 1 as KVM gives it to the guest. Some KVMs run CPUID on the processor, so the guest is not asked.
fn features(vm: &Vm) -> u32 {
    let cpuid = vm.vcpus[0].fd.get_cpuid2(KVM_MAX_CPUID_ENTRIES).unwrap();
    let mut entries = cpuid.as_slice().iter();
    entries.find(|entry| entry.function == 1).unwrap().ecx
}

/// What the guest sends to PORT.
fn sent(vm: Vm, code: &[u8]) -> u32 {
    let guest = run(vm, code, Mode::Real);
    match guest.accesses.recv() {
        Ok(Access::Write(0, bytes)) => u32::from_le_bytes(bytes.try_into().unwrap()),
        other => panic!("{other:?}, {:?}", guest.exits.try_recv()),
    }
}

/// The MSR as the guest reads it.
fn misc_enable(vm: Vm) -> u32 {
    let mut code = vec![0x66, 0xb9]; // mov ecx, msr
    code.extend(MISC_ENABLE.to_le_bytes());
    code.extend([0x0f, 0x32, 0x66, 0xe7, 0x10, 0xf4]); // rdmsr; out PORT, eax; hlt
    sent(vm, &code)
}

#[test]
fn a_guest_sees_the_cpu_of_its_template_and_a_loaded_one_the_same() {
    let made = |cpu| Vm::new(settings(1, cpu)).unwrap();
    let plain = made(GuestCpu::Host);
    assert_eq!(features(&plain) & FEATURE, FEATURE);
    assert_eq!(misc_enable(plain) & (1 << 3), 0);
    let cpu = GuestCpu::Custom(custom());
    assert_eq!(features(&made(cpu.clone())) & FEATURE, 0);
    assert_eq!(misc_enable(made(cpu.clone())) & (1 << 3), 1 << 3);

    // l: jmp l
    let guest = run(made(cpu.clone()), &[0xeb, 0xfe], Mode::Real);
    guest.vcpus.pause();
    let (vm, vcpus) = guest.vcpus.save().unwrap();
    for cpu in [cpu, GuestCpu::Host] {
        let mut loaded = Vm::new(VmSettings {
            is_saved: true,
            ..settings(1, cpu)
        })
        .unwrap();
        loaded.restore(&vm, &vcpus, ClockOnLoad::Kept).unwrap();
        assert_eq!(features(&loaded) & FEATURE, 0);
        let msr = loaded.vcpus[0].msr(MISC_ENABLE).unwrap();
        assert_eq!(msr & (1 << 3), 1 << 3);
    }
}

#[test]
fn what_kvm_does_not_have_is_refused_by_name() {
    let refused = |template| {
        let made = Vm::new(settings(1, GuestCpu::Custom(template)));
        made.err().expect("a template that cannot be").to_string()
    };
    let mut no_leaf = custom();
    no_leaf.cpuid_modifiers[0].leaf = Number(0x1234_5678);
    let error = refused(no_leaf);
    assert!(
        error.contains("cpuid_modifiers") && error.contains("0x12345678"),
        "{error}"
    );
    let mut no_msr = custom();
    no_msr.msr_modifiers[0].addr = Number(0x1234_5678);
    let error = refused(no_msr);
    assert!(
        error.contains("msr_modifiers") && error.contains("0x12345678"),
        "{error}"
    );
}

#[test]
fn a_static_template_is_refused_on_other_processors() {
    // This is none of AMD's and of Intel's at the same time.
    let [intel, amd] = [CpuTemplate::T2, CpuTemplate::T2A].map(|template| {
        let made = Vm::new(settings(1, GuestCpu::Static(template)));
        made.err().map(|error| error.to_string())
    });
    let error = intel.or(amd).expect("one of them is for another vendor");
    assert!(error.contains("machine-config.cpu_template: T2"), "{error}");
}

#[test]
fn the_threads_of_a_core_are_in_the_topology_that_the_guest_reads() {
    for (smt, threads) in [(false, 1), (true, 2)] {
        let vm = Vm::new(VmSettings {
            smt,
            ..settings(2, GuestCpu::Host)
        });
        // mov eax, 0xb; xor ecx, ecx; cpuid; mov eax, ebx; out PORT, eax; hlt
        let code = [
            0x66, 0xb8, 0x0b, 0, 0, 0, 0x66, 0x31, 0xc9, 0x0f, 0xa2, 0x66, 0x89, 0xd8, 0x66, 0xe7,
            0x10, 0xf4,
        ];
        assert_eq!(sent(vm.unwrap(), &code), threads, "smt {smt}");
    }
}
