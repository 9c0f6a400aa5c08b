//! Finds out what a kernel file is, and how it is loaded and entered.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use linux_loader::loader::bootparam::setup_header;
use vm_memory::{Address, GuestAddress};

use super::compression::Compression;
use super::elf::LoadSegment;
use super::files::open_file;
use super::registers::EntryPoint;
use super::source::{BootSource, Protocol};
use super::unpack::{self, Form, Packed, Unpacked};
use super::{BootError, bzimage, elf};

/// The longest command line of a kernel that does not declare its limit: Linux' `COMMAND_LINE_SIZE` on x86 without the
/// terminating zero. Linux cuts a longer one without a warning.
const ELF_CMDLINE_MAX: usize = 2047;

/// Where the identity map of the 64-bit entry ends, see [`super::registers`].
const IDENTITY_MAP_END: u64 = 1 << 30;

/// A kernel that is found and checked, and not in guest memory yet.
pub(super) struct Kernel {
    pub(super) path: PathBuf,
    pub(super) file: File,
    /// Whether the file is in the cache, so that it is immutable.
    pub(super) is_cached: bool,
    pub(super) segments: Vec<LoadSegment>,
    pub(super) entry: EntryPoint,
    pub(super) header: Option<setup_header>,
    /// The address that the initrd has to end at or below, by the kernel's header.
    pub(super) initrd_max: u64,
    /// Longest command line in bytes.
    pub(super) cmdline_max: usize,
}

impl Kernel {
    /// An immutable file of `cache` with the kernel's content. `None` for a kernel that unpacks itself, because it
    /// overwrites its own image.
    pub(super) fn cached(&self, cache: &Path) -> Option<File> {
        if self.header.is_some() {
            None
        } else if self.is_cached {
            self.file.try_clone().ok()
        } else {
            let len = self.file.metadata().ok()?.len();
            unpack::cache_copy(&self.path, &self.file, len, cache)
        }
    }
}

/// Opens and checks the kernel of `source`. If it is unpacked on the host, the result is in `cache`.
pub(super) fn find_kernel(source: &BootSource, cache: &Path) -> Result<Kernel, BootError> {
    let path = &source.kernel;
    let (file, len) = open_file(path, "kernel")?;
    let mut start = [0; (bzimage::MAGIC_OFFSET + 4) as usize];
    let mut filled = 0;
    while filled < start.len() {
        let read = file
            .read_at(&mut start[filled..], filled as u64)
            .map_err(|source| BootError::File {
                path: path.clone(),
                role: "kernel",
                action: "read",
                source,
            })?;
        if read == 0 {
            break;
        }
        filled += read;
    }
    let start = &start[..filled];
    if start.starts_with(&elf::MAGIC) {
        let is_cached = unpack::is_cached(path, &file, cache);
        let kernel = elf_kernel(source.protocol, path, file, len)?;
        return Ok(Kernel {
            is_cached,
            ..kernel
        });
    }
    if start.ends_with(&bzimage::MAGIC) && filled as u64 == bzimage::MAGIC_OFFSET + 4 {
        return bzimage_kernel(source.protocol, path, file, len, cache);
    }
    if let Some(compression) = Compression::of(start) {
        let unpacked = unpack::unpack(
            Packed {
                path,
                file: &file,
                form: Form::Kernel(compression),
                offset: 0,
                len,
            },
            cache,
        )?;
        return unpacked_kernel(source.protocol, path, unpacked);
    }
    if let Some(compression) = Compression::unsupported(start) {
        return Err(BootError::Compression {
            path: path.clone(),
            compression,
        });
    }
    let start = start
        .iter()
        .take(8)
        .map(|byte| format!("{byte:02x}"))
        .collect::<Vec<_>>()
        .join(" ");
    let start = if start.is_empty() {
        "nothing: it is empty".to_owned()
    } else {
        start
    };
    Err(BootError::NotAKernel {
        path: path.clone(),
        start,
    })
}

fn unpacked_kernel(
    protocol: Protocol,
    path: &Path,
    unpacked: Unpacked,
) -> Result<Kernel, BootError> {
    let (file, is_cached) = match unpacked {
        Unpacked::Cached(file) => (file, true),
        Unpacked::Uncached(file) => (file, false),
    };
    let len = file
        .metadata()
        .map_err(|source| BootError::File {
            path: path.to_owned(),
            role: "kernel",
            action: "read",
            source,
        })?
        .len();
    let kernel = elf_kernel(protocol, path, file, len)?;
    Ok(Kernel {
        is_cached,
        ..kernel
    })
}

