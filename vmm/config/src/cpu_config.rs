//! The CPU of a guest, bit by bit: Firecracker's custom CPU templates (`cpu-config`).

use std::fmt::{self, Write};
use std::path::PathBuf;

use serde::de::value::MapAccessDeserializer;
use serde::de::{Error, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// The body of `PUT /cpu-config`: what the guest's CPU has otherwise than the host's.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CpuConfig {
    /// Capabilities of KVM by number: `"N"` is needed as well, and `"!N"` is not needed, which otherwise is.
    #[serde(default)]
    #[schema(value_type = Vec<String>)]
    pub kvm_capabilities: Vec<KvmCapability>,
    /// Changes of CPUID, in the order in which they are made.
    #[serde(default)]
    pub cpuid_modifiers: Vec<CpuidModifier>,
    /// Changes of model-specific registers, in the order in which they are made.
    #[serde(default)]
    pub msr_modifiers: Vec<MsrModifier>,
}

/// A capability of KVM in a [`CpuConfig`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvmCapability {
    /// The host has to have it.
    Needed(u32),
    /// The host need not have it.
    NotNeeded(u32),
}

/// A change of one leaf of CPUID.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CpuidModifier {
    /// The leaf: a number behind `0x` or `0b`. KVM has to support it.
    #[schema(value_type = String)]
    pub leaf: Number,
    /// The subleaf: 0 of leaves that have none.
    #[schema(value_type = String)]
    pub subleaf: Number,
    /// KVM's flags of the leaf (`kvm_cpuid_entry2`): 1 where it has subleaves.
    pub flags: u32,
    /// The changes of its registers.
    pub modifiers: Vec<RegisterModifier>,
}

/// A change of one register of a leaf.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RegisterModifier {
    /// The register.
    pub register: CpuidRegister,
    /// The bits: from the highest on `0`, `1`, or `x` for one that stays; `_` may be anywhere.
    #[schema(value_type = String)]
    pub bitmap: Bitmap<32>,
}

/// The registers that CPUID answers in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum CpuidRegister {
    /// EAX.
    Eax,
    /// EBX.
    Ebx,
    /// ECX.
    Ecx,
    /// EDX.
    Edx,
}

/// A change of a model-specific register.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MsrModifier {
    /// The register: a number behind `0x` or `0b`. KVM has to let it be read and written.
    #[schema(value_type = String)]
    pub addr: Number,
    /// The bits: from the highest on `0`, `1`, or `x` for one that stays; `_` may be anywhere.
    #[schema(value_type = String)]
    pub bitmap: Bitmap<64>,
}

/// A number, which is written as a string behind `0x` or `0b`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Number(pub u32);

/// Bits of a register of `BITS` bits that are set and cleared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bitmap<const BITS: u32> {
    /// The bits that are changed.
    mask: u64,
    /// Their values; 0 elsewhere.
    value: u64,
}

impl<const BITS: u32> Bitmap<BITS> {
    /// Gives the bits of `mask` the values that they have in `value`.
    pub const fn new(mask: u64, value: u64) -> Self {
        let all = u64::MAX >> (64 - BITS);
        let mask = mask & all;
        Self {
            mask,
            value: value & mask,
        }
    }

    fn parse(text: &str) -> Option<Self> {
        let (mut mask, mut value) = (0u64, 0u64);
        let digits = text.strip_prefix("0b").unwrap_or(text);
        let mut count = 0;
        for digit in digits.bytes().filter(|digit| *digit != b'_') {
            count += 1;
            if count > BITS {
                return None;
            }
            let (changed, bit) = match digit {
                b'x' => (0, 0),
                b'0' => (1, 0),
                b'1' => (1, 1),
                _ => return None,
            };
            (mask, value) = ((mask << 1) | changed, (value << 1) | bit);
        }
        Some(Self { mask, value })
    }
}

impl Bitmap<32> {
    /// The register with the changes.
    pub const fn apply(self, register: u32) -> u32 {
        // Both halves have 32 bits at most.
        (register & !(self.mask as u32)) | self.value as u32
    }
}

impl Bitmap<64> {
    /// The register with the changes.
    pub const fn apply(self, register: u64) -> u64 {
        (register & !self.mask) | self.value
    }
}

