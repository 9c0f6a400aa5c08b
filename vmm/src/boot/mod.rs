//! From a kernel file to a guest that can run: loads kernel, initrd and command line into guest memory, writes the
//! boot parameters and ACPI tables, and says with which registers the first vCPU starts.
//!
//! ```text
//!  bzImage ─┬─ payload ── unpack (cache) ─┐
//!           └─ as it is ───────┐          ├─ ELF ─┬─ PVH entry
//!  vmlinux[.gz|.xz|.lz4|.zst] ─│──────────┘       └─ 64-bit entry
//!                              └───────────────────── 64-bit entry, the guest unpacks
//! ```

use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use devices::GuestMemory;
use linux_loader::loader::bootparam::setup_header;
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::layout::{CMDLINE_MAX, HIGH_RAM_START};

mod acpi;
mod bzimage;
mod elf;
mod error;
mod params;
mod registers;
mod unpack;

pub use elf::LoadSegment;
pub use error::BootError;
pub use registers::BootState;

use params::{Initrd, Told};
use unpack::{Compression, Packed};

/// The command line where a user gives none: a console, and an end for a guest that panics.
pub const DEFAULT_CMDLINE: &str = "console=ttyS0 reboot=k panic=-1";

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
    /// A bzImage as it is: the guest unpacks it.
    BzImage,
}

/// A virtio-mmio device, as the kernel is told of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MmioDevice {
    /// First guest physical address of its registers.
    pub base: u32,
    /// Bytes of its registers.
    pub size: u32,
    /// Its interrupt.
    pub gsi: u32,
}

impl MmioDevice {
    /// The device for the command line of a kernel without ACPI (Linux, `virtio_mmio.device=`).
    pub fn cmdline(&self) -> String {
        format!(
            "virtio_mmio.device={:#x}@{:#x}:{}",
            self.size, self.base, self.gsi
        )
    }
}

/// How the first vCPU enters the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EntryPoint {
    /// 64-bit Linux boot protocol (Linux, Documentation/arch/x86/boot.rst): long mode, `rsi` = zero page.
    Linux64 {
        /// First instruction, guest physical.
        rip: GuestAddress,
    },
    /// PVH (Xen, docs/misc/pvh.pandoc): 32-bit protected mode, no paging, `ebx` = start info.
    Pvh {
        /// First instruction, guest physical.
        rip: GuestAddress,
    },
}

/// A kernel, found and checked, not yet in guest memory.
struct Kernel {
    path: PathBuf,
    file: File,
    segments: Vec<LoadSegment>,
    entry: EntryPoint,
    header: Option<setup_header>,
    /// Highest address an initrd may reach, where the kernel says so.
    initrd_max: u64,
    /// Longest command line in bytes.
    cmdline_max: usize,
}

/// Loads everything a guest with `vcpus` CPUs and the devices `virtio` boots from into `memory`.
///
/// # Errors
/// [`BootError`], naming the file and what of it is wrong. Guest memory is then in no defined state.
pub fn load(
    memory: &GuestMemory,
    source: &BootSource,
    vcpus: u8,
    virtio: &[MmioDevice],
) -> Result<BootState, BootError> {
    let kernel = find_kernel(source, Some(&unpack::cache_dir()))?;
    let ram_end = low_ram_end(memory);
    let kernel_end = load_kernel(memory, &kernel, ram_end)?;
    let initrd = match &source.initrd {
        Some(path) => Some(load_initrd(
            memory,
            path,
            kernel_end,
            ram_end.min(kernel.initrd_max),
        )?),
        None => None,
    };
    params::write_cmdline(memory, &source.cmdline, kernel.cmdline_max)?;
    let rsdp = acpi::build(memory, vcpus, virtio)?;
    let told = Told { initrd, rsdp };
    match kernel.entry {
        EntryPoint::Linux64 { .. } => {
            params::write_zero_page(memory, kernel.header, source.cmdline.len(), &told)?;
        }
        EntryPoint::Pvh { .. } => params::write_pvh_start_info(memory, &told)?,
    }
    let state = BootState {
        entry: kernel.entry,
    };
    state.write_tables(memory)?;
    Ok(state)
}

/// Opens a regular file for reading, without waiting for whatever else the path may name.
fn open_file(path: &Path, role: &'static str) -> Result<(File, u64), BootError> {
    let error = |action| {
        move |source| BootError::File {
            path: path.to_owned(),
            role,
            action,
            source,
        }
    };
    let file = File::options()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
        .map_err(error("open"))?;
    let metadata = file.metadata().map_err(error("read"))?;
    if !metadata.is_file() {
        return Err(BootError::NotAFile {
            path: path.to_owned(),
            role,
        });
    }
    Ok((file, metadata.len()))
}

