//! Reference images: a kernel's memory as it stands after boot.
//!
//! A kernel patches its own text while it boots (alternatives, return thunks, static keys), so that most of what is mapped from its file is soon a
//! copy in every guest, and the same copy. A reference image holds those pages as they are in a guest that the host has booted for this
//! purpose alone, with nothing in it: no disk, and a program that powers off. The memory manager compares a guest's
//! kernel with it, and maps what is equal.
//!
//! ```text
//! coppice run ── image there? ── yes ──> SharedMemory::add_reference
//!                    └── no ── Warmer: coppice image warm (once, in the background) ── image ──> add_reference
//! ```
//!
//! An image is good for one kernel, one model of CPU, and the words of the command line that change a kernel's text. That it fits is never
//! relied on: pages are compared.

mod initrd;
mod warm;
mod warmer;

use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::boot::{self, DEFAULT_CMDLINE};
use crate::config::VmConfig;
use crate::vm;

pub use warm::{WarmError, WarmRequest, Warmed, warm};
pub(crate) use warmer::Warming;
pub use warmer::{Warmer, warm_when_told};

/// Words of a kernel command line that may change the kernel's text or read-only data, up to their `=`. Any other is of no account, however many
/// command lines there are; one that is missing here costs a guest some shared pages, and nothing else.
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
pub(crate) fn text_words(cmdline: &str) -> Vec<&str> {
    cmdline
        .split_ascii_whitespace()
        .take_while(|word| *word != "--")
        .filter(|word| {
            let name = word.split('=').next().unwrap_or_default();
            TEXT_WORDS.contains(&name)
        })
        .collect()
}

/// A kernel for one CPU is patched as such; any number more makes no difference.
pub(crate) fn representative_cpus(vcpus: u8) -> u8 {
    vcpus.min(2)
}

/// What an image depends on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Key<'a> {
    /// The kernel, unpacked, in the cache.
    pub kernel: &'a Path,
    /// What distinguishes the CPU, see [`crate::vm::cpu_model`].
    pub cpu: &'a [u8],
    /// vCPUs of the guest.
    pub vcpus: u8,
    /// Its command line.
    pub cmdline: &'a str,
}

impl Key<'_> {
    /// Where the image is, or would be: beside the kernel.
    pub fn path(&self) -> PathBuf {
        let mut digest = Sha256::new();
        digest.update(self.cpu);
        digest.update([representative_cpus(self.vcpus)]);
        for word in text_words(self.cmdline) {
            digest.update(word);
            digest.update([0]);
        }
        let digest = digest.finalize();
        let name = u64::from_be_bytes(*digest.first_chunk().unwrap_or(&[0; 8]));
        self.kernel.with_extension(format!("{name:016x}.reference"))
    }
}

/// Whether there is an image for the guest of `config`, as far as can be told without building it.
pub fn is_there(config: &VmConfig) -> bool {
    let Some(source) = &config.boot_source else {
        return false;
    };
    let vcpus = config.machine_config.vcpu_count;
    let kernel = boot::runtime_kernel(&source.kernel_image_path, config.sharing.domain.as_deref());
    let (Ok(Some(kernel)), Ok(cpu)) = (kernel, vm::cpu_model(representative_cpus(vcpus))) else {
        return false;
    };
    let image = Key {
        kernel: &kernel,
        cpu: &cpu,
        vcpus,
        cmdline: source.boot_args.as_deref().unwrap_or(DEFAULT_CMDLINE),
    };
    image.path().exists()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(cpu: &[u8], vcpus: u8, cmdline: &str) -> PathBuf {
        let kernel = Path::new("/cache/v1-1.elf");
        Key {
            kernel,
            cpu,
            vcpus,
            cmdline,
        }
        .path()
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