impl<const BITS: u32> Serialize for Bitmap<BITS> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let digit = |bit: u32| match (self.mask >> bit & 1, self.value >> bit & 1) {
            (0, _) => 'x',
            (_, 0) => '0',
            _ => '1',
        };
        let digits: String = (0..BITS).rev().map(digit).collect();
        serializer.serialize_str(&format!("0b{digits}"))
    }
}

impl<'de, const BITS: u32> Deserialize<'de> for Bitmap<BITS> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        Self::parse(&text).ok_or_else(|| {
            D::Error::custom(format!(
                "bitmap: {text:.80?} is not 0b and up to {BITS} bits, each 0, 1 or x"
            ))
        })
    }
}

impl Serialize for Number {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&format!("{:#x}", self.0))
    }
}

impl<'de> Deserialize<'de> for Number {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let digits = |digits: &str, radix| {
            // A sign is no digit, though `from_str_radix` takes one.
            let is_digit = digits.chars().all(|digit| digit.is_digit(radix));
            is_digit
                .then(|| u32::from_str_radix(digits, radix).ok())
                .flatten()
        };
        let number = match (text.strip_prefix("0x"), text.strip_prefix("0b")) {
            (Some(hex), _) => digits(hex, 16),
            (None, Some(binary)) => digits(binary, 2),
            (None, None) => None,
        };
        number.map(Self).ok_or_else(|| {
            D::Error::custom(format!(
                "leaf, subleaf or addr: {text:.80?} is not a number of 32 bits behind 0x or 0b"
            ))
        })
    }
}

impl Serialize for KvmCapability {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut text = String::new();
        let written = match self {
            Self::Needed(number) => write!(text, "{number}"),
            Self::NotNeeded(number) => write!(text, "!{number}"),
        };
        written.map_err(serde::ser::Error::custom)?;
        serializer.serialize_str(&text)
    }
}

impl<'de> Deserialize<'de> for KvmCapability {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let number = text.strip_prefix('!').unwrap_or(&text);
        let parsed = number.parse().ok().filter(|_| !number.starts_with('+'));
        let Some(parsed) = parsed else {
            return Err(D::Error::custom(format!(
                "kvm_capabilities: {text:.80?} is not the number of a capability, with ! before one that is not needed"
            )));
        };
        Ok(if text.starts_with('!') {
            Self::NotNeeded(parsed)
        } else {
            Self::Needed(parsed)
        })
    }
}

/// `cpu-config` of a configuration file: the template, or the name of a file that has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum CpuConfigSource {
    /// The file. [`VmConfig::from_file`](crate::VmConfig::from_file) reads it, and puts the template in its place.
    File(PathBuf),
    /// The template.
    Given(CpuConfig),
}

impl<'de> Deserialize<'de> for CpuConfigSource {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Either;

        impl<'de> Visitor<'de> for Either {
            type Value = CpuConfigSource;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a CPU template, or the name of a file that has one")
            }

            fn visit_str<E: Error>(self, path: &str) -> Result<Self::Value, E> {
                Ok(CpuConfigSource::File(path.into()))
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Self::Value, A::Error> {
                let template = CpuConfig::deserialize(MapAccessDeserializer::new(map))?;
                Ok(CpuConfigSource::Given(template))
            }
        }

        deserializer.deserialize_any(Either)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn parse(value: Value) -> Result<CpuConfig, String> {
        serde_json::from_value(value).map_err(|error| error.to_string())
    }

    fn cpuid(leaf: &Value, modifiers: &Value) -> Value {
        json!({"cpuid_modifiers": [
            {"leaf": leaf, "subleaf": "0x0", "flags": 0, "modifiers": modifiers}
        ]})
    }

