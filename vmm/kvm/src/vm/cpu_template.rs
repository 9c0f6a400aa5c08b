//! CPU templates: what a guest's CPU has otherwise than the host's.
//!
//! The static ones are Firecracker's, bit by bit, so that a guest sees the same CPU with either. Leaves and bits: Intel
//! SDM volume 2, CPUID; AMD64 APM volume 3, appendix E.

use config::{
    Bitmap, CpuConfig, CpuTemplate, CpuidModifier, CpuidRegister, KvmCapability, MsrModifier,
    Number, RegisterModifier,
};
use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

use super::error::VmError;

/// The CPU of a guest.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum GuestCpu {
    /// As the host's.
    #[default]
    Host,
    /// As a static template has it.
    Static(CpuTemplate),
    /// As it is given, bit by bit.
    Custom(CpuConfig),
}

/// A processor, by leaf 0 and the version in leaf 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Processor {
    vendor: [u8; 12],
    /// Leaf 1 EAX, without reserved bits.
    version: u32,
}

const INTEL: [u8; 12] = *b"GenuineIntel";
const AMD: [u8; 12] = *b"AuthenticAMD";
/// Extended family and model, type, family, model and stepping.
const VERSION: u32 = 0x0fff_3fff;

const fn intel(version: u32) -> Processor {
    Processor {
        vendor: INTEL,
        version,
    }
}

const SKYLAKE: Processor = intel(0x0005_0654);
const CASCADE_LAKE: Processor = intel(0x0005_0657);
const ICE_LAKE: Processor = intel(0x0006_06a6);
const MILAN: Processor = Processor {
    vendor: AMD,
    version: 0x00a0_0f11,
};

/// A change of a register: leaf, subleaf, register, the bits that change, and their values.
type Row = (u32, u32, CpuidRegister, u32, u32);

use CpuidRegister::{Eax, Ebx, Ecx, Edx};

/// Version; features of leaf 1 and 7; extended state. What changes: no features that other processors of the family
/// lack (MPX, AVX-512, SGX, RDT, transactional memory and others), those of the host's own management hidden (MONITOR,
/// VMX, thermal monitors, debug store), MCE and MTRR shown.
const C3: [Row; 10] = [
    (0x1, 0, Eax, 0x0fff_3fff, 0x0003_06e4),
    (0x1, 0, Ecx, 0x0040_dd3c, 0),
    (0x1, 0, Edx, 0xa864_1080, 0x0000_1080),
    (0x7, 0, Ebx, 0xffaf_dd3c, 0),
    (0x7, 0, Ecx, 0x4041_481e, 0),
    (0x7, 0, Edx, 0x0000_000c, 0),
    (0xd, 0, Eax, 0x0000_02f8, 0),
    (0xd, 1, Eax, 0x0000_000e, 0),
    (0x8000_0001, 0, Ecx, 0x0000_0120, 0),
    (0x8000_0001, 0, Edx, 0x0400_0000, 0),
];

/// What the T2 family has in common, as [`C3`].
const ALL_T2: [Row; 8] = [
    (0x1, 0, Eax, 0x0fff_3fff, 0x0003_06f2),
    (0x1, 0, Ecx, 0x0004_cdfc, 0),
    (0x1, 0, Edx, 0xe864_1080, 0x0000_1080),
    (0x7, 0, Ebx, 0xffef_da14, 0x0000_0200),
    (0x7, 0, Ecx, 0x4041_5f5e, 0),
    (0x7, 0, Edx, 0x0000_011c, 0),
    (0xd, 0, Eax, 0x0000_02f8, 0),
    (0xd, 1, Eax, 0x0000_000e, 0),
];

/// Hidden: PREFETCHW and MONITORX; pages of 1 GiB; WBNOINVD.
const T2: [Row; 3] = [
    (0x8000_0001, 0, Ecx, 0x2000_0100, 0),
    (0x8000_0001, 0, Edx, 0x0400_0000, 0),
    (0x8000_0008, 0, Ebx, 0x0000_0200, 0),
];

/// Hidden, too: SSE4A and the bits that these leaves have of leaf 1 on AMD's processors alone.
const T2CL: [Row; 3] = [
    (0x8000_0001, 0, Ecx, 0x2000_01c0, 0),
    (0x8000_0001, 0, Edx, 0x07c0_0000, 0),
    (0x8000_0008, 0, Ebx, 0x0000_0200, 0),
];

