//! Reference images: a guest's memory as it stands after its kernel has booted.
//!
//! A kernel patches its own text while it boots (alternatives, return thunks, static keys), so that most pages that are
//! mapped from its file soon are copies in every guest, and the same copies. The data that it sets up at boot is the
//! same in every guest, too, and much of it is at the same address: `struct page`s, tables, its variables. A reference
//! image holds the pages of a guest that the host has booted for this purpose alone, without a disk, and with a program
//! that powers off. The memory manager compares a guest's own pages with it, and maps what is equal.
//!
//! ```text
//! coppice run ── image there? ── yes ──> SharedMemory::add_reference
//!                    └── no ── Warmer: a process that makes it (once, in the background) ── image ──> add_reference
//! ```
//!
//! An image is good for one kernel, one model of CPU, one size of machine, and the words of the command line that
//! change a kernel's text. Nothing relies on that it fits, because pages are compared.

mod key;
mod warmer;

use config::VmConfig;
use config::limits::DEFAULT_CMDLINE;
use kvm::boot;
use kvm::vm;
use memshare::ShareMode;

pub use key::{Key, Size, text_words};
pub(crate) use warmer::Warming;
pub use warmer::{WarmRequest, WarmTerms, Warmer};

/// The request for the image that the guest of `config` is to be compared with. `None` where there is that image, and
/// where there can be none. The kernel is in the cache afterwards.
pub fn lacking(config: &VmConfig) -> Option<WarmRequest> {
    let source = config.boot_source.as_ref()?;
    if config.share_mode() != ShareMode::All {
        return None;
    }
    let domain = config.sharing.domain.clone();
    // Errors are reported when the kernel is loaded.
    let kernel = boot::runtime_kernel(&source.kernel_image_path, domain.as_deref()).ok()??;
    let size = Size::from(&config.machine_config);
    let cmdline = source.boot_args.as_deref().unwrap_or(DEFAULT_CMDLINE);
    let image = Key {
        kernel: &kernel,
        cpu: &vm::cpu_model(size.representative().vcpus).ok()?,
        size,
        cmdline,
    }
    .path();
    (!image.exists()).then(|| WarmRequest::new(kernel, cmdline, size, domain))
}