    #[test]
    fn a_template_has_firecrackers_form_and_comes_back_as_it_was() {
        let template = json!({
            "kvm_capabilities": ["56", "!72"],
            "cpuid_modifiers": [{
                "leaf": "0x80000001", "subleaf": "0b0111", "flags": 1,
                "modifiers": [{"register": "ebx", "bitmap": "0b1xx_0"}],
            }],
            "msr_modifiers": [{"addr": "0x10a", "bitmap": "1x0"}],
        });
        let parsed = parse(template).unwrap();
        let capabilities = [KvmCapability::Needed(56), KvmCapability::NotNeeded(72)];
        assert_eq!(parsed.kvm_capabilities, capabilities);
        let [leaf] = &parsed.cpuid_modifiers[..] else {
            panic!("{parsed:?}");
        };
        assert_eq!((leaf.leaf, leaf.subleaf), (Number(0x8000_0001), Number(7)));
        let [ebx] = &leaf.modifiers[..] else {
            panic!("{leaf:?}");
        };
        assert_eq!(ebx.register, CpuidRegister::Ebx);
        assert_eq!(ebx.bitmap.apply(0b0111), 0b1110);
        assert_eq!(ebx.bitmap.apply(u32::MAX), u32::MAX - 1);
        let [msr] = &parsed.msr_modifiers[..] else {
            panic!("{parsed:?}");
        };
        assert_eq!(msr.addr, Number(0x10a));
        assert_eq!(msr.bitmap.apply(0b011), 0b110);
        let again = serde_json::to_value(&parsed).unwrap();
        let bitmap = &again["cpuid_modifiers"][0]["modifiers"][0]["bitmap"];
        assert_eq!(bitmap, &format!("0b{}1xx0", "x".repeat(28)));
        assert_eq!(parse(again).unwrap(), parsed);
        assert_eq!(parse(json!({})).unwrap(), CpuConfig::default());
    }

    #[test]
    fn a_bitmap_is_as_wide_as_its_register() {
        for bits in [32, 33, 64, 65] {
            let text = format!("0b{}", "1".repeat(bits));
            let register = json!([{"register": "eax", "bitmap": text}]);
            assert_eq!(
                parse(cpuid(&json!("0x1"), &register)).is_ok(),
                bits <= 32,
                "{bits}"
            );
            let msr = parse(json!({"msr_modifiers": [{"addr": "0x1", "bitmap": text}]}));
            assert_eq!(msr.is_ok(), bits <= 64, "{bits}");
        }
        assert_eq!(Bitmap::<32>::new(u64::MAX, u64::MAX).apply(0), u32::MAX);
        assert_eq!(Bitmap::<64>::new(0b110, u64::MAX).apply(0b001), 0b111);
    }

    #[test]
    fn what_is_wrong_with_a_template_is_named() {
        let bitmap = |text: &str| json!([{"register": "eax", "bitmap": text}]);
        let cases = [
            (cpuid(&json!("1"), &json!([])), "leaf"),
            (cpuid(&json!("0x"), &json!([])), "leaf"),
            (cpuid(&json!("0x+1"), &json!([])), "leaf"),
            (cpuid(&json!("0x100000000"), &json!([])), "32 bits"),
            (cpuid(&json!(1), &json!([])), "string"),
            (cpuid(&json!("0x1"), &bitmap("0b2")), "bitmap"),
            (cpuid(&json!("0x1"), &bitmap("0bX")), "bitmap"),
            (
                cpuid(&json!("0x1"), &json!([{"register": "rax", "bitmap": "1"}])),
                "rax",
            ),
            (
                cpuid(&json!("0x1"), &json!([{"register": "eax"}])),
                "bitmap",
            ),
            (json!({"cpuid_modifiers": [{"leaf": "0x1"}]}), "subleaf"),
            (json!({"kvm_capabilities": ["x"]}), "kvm_capabilities"),
            (json!({"kvm_capabilities": ["!"]}), "kvm_capabilities"),
            (json!({"kvm_capabilities": ["+1"]}), "kvm_capabilities"),
            (
                json!({"kvm_capabilities": ["4294967296"]}),
                "kvm_capabilities",
            ),
            (
                json!({"msr_modifiers": [{"addr": "-0x1", "bitmap": "1"}]}),
                "addr",
            ),
            // Those of ARM.
            (json!({"reg_modifiers": []}), "reg_modifiers"),
        ];
        for (template, named) in cases {
            let error = parse(template.clone()).expect_err(&template.to_string());
            assert!(error.contains(named), "{template}: {error}");
        }
    }
}