/// Hidden, too: SVM, CLZERO. Shown: that error pointers are restored, that IBRS is preferred and of the same mode, and
/// that there is no EFER.LMSLE.
const T2A: [Row; 3] = [
    (0x8000_0001, 0, Ecx, 0x2000_01c4, 0),
    (0x8000_0001, 0, Edx, 0x0640_0000, 0),
    (0x8000_0008, 0, Ebx, 0x001c_0205, 0x001c_0004),
];

/// `IA32_ARCH_CAPABILITIES`: which vulnerabilities the processor lacks.
const ARCH_CAPABILITIES: u32 = 0x10a;

/// The processors that a static template is for, the changes that it makes of CPUID, and of [`ARCH_CAPABILITIES`].
fn parts(
    template: CpuTemplate,
) -> (
    &'static [Processor],
    [&'static [Row]; 2],
    Option<Bitmap<64>>,
) {
    match template {
        CpuTemplate::None => (&[], [&[], &[]], None),
        CpuTemplate::C3 => (&[SKYLAKE, CASCADE_LAKE, ICE_LAKE], [&C3, &[]], None),
        CpuTemplate::T2 => (&[SKYLAKE, CASCADE_LAKE, ICE_LAKE], [&ALL_T2, &T2], None),
        CpuTemplate::T2S => (
            &[SKYLAKE, CASCADE_LAKE],
            [&ALL_T2, &T2],
            Some(Bitmap::new(u64::MAX, 0x0c0a_0c4c)),
        ),
        CpuTemplate::T2CL => (
            &[CASCADE_LAKE, ICE_LAKE],
            [&ALL_T2, &T2CL],
            Some(Bitmap::new(0xffff_ffff_e2f5_1e00, 0)),
        ),
        CpuTemplate::T2A => (&[MILAN], [&ALL_T2, &T2A], None),
    }
}

fn modifier((leaf, subleaf, register, mask, value): Row) -> CpuidModifier {
    let bitmap = Bitmap::new(mask.into(), value.into());
    CpuidModifier {
        leaf: Number(leaf),
        subleaf: Number(subleaf),
        flags: match leaf {
            0x7 | 0xd => KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            _ => 0,
        },
        modifiers: vec![RegisterModifier { register, bitmap }],
    }
}

fn static_template(template: CpuTemplate) -> CpuConfig {
    let (_, rows, arch_capabilities) = parts(template);
    let msr = arch_capabilities.map(|bitmap| MsrModifier {
        addr: Number(ARCH_CAPABILITIES),
        bitmap,
    });
    CpuConfig {
        kvm_capabilities: Vec::new(),
        cpuid_modifiers: rows.into_iter().flatten().copied().map(modifier).collect(),
        msr_modifiers: msr.into_iter().collect(),
    }
}

fn leaf(entries: &[kvm_cpuid_entry2], function: u32, index: u32) -> Option<&kvm_cpuid_entry2> {
    let mut entries = entries.iter();
    entries.find(|entry| (entry.function, entry.index) == (function, index))
}

impl Processor {
    fn of(host: &[kvm_cpuid_entry2]) -> Option<Self> {
        let (names, features) = (leaf(host, 0, 0)?, leaf(host, 1, 0)?);
        let words = [names.ebx, names.edx, names.ecx].map(u32::to_le_bytes);
        let mut vendor = [0; 12];
        vendor.copy_from_slice(words.as_flattened());
        Some(Self {
            vendor,
            version: features.eax & VERSION,
        })
    }
}

impl std::fmt::Display for Processor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let vendor = String::from_utf8_lossy(&self.vendor);
        write!(f, "{} {:#x}", vendor.escape_debug(), self.version)
    }
}

impl GuestCpu {
    /// What it changes of the CPU of a host with these leaves.
    ///
    /// # Errors
    /// `CpuTemplate` where it is not for that CPU.
    pub(super) fn template(&self, host: &[kvm_cpuid_entry2]) -> Result<CpuConfig, VmError> {
        match self {
            Self::Host => Ok(CpuConfig::default()),
            Self::Custom(template) => Ok(template.clone()),
            Self::Static(template) => {
                let (processors, ..) = parts(*template);
                let present = Processor::of(host);
                let is_possible = present.is_some_and(|present| processors.contains(&present));
                if is_possible || *template == CpuTemplate::None {
                    return Ok(static_template(*template));
                }
                let names: Vec<_> = processors.iter().map(ToString::to_string).collect();
                Err(VmError::CpuTemplate {
                    template: *template,
                    wanted: names.join(", "),
                    present: present.map_or_else(|| "unknown".to_owned(), |it| it.to_string()),
                })
            }
        }
    }