fn find_kernel(source: &BootSource, cache: Option<&Path>) -> Result<Kernel, BootError> {
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
        return elf_kernel(source.protocol, path, file, len);
    }
    if start.ends_with(&bzimage::MAGIC) && filled as u64 == bzimage::MAGIC_OFFSET + 4 {
        return bzimage_kernel(source.protocol, path, file, len, cache);
    }
    if let Some(compression) = Compression::of(start) {
        let unpacked = unpack::unpack(
            Packed {
                path,
                file: &file,
                compression,
                offset: 0,
                len,
            },
            cache,
        )?;
        return unpacked_kernel(source.protocol, path, unpacked);
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

fn unpacked_kernel(protocol: Protocol, path: &Path, file: File) -> Result<Kernel, BootError> {
    let len = file
        .metadata()
        .map_err(|source| BootError::File {
            path: path.to_owned(),
            role: "kernel",
            action: "read",
            source,
        })?
        .len();
    elf_kernel(protocol, path, file, len)
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
        segments: elf.segments,
        entry,
        header: None,
        initrd_max: u64::MAX,
        cmdline_max: CMDLINE_MAX as usize - 1,
    })
}

fn bzimage_kernel(
    protocol: Protocol,
    path: &Path,
    file: File,
    len: u64,
    cache: Option<&Path>,
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
                        compression,
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
    // The preferred address is where a kernel runs that is not moved; it needs `init_size` bytes from there to unpack itself.
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
    };
    Ok(Kernel {
        path: path.to_owned(),
        file,
        segments: vec![segment],
        entry: EntryPoint::Linux64 {
            rip: GuestAddress(rip),
        },
        header: Some(header),
        initrd_max: u64::from(header.initrd_addr_max) + 1,
        cmdline_max: header.cmdline_size as usize,
    })
}

/// End of RAM below the hole.
fn low_ram_end(memory: &GuestMemory) -> u64 {
    memory
        .iter()
        .next()
        .map_or(0, |region| region.start_addr().raw_value() + region.len())
}

/// Puts the kernel's segments into guest memory; returns the first address past them.
fn load_kernel(memory: &GuestMemory, kernel: &Kernel, ram_end: u64) -> Result<u64, BootError> {
    let mut kernel_end = 0;
    for segment in &kernel.segments {
        let start = segment.guest_address.raw_value();
        // Segments were checked when parsed: they do not pass the end of the address space.
        let end = start + segment.mem_len;
        if start < HIGH_RAM_START || end > ram_end {
            return Err(BootError::KernelOutsideMemory {
                path: kernel.path.clone(),
                start,
                end,
                ram_end,
            });
        }
        // RAM is zero before the guest runs, so that what lies past `file_len` need not be written.
        copy(memory, &kernel.path, "kernel", &kernel.file, segment)?;
        kernel_end = kernel_end.max(end);
    }
    Ok(kernel_end)
}

/// Reads a range of a file into guest memory.
fn copy(
    memory: &GuestMemory,
    path: &Path,
    role: &'static str,
    mut file: &File,
    segment: &LoadSegment,
) -> Result<(), BootError> {
    let error = |source| BootError::File {
        path: path.to_owned(),
        role,
        action: "read",
        source,
    };
    file.seek(SeekFrom::Start(segment.file_offset))
        .map_err(error)?;
    memory
        .read_exact_volatile_from(segment.guest_address, &mut file, segment.file_len as usize)
        .map_err(|failed| error(std::io::Error::other(failed.to_string())))
}

