//! Why a guest cannot be booted.

use std::path::PathBuf;

use vm_memory::GuestMemoryError;

use crate::layout::HIGH_RAM_START;

/// Why a guest cannot be booted. Each variant names the file or the structure at fault, and what was expected of it.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// A file cannot be opened or read.
    #[error("{}: cannot {action} the {role}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Kernel or initrd.
        role: &'static str,
        /// Open or read.
        action: &'static str,
        /// The host's error.
        source: std::io::Error,
    },
    /// The path names no regular file.
    #[error("{}: the {role} is not a regular file", path.display())]
    NotAFile {
        /// The path.
        path: PathBuf,
        /// Kernel or initrd.
        role: &'static str,
    },
    /// The file is no kernel of a form that boots.
    #[error("{}: not a kernel: expected an ELF vmlinux or a bzImage, found a file that starts with {start}", path.display())]
    NotAKernel {
        /// The file.
        path: PathBuf,
        /// Its first bytes, in hex.
        start: String,
    },
    /// An ELF that x86-64 guests cannot run.
    #[error("{}: ELF header at offset {offset:#x}: {expected}", path.display())]
    Elf {
        /// The file.
        path: PathBuf,
        /// Where the field at fault lies, in bytes.
        offset: u64,
        /// What was expected and what was found.
        expected: String,
    },
    /// A bzImage whose setup header is not one.
    #[error("{}: bzImage setup header at offset {offset:#x}: {expected}", path.display())]
    BzImage {
        /// The file.
        path: PathBuf,
        /// Where the field at fault lies, in bytes.
        offset: u64,
        /// What was expected and what was found.
        expected: String,
    },
    /// The kernel is compressed in a way that cannot be unpacked here.
    #[error("{}: the kernel is compressed by {compression}; gzip, xz, lz4 and zstd are understood", path.display())]
    Compression {
        /// The file.
        path: PathBuf,
        /// How it is compressed.
        compression: &'static str,
    },
    /// A compressed kernel that cannot be unpacked.
    #[error("{}: cannot unpack the {compression} kernel", path.display())]
    Unpack {
        /// The file.
        path: PathBuf,
        /// How it is compressed.
        compression: &'static str,
        /// What is wrong.
        source: std::io::Error,
    },
    /// A boot protocol was asked for that the kernel does not offer.
    #[error("{}: the kernel cannot be booted by {protocol}", path.display())]
    Protocol {
        /// The file.
        path: PathBuf,
        /// What was asked for.
        protocol: &'static str,
    },
    /// Execution would start where nothing is loaded or mapped.
    #[error("{}: the kernel's entry point {address:#x} is not in a loaded segment below {limit:#x}", path.display())]
    Entry {
        /// The file.
        path: PathBuf,
        /// The entry point, guest physical.
        address: u64,
        /// First address that the boot protocol does not reach.
        limit: u64,
    },
    /// A part of the kernel does not fit into guest memory.
    #[error(
        "{}: the kernel needs guest memory at {start:#x}..{end:#x}; RAM for it is {HIGH_RAM_START:#x}..{ram_end:#x}: {}",
        path.display(),
        if *start < HIGH_RAM_START { "it is no kernel that boots here" } else { "give the guest more memory" }
    )]
    KernelOutsideMemory {
        /// The file.
        path: PathBuf,
        /// First guest address.
        start: u64,
        /// Guest address past the last.
        end: u64,
        /// End of RAM below the hole.
        ram_end: u64,
    },
    /// The initrd does not fit between the kernel and the end of RAM.
    #[error("{}: the initrd of {size} bytes does not fit into the {room} bytes of guest memory behind the kernel", path.display())]
    InitrdTooLarge {
        /// The file.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
        /// The bytes that there are.
        room: u64,
    },
    /// The command line is longer than the kernel takes.
    #[error(
        "the kernel command line of {len} bytes is longer than the {max} bytes this kernel takes"
    )]
    CmdlineTooLong {
        /// Its length in bytes.
        len: usize,
        /// The longest that it takes, in bytes.
        max: usize,
    },
    /// The command line holds a zero byte.
    #[error("the kernel command line has a zero byte at {0}")]
    CmdlineZeroByte(usize),
    /// Too many devices for the ACPI area.
    #[error("the ACPI tables of all devices do not fit into {room} bytes; use fewer devices")]
    AcpiTooLarge {
        /// The bytes that there are.
        room: u64,
    },
    /// Guest memory does not hold a boot structure.
    #[error("cannot write the {structure} to guest memory")]
    Memory {
        /// The structure.
        structure: &'static str,
        /// What is wrong.
        source: GuestMemoryError,
    },
}

impl BootError {
    pub(super) fn memory(structure: &'static str) -> impl FnOnce(GuestMemoryError) -> Self {
        move |source| Self::Memory { structure, source }
    }
}