    /// The same for a guest that has run, perhaps on another host: whether it can go on is seen from its state.
    pub(super) fn saved_template(&self, host: &[kvm_cpuid_entry2]) -> CpuConfig {
        let mut template = match self {
            Self::Host => CpuConfig::default(),
            Self::Static(template) => static_template(*template),
            Self::Custom(template) => template.clone(),
        };
        let has_leaf =
            |modifier: &CpuidModifier| leaf(host, modifier.leaf.0, modifier.subleaf.0).is_some();
        template.cpuid_modifiers.retain(has_leaf);
        template
    }
}

/// Makes the changes of leaves.
///
/// # Errors
/// `CpuidLeaf` where the host has none of a leaf.
pub(super) fn apply(
    entries: &mut [kvm_cpuid_entry2],
    modifiers: &[CpuidModifier],
) -> Result<(), VmError> {
    for modifier in modifiers {
        let at = (modifier.leaf.0, modifier.subleaf.0);
        let found = entries.iter_mut().find(|e| (e.function, e.index) == at);
        let entry = found.ok_or(VmError::CpuidLeaf {
            leaf: at.0,
            subleaf: at.1,
        })?;
        entry.flags = modifier.flags;
        for RegisterModifier { register, bitmap } in &modifier.modifiers {
            let register = match register {
                Eax => &mut entry.eax,
                Ebx => &mut entry.ebx,
                Ecx => &mut entry.ecx,
                Edx => &mut entry.edx,
            };
            *register = bitmap.apply(*register);
        }
    }
    Ok(())
}