/// Puts the initrd as high as it goes, where no kernel needs the room.
fn load_initrd(
    memory: &GuestMemory,
    path: &Path,
    start: u64,
    end: u64,
) -> Result<Initrd, BootError> {
    const PAGE: u64 = 4096;
    let (file, len) = open_file(path, "initrd")?;
    let start = start.next_multiple_of(PAGE);
    let address = end
        .checked_sub(len)
        .map(|address| address / PAGE * PAGE)
        .filter(|address| *address >= start)
        .ok_or_else(|| BootError::InitrdTooLarge {
            path: path.to_owned(),
            size: len,
            room: end.saturating_sub(start),
        })?;
    let address = GuestAddress(address);
    let segment = LoadSegment {
        file_offset: 0,
        file_len: len,
        guest_address: address,
        mem_len: len,
    };
    copy(memory, path, "initrd", &file, &segment)?;
    Ok(Initrd { address, len })
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn memory(size: usize) -> GuestMemory {
        GuestMemory::from_ranges(&[(GuestAddress(0), size)]).unwrap()
    }

    fn file(bytes: &[u8]) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    fn source(kernel: &Path, protocol: Protocol) -> BootSource {
        BootSource {
            kernel: kernel.to_owned(),
            initrd: None,
            cmdline: DEFAULT_CMDLINE.to_owned(),
            protocol,
        }
    }

    fn boot(bytes: &[u8], protocol: Protocol) -> Result<BootState, BootError> {
        let kernel = file(bytes);
        load(&memory(4 << 20), &source(kernel.path(), protocol), 1, &[])
    }

    #[test]
    fn each_protocol_has_its_entry() {
        let elf = elf::tests::kernel(0x1000);
        let pvh = EntryPoint::Pvh {
            rip: GuestAddress(0x10_0040),
        };
        let linux64 = EntryPoint::Linux64 {
            rip: GuestAddress(0x10_0000),
        };
        assert_eq!(boot(&elf, Protocol::Auto).unwrap().entry, pvh);
        assert_eq!(boot(&elf, Protocol::Linux64).unwrap().entry, linux64);
        assert!(matches!(
            boot(&elf, Protocol::BzImage),
            Err(BootError::Protocol { .. })
        ));
        let image = bzimage::tests::image(b"LZMA, say");
        let itself = EntryPoint::Linux64 {
            rip: GuestAddress(0x10_0200),
        };
        assert_eq!(boot(&image, Protocol::Auto).unwrap().entry, itself);
        assert_eq!(boot(&image, Protocol::BzImage).unwrap().entry, itself);
        assert!(matches!(
            boot(&image, Protocol::Pvh),
            Err(BootError::Protocol { .. })
        ));
    }

    #[test]
    fn segments_lie_where_the_kernel_says() {
        let (kernel, memory) = (file(&elf::tests::kernel(0x1000)), memory(4 << 20));
        load(&memory, &source(kernel.path(), Protocol::Auto), 1, &[]).unwrap();
        let loaded: [u8; 17] = memory.read_obj(GuestAddress(0x10_0000)).unwrap();
        assert_eq!(loaded[..16], [0xf4; 16]);
        assert_eq!(loaded[16], 0);
    }

    #[test]
    fn a_kernel_larger_than_memory_is_refused() {
        let error = boot(&elf::tests::kernel(8 << 20), Protocol::Auto).unwrap_err();
        assert!(
            matches!(
                error,
                BootError::KernelOutsideMemory {
                    ram_end: 0x40_0000,
                    ..
                }
            ),
            "{error}"
        );
    }

    #[test]
    fn the_initrd_ends_at_the_end_of_memory_and_never_covers_the_kernel() {
        let kernel = file(&elf::tests::kernel(0x10_0000));
        let room = (4 << 20) - 0x20_0000;
        for (len, fits) in [
            (1, true),
            (room, true),
            (room + 1, false),
            (16 << 20, false),
        ] {
            let (initrd, memory) = (file(&vec![0xa5; len]), memory(4 << 20));
            let source = BootSource {
                initrd: Some(initrd.path().to_owned()),
                ..source(kernel.path(), Protocol::Linux64)
            };
            match load(&memory, &source, 1, &[]) {
                Ok(_) => {
                    assert!(fits, "{len}");
                    let last: u8 = memory
                        .read_obj(GuestAddress(((4 << 20) - len as u64) / 4096 * 4096))
                        .unwrap();
                    assert_eq!(last, 0xa5);
                }
                Err(error) => {
                    assert!(!fits, "{error}");
                    assert!(matches!(error, BootError::InitrdTooLarge { .. }), "{error}");
                }
            }
        }
    }

    #[test]
    fn what_is_no_kernel_is_refused_with_what_it_is() {
        for (bytes, says) in [
            (&b""[..], "empty"),
            (b"#!/bin/sh\n", "23 21 2f 62"),
            (&[0; 4096], "00 00"),
        ] {
            let error = boot(bytes, Protocol::Auto).unwrap_err();
            assert!(
                matches!(error, BootError::NotAKernel { .. }) && error.to_string().contains(says),
                "{error}"
            );
        }
        let open = |path: &Path| {
            load(&memory(4 << 20), &source(path, Protocol::Auto), 1, &[]).unwrap_err()
        };
        assert!(matches!(open(Path::new("/")), BootError::NotAFile { .. }));
        assert!(matches!(
            open(Path::new("/nowhere/vmlinux")),
            BootError::File { action: "open", .. }
        ));
    }

    #[test]
    fn a_device_is_named_for_kernels_without_acpi() {
        let device = MmioDevice {
            base: 0xc000_1000,
            size: 0x1000,
            gsi: 5,
        };
        assert_eq!(device.cmdline(), "virtio_mmio.device=0x1000@0xc0001000:5");
    }
}