fn elf_kernel(protocol: Protocol, path: &Path, file: File, len: u64) -> Result<Kernel, BootError> {
    let no = |protocol| {
        Err(BootError::Protocol {
            path: path.to_owned(),
            protocol,
        })
    };
    let elf = elf::parse(&file, path, len)?;
    let linux64 = EntryPoint::Linux64 { rip: elf.entry };
    let entry = match (protocol, elf.pvh_entry) {
        (Protocol::Auto | Protocol::Pvh, Some(rip)) => EntryPoint::Pvh { rip },
        (Protocol::Auto, None) | (Protocol::Linux64, _) => linux64,
        (Protocol::Pvh, None) => return no("PVH: it has no PVH entry note"),
        (Protocol::BzImage, _) => return no("unpacking itself: it is no bzImage"),
    };
    Ok(Kernel {
        path: path.to_owned(),
        file,
        is_cached: false,
        segments: elf.segments,
        entry,
        header: None,
        initrd_max: u64::MAX,
        cmdline_max: ELF_CMDLINE_MAX,
    })
}

fn bzimage_kernel(
    protocol: Protocol,
    path: &Path,
    file: File,
    len: u64,
    cache: &Path,
) -> Result<Kernel, BootError> {
    let image = bzimage::parse(&file, path, len)?;
    if protocol != Protocol::BzImage {
        let (offset, len) = image.payload(path)?;
        let mut magic = [0; 8];
        let magic = match file.read_at(&mut magic, offset) {
            Ok(read) => &magic[..read],
            Err(source) => {
                return Err(BootError::File {
                    path: path.to_owned(),
                    role: "kernel",
                    action: "read",
                    source,
                });
            }
        };
        match Compression::of(magic) {
            Some(compression) => {
                let unpacked = unpack::unpack(
                    Packed {
                        path,
                        file: &file,
                        form: Form::Kernel(compression),
                        offset,
                        len,
                    },
                    cache,
                )?;
                return unpacked_kernel(protocol, path, unpacked);
            }
            None if protocol == Protocol::Auto => {
                tracing::info!(kernel = %path.display(), "compression not known to the host: the guest unpacks its kernel");
            }
            None => {
                return Err(BootError::Protocol {
                    path: path.to_owned(),
                    protocol: "its ELF: its compression is not known",
                });
            }
        }
    }
    let header = image.header;
    // The preferred address is where a kernel runs if nobody moves it. From there on, it needs `init_size` bytes to
    // unpack itself.
    let address = header.pref_address;
    let mem_len = u64::from(header.init_size).max(image.kernel_len);
    let entry = address
        .checked_add(bzimage::ENTRY_64)
        .filter(|_| address.checked_add(mem_len).is_some());
    let Some(rip) = entry else {
        let expected = format!("an address that a guest can have expected, found {address:#x}");
        return Err(BootError::BzImage {
            path: path.to_owned(),
            offset: 0x258,
            expected,
        });
    };
    let segment = LoadSegment {
        file_offset: image.kernel_offset,
        file_len: image.kernel_len,
        guest_address: GuestAddress(address),
        mem_len,
        is_writable: true,
    };
    Ok(Kernel {
        path: path.to_owned(),
        file,
        is_cached: false,
        segments: vec![segment],
        entry: EntryPoint::Linux64 {
            rip: GuestAddress(rip),
        },
        header: Some(header),
        initrd_max: u64::from(header.initrd_addr_max) + 1,
        cmdline_max: header.cmdline_size as usize,
    })
}

/// Refuses an entry point whose first instruction would fault.
pub(super) fn check_entry(kernel: &Kernel) -> Result<(), BootError> {
    let (rip, limit) = match kernel.entry {
        EntryPoint::Linux64 { rip } => (rip.raw_value(), IDENTITY_MAP_END),
        EntryPoint::Pvh { rip } => (rip.raw_value(), u64::MAX),
    };
    let in_segment = |segment: &LoadSegment| {
        let start = segment.guest_address.raw_value();
        (start..start + segment.file_len).contains(&rip)
    };
    if rip < limit && kernel.segments.iter().any(in_segment) {
        return Ok(());
    }
    Err(BootError::Entry {
        path: kernel.path.clone(),
        address: rip,
        limit,
    })
}
