//! What an image depends on, and its name.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use config::MachineConfig;

/// Words of a kernel command line that may change the kernel's text or read-only data, up to their `=`. Images do not
/// depend on any other word, so that guests with different command lines share one. A word that is missing here costs a
/// guest some shared pages, and nothing else.
const TEXT_WORDS: [&str; 47] = [
    "apparmor",
    "audit",
    "cgroup_disable",
    "clearcpuid",
    "clocksource",
    "gather_data_sampling",
    "hardened_usercopy",
    "ibt",
    "init_on_alloc",
    "init_on_free",
    "isolcpus",
    "kasan",
    "kfence.sample_interval",
    "l1tf",
    "lsm",
    "maxcpus",
    "mds",
    "mitigations",
    "mmio_stale_data",
    "no-kvmapf",
    "no-kvmclock",
    "no-steal-acc",
    "no5lvl",
    "nohz",
    "nohz_full",
    "nokaslr",
    "nopti",
    "nopv",
    "noreplace-smp",
    "nosmap",
    "nosmep",
    "nosmp",
    "nospectre_v1",
    "nospectre_v2",
    "noxsave",
    "nr_cpus",
    "page_poison",
    "preempt",
    "psi",
    "pti",
    "randomize_kstack_offset",
    "retbleed",
    "security",
    "selinux",
    "slub_debug",
    "spec_store_bypass_disable",
    "spectre_v2",
];

/// The words of a command line that an image depends on, in their order.
pub fn text_words(cmdline: &str) -> Vec<&str> {
    cmdline
        .split_ascii_whitespace()
        .take_while(|word| *word != "--")
        .filter(|word| {
            let name = word.split('=').next().unwrap_or_default();
            TEXT_WORDS.contains(&name)
        })
        .collect()
}

/// RAM in MiB up to which there is an image for each size. Larger guests are compared with that of [`SMALL_MIB`], which
/// has the pages that do not depend on the size.
const LARGEST_MIB: u32 = 1024;
/// RAM in MiB in which any kernel boots.
const SMALL_MIB: u32 = 128;

/// The size of a guest's machine, on which depends what its kernel writes to memory at boot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Size {
    /// vCPUs.
    pub vcpus: u8,
    /// RAM in MiB.
    pub mem_mib: u32,
}

impl Size {
    /// The machine whose image is good for this one. A kernel that finds one CPU is patched for that; it makes no
    /// difference how many more than one it finds.
    #[must_use]
    pub fn representative(self) -> Self {
        let mem_mib = if self.mem_mib <= LARGEST_MIB {
            self.mem_mib
        } else {
            SMALL_MIB
        };
        Self {
            vcpus: self.vcpus.min(2),
            mem_mib,
        }
    }
}

impl From<&MachineConfig> for Size {
    fn from(machine: &MachineConfig) -> Self {
        Self {
            vcpus: machine.vcpu_count,
            mem_mib: machine.mem_size_mib,
        }
    }
}

/// Everything that an image depends on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Key<'a> {
    /// The kernel, unpacked, in the cache.
    pub kernel: &'a Path,
    /// What distinguishes the CPU, see [`kvm::vm::cpu_model`].
    pub cpu: &'a [u8],
    /// The guest's machine.
    pub size: Size,
    /// Its command line.
    pub cmdline: &'a str,
}

impl Key<'_> {
    /// The path of the image, which is beside the kernel, whether it exists or not.
    pub fn path(&self) -> PathBuf {
        let mut digest = Sha256::new();
        digest.update(self.cpu);
        let Size { vcpus, mem_mib } = self.size.representative();
        digest.update([vcpus]);
        digest.update(mem_mib.to_le_bytes());
        for word in text_words(self.cmdline) {
            digest.update(word);
            digest.update([0]);
        }
        let digest = digest.finalize();
        let name = u64::from_be_bytes(*digest.first_chunk().unwrap_or(&[0; 8]));
        self.kernel.with_extension(format!("{name:016x}.reference"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(cpu: &[u8], vcpus: u8, cmdline: &str) -> PathBuf {
        let kernel = Path::new("/cache/v1-1.elf");
        Key {
            kernel,
            cpu,
            size: Size {
                vcpus,
                mem_mib: 128,
            },
            cmdline,
        }
        .path()
    }

    #[test]
    fn each_size_of_small_guests_has_an_image_and_all_large_ones_one() {
        let of = |vcpus, mem_mib| Size { vcpus, mem_mib }.representative();
        assert_eq!(
            of(1, 100),
            Size {
                vcpus: 1,
                mem_mib: 100
            }
        );
        assert_eq!(
            of(32, 1024),
            Size {
                vcpus: 2,
                mem_mib: 1024
            }
        );
        assert_eq!(of(2, 1025), of(3, 100_000));
        assert_ne!(of(1, 2048), of(2, 2048));
    }

    #[test]
    fn an_image_is_for_a_kernel_a_cpu_and_what_changes_its_text() {
        let plain = path(b"epyc", 1, "console=ttyS0 root=/dev/vda");
        assert_eq!(plain, path(b"epyc", 1, "root=/dev/vdb quiet x.y=z"));
        assert_eq!(plain, path(b"epyc", 1, "-- mitigations=off"));
        assert!(
            plain.starts_with("/cache") && plain.extension().is_some_and(|end| end == "reference")
        );
        assert_ne!(plain, path(b"xeon", 1, ""));
        assert_ne!(plain, path(b"epyc", 2, ""));
        assert_ne!(plain, path(b"epyc", 1, "mitigations=off"));
        assert_eq!(path(b"epyc", 2, ""), path(b"epyc", 32, ""));
    }
}
