//! What to boot, and how.

use std::path::PathBuf;

use config::BootProtocol;

/// What to boot.
#[derive(Clone, Debug)]
pub struct BootSource {
    /// ELF `vmlinux`, `bzImage`, or a compressed `vmlinux`.
    pub kernel: PathBuf,
    /// Initial RAM file system.
    pub initrd: Option<PathBuf>,
    /// The kernel command line, complete.
    pub cmdline: String,
    /// How the kernel is entered.
    pub protocol: Protocol,
    /// The sharing domain whose cache is used, where the domain has a name.
    pub domain: Option<String>,
}

/// How a kernel is entered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Protocol {
    /// PVH where the kernel has it, else 64-bit; a bzImage that cannot be unpacked on the host unpacks itself.
    #[default]
    Auto,
    /// The PVH entry of an ELF kernel.
    Pvh,
    /// The 64-bit entry of an ELF kernel.
    Linux64,
    /// A bzImage, which the guest unpacks.
    BzImage,
}

impl From<BootProtocol> for Protocol {
    fn from(protocol: BootProtocol) -> Self {
        match protocol {
            BootProtocol::Auto => Self::Auto,
            BootProtocol::Pvh => Self::Pvh,
            BootProtocol::Linux64 => Self::Linux64,
            BootProtocol::BzImage => Self::BzImage,
        }
    }
}