/// Checks that KVM, which says of a number whether it has that capability, has all of `required` and those that a
/// template adds, without those that it takes away.
///
/// # Errors
/// `Capability`, `CapabilityNumber`.
pub(super) fn check_capabilities(
    template: &CpuConfig,
    required: impl IntoIterator<Item = (u32, &'static str)>,
    has: impl Fn(u32) -> bool,
) -> Result<(), VmError> {
    for (number, name) in required {
        let is_needed = !template
            .kvm_capabilities
            .contains(&KvmCapability::NotNeeded(number));
        if is_needed && !has(number) {
            return Err(VmError::Capability(name));
        }
    }
    for capability in &template.kvm_capabilities {
        if let KvmCapability::Needed(number) = capability
            && !has(*number)
        {
            return Err(VmError::CapabilityNumber(*number));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEMPLATES: [CpuTemplate; 5] = [
        CpuTemplate::C3,
        CpuTemplate::T2,
        CpuTemplate::T2S,
        CpuTemplate::T2CL,
        CpuTemplate::T2A,
    ];

    fn host(processor: Processor) -> Vec<kvm_cpuid_entry2> {
        let word = |at: usize| u32::from_le_bytes(processor.vendor[at..at + 4].try_into().unwrap());
        let leaf = |function, index| kvm_cpuid_entry2 {
            function,
            index,
            eax: u32::MAX,
            ebx: u32::MAX,
            ecx: u32::MAX,
            edx: u32::MAX,
            ..Default::default()
        };
        let mut entries = vec![
            kvm_cpuid_entry2 {
                ebx: word(0),
                edx: word(4),
                ecx: word(8),
                ..Default::default()
            },
            kvm_cpuid_entry2 {
                // Reserved bits are not compared.
                eax: processor.version | 0xf000_c000,
                ..leaf(1, 0)
            },
        ];
        let leaves = [
            (7, 0),
            (0xd, 0),
            (0xd, 1),
            (0x8000_0001, 0),
            (0x8000_0008, 0),
        ];
        entries.extend(leaves.map(|(function, index)| leaf(function, index)));
        entries
    }

    #[test]
    fn a_static_template_is_for_certain_processors() {
        let possible = |processor: Processor| {
            TEMPLATES.map(|template| {
                GuestCpu::Static(template)
                    .template(&host(processor))
                    .is_ok()
            })
        };
        assert_eq!(possible(SKYLAKE), [true, true, true, false, false]);
        assert_eq!(possible(CASCADE_LAKE), [true, true, true, true, false]);
        assert_eq!(possible(ICE_LAKE), [true, true, false, true, false]);
        assert_eq!(possible(MILAN), [false, false, false, false, true]);
        let sapphire_rapids = intel(0x000c_06f2);
        assert_eq!(possible(sapphire_rapids), [false; 5]);
        let as_amd = Processor {
            vendor: AMD,
            ..SKYLAKE
        };
        assert_eq!(possible(as_amd), [false; 5]);
        let error = GuestCpu::Static(CpuTemplate::T2A).template(&host(ICE_LAKE));
        let error = error.unwrap_err().to_string();
        for part in [
            "machine-config.cpu_template",
            "T2A",
            "AuthenticAMD 0xa00f11",
            "GenuineIntel 0x606a6",
        ] {
            assert!(error.contains(part), "{error}");
        }
        assert!(GuestCpu::Static(CpuTemplate::T2).template(&[]).is_err());
        let none = GuestCpu::Static(CpuTemplate::None).template(&[]).unwrap();
        assert_eq!(none, CpuConfig::default());
    }

    #[test]
    fn a_template_gives_processors_the_features_that_they_have_in_common() {
        let applied = |template, processor| {
            let mut entries = host(processor);
            let template = GuestCpu::Static(template).template(&entries).unwrap();
            apply(&mut entries, &template.cpuid_modifiers).unwrap();
            entries
        };
        for (function, index) in [(1, 0), (7, 0), (0xd, 0), (0xd, 1)] {
            let [intel, amd] = [
                applied(CpuTemplate::T2CL, ICE_LAKE),
                applied(CpuTemplate::T2A, MILAN),
            ]
            .map(|entries| {
                let found = leaf(&entries, function, index).unwrap();
                [found.eax, found.ebx, found.ecx, found.edx]
            });
            assert_eq!(intel[1..], amd[1..], "{function:#x}");
        }
        let t2 = applied(CpuTemplate::T2, SKYLAKE);
        let features = leaf(&t2, 1, 0).unwrap();
        assert_eq!(features.eax & VERSION, 0x306f2);
        assert_eq!(leaf(&t2, 7, 0).unwrap().flags, 1);
        assert_eq!(leaf(&t2, 1, 0).unwrap().flags, 0);
        // AVX-512 is neither a feature nor a state.
        assert_eq!(leaf(&t2, 7, 0).unwrap().ebx & (1 << 16), 0);
        assert_eq!(leaf(&t2, 0xd, 0).unwrap().eax & (7 << 5), 0);
    }

    #[test]
    fn a_leaf_that_the_host_lacks_is_an_error_at_boot_and_left_out_for_a_saved_guest() {
        let custom = CpuConfig {
            cpuid_modifiers: vec![modifier((0x9, 3, Eax, 1, 1)), modifier((0x7, 0, Eax, 3, 2))],
            ..CpuConfig::default()
        };
        let cpu = GuestCpu::Custom(custom);
        let mut entries = host(MILAN);
        let template = cpu.template(&entries).unwrap();
        let refused = apply(&mut entries, &template.cpuid_modifiers).unwrap_err();
        assert!(matches!(
            refused,
            VmError::CpuidLeaf {
                leaf: 9,
                subleaf: 3
            }
        ));
        let mut entries = host(MILAN);
        let template = cpu.saved_template(&entries);
        apply(&mut entries, &template.cpuid_modifiers).unwrap();
        assert_eq!(leaf(&entries, 7, 0).unwrap().eax, u32::MAX - 1);
    }

    #[test]
    fn capabilities_are_added_to_those_that_are_needed_and_taken_away() {
        let check = |changes: &[KvmCapability], present: &[u32]| {
            let template = CpuConfig {
                kvm_capabilities: changes.to_vec(),
                ..CpuConfig::default()
            };
            let required = [(1, "ONE"), (2, "TWO")];
            check_capabilities(&template, required, |number| present.contains(&number))
                .map_err(|error| error.to_string())
        };
        check(&[], &[1, 2]).unwrap();
        assert!(check(&[], &[1]).unwrap_err().contains("TWO"));
        check(&[KvmCapability::NotNeeded(2)], &[1]).unwrap();
        check(&[KvmCapability::Needed(3)], &[1, 2, 3]).unwrap();
        let error = check(&[KvmCapability::Needed(3)], &[1, 2]).unwrap_err();
        assert!(
            error.contains("kvm_capabilities") && error.contains('3'),
            "{error}"
        );
    }
}
