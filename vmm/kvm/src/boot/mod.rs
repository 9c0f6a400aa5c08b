//! Boots a guest: loads kernel, initrd and command line into guest memory, writes the boot parameters and ACPI tables,
//! and computes the registers that the first vCPU starts with.
//!
//! ```text
//!  bzImage ─┬─ payload ── unpack (cache) ─┐
//!           └─ as it is ───────┐          ├─ ELF ─┬─ PVH entry
//!  vmlinux[.gz|.xz|.lz4|.zst] ─│──────────┘       └─ 64-bit entry
//!                              └───────────────────── 64-bit entry, the guest unpacks
//! ```

use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use devices::GuestMemory;
use memshare::{FileRegistry, SharedFile, SharedMemory};
use vm_memory::{Address, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::layout::HIGH_RAM_START;
use config::BootSourceConfig;

mod acpi;
mod bzimage;
mod compression;
mod elf;
mod error;
mod files;
mod initrd_files;
mod kernel;
mod mmio_device;
mod page_writer;
mod params;
mod registers;
mod reset_vector;
mod source;
mod unpack;

pub use elf::LoadSegment;
pub use error::BootError;
pub use mmio_device::MmioDevice;
pub use registers::{BootState, EntryPoint};
pub use source::{BootSource, Protocol};

use files::{copy, open_file};
use kernel::{Kernel, check_entry, find_kernel};
use params::{BootInfo, Initrd};

/// Loads everything a guest with `vcpus` CPUs and the devices `virtio` boots from into `memory`. With `shared`, kernel
/// and initrd are mapped from copies of their files in the cache; what cannot be mapped is read.
///
/// # Errors
/// [`BootError`], naming the file and what of it is wrong. Guest memory is then in no defined state.
pub fn load(
    memory: &GuestMemory,
    shared: Option<&SharedMemory>,
    source: &BootSource,
    vcpus: u8,
    virtio: &[MmioDevice],
) -> Result<Loaded, BootError> {
    let cache = unpack::cache_dir(source.domain.as_deref());
    let kernel = find_kernel(source, &cache)?;
    let ram_end = low_ram_end(memory);
    let into = Destination {
        memory,
        shared,
        cache: &cache,
    };
    let (kernel_end, mapped) = load_kernel(&into, &kernel, ram_end)?;
    let initrd = match &source.initrd {
        Some(path) => Some(load_initrd(
            &into,
            path,
            kernel_end,
            ram_end.min(kernel.initrd_max),
        )?),
        None => None,
    };
    params::write_cmdline(memory, &source.cmdline, kernel.cmdline_max)?;
    let rsdp = acpi::build(memory, vcpus, virtio)?;
    let info = BootInfo { initrd, rsdp };
    match kernel.entry {
        EntryPoint::Linux64 { .. } => {
            params::write_zero_page(memory, kernel.header, source.cmdline.len(), &info)?;
        }
        EntryPoint::Pvh { .. } => params::write_pvh_start_info(memory, &info)?,
    }
    let state = BootState {
        entry: kernel.entry,
    };
    state.write_tables(memory)?;
    reset_vector::write(memory)?;
    Ok(Loaded {
        state,
        kernel: mapped,
    })
}

/// The folder of the cache for a sharing domain, with this user's unpacked kernels and all that is made of them.
pub fn cache_dir(domain: Option<&str>) -> PathBuf {
    unpack::cache_dir(domain)
}

/// The file that the kernel at `path` is mapped from, in the cache of a sharing domain; it is made if it does not
/// exist. `None` for a bzImage that unpacks itself, or where the cache cannot be used. For a file of the cache, it is
/// that file.
///
/// # Errors
/// Those of [`load`].
pub fn runtime_kernel(path: &Path, domain: Option<&str>) -> Result<Option<PathBuf>, BootError> {
    let source = BootSource {
        kernel: path.to_owned(),
        initrd: None,
        cmdline: String::new(),
        protocol: Protocol::Auto,
        domain: domain.map(str::to_owned),
    };
    let cache = unpack::cache_dir(domain);
    let cached = find_kernel(&source, &cache)?.cached(&cache);
    let shared = cached.and_then(|file| FileRegistry::default().share(&Arc::new(file)).ok());
    Ok(shared.map(|file| file.path().to_owned()))
}

/// Whether `path` names a file of the cache of a sharing domain, such as one that [`runtime_kernel`] has given.
pub fn is_in_cache(path: &Path, domain: Option<&str>) -> bool {
    unpack::is_in(path, &unpack::cache_dir(domain))
}

/// Fills the cache of a sharing domain with what guests of `source` need, as far as that is possible; with the initrd
/// if `share` is set. Returns the files, which [`load`] uses.
pub fn fill_cache(source: &BootSourceConfig, domain: Option<&str>, share: bool) -> Vec<PathBuf> {
    let cache = unpack::cache_dir(domain);
    let of_config = BootSource {
        kernel: source.kernel_image_path.clone(),
        initrd: None,
        cmdline: String::new(),
        protocol: Protocol::from(source.boot_protocol),
        domain: domain.map(str::to_owned),
    };
    // Errors are reported when the files are loaded.
    let kernel = find_kernel(&of_config, &cache).ok();
    let kernel = kernel
        .filter(|kernel| share || kernel.is_cached)
        .and_then(|kernel| kernel.cached(&cache));
    let initrd = source.initrd_path.as_ref().filter(|_| share);
    let initrd = initrd.into_iter().flat_map(|path| {
        let opened = open_file(path, "initrd").ok();
        let kept = opened.map(|(file, len)| {
            [
                unpack::cache_copy(path, &file, len, &cache),
                unpack::cache_initrd_files(path, &file, len, &cache),
            ]
        });
        kept.into_iter().flatten().flatten()
    });
    let files = kernel.into_iter().chain(initrd);
    let shared = files.filter_map(|file| FileRegistry::default().share(&Arc::new(file)).ok());
    shared.map(|file| file.path().to_owned()).collect()
}

/// The file of the cache of a sharing domain with the files that a guest unpacks of its initrd, each of which begins at
/// a page. `None` where the initrd cannot be unpacked, or the cache cannot be used.
///
/// # Errors
/// [`BootError`], for an initrd that cannot be opened.
pub fn initrd_files(initrd: &Path, domain: Option<&str>) -> Result<Option<File>, BootError> {
    let (file, len) = open_file(initrd, "initrd")?;
    Ok(unpack::cache_initrd_files(
        initrd,
        &file,
        len,
        &unpack::cache_dir(domain),
    ))
}

/// The kernel that guests get, and where its segments are loaded: an ELF file, unpacked into the cache if it is
/// compressed.
///
/// # Errors
/// [`BootError`], also for a kernel that can only unpack itself.
pub fn unpacked(kernel: &Path) -> Result<(File, Vec<LoadSegment>), BootError> {
    let source = BootSource {
        kernel: kernel.to_owned(),
        initrd: None,
        cmdline: String::new(),
        protocol: Protocol::Pvh,
        domain: None,
    };
    let kernel = find_kernel(&source, &unpack::cache_dir(None))?;
    Ok((kernel.file, kernel.segments))
}

/// End of RAM below the hole.
fn low_ram_end(memory: &GuestMemory) -> u64 {
    memory
        .iter()
        .next()
        .map_or(0, |region| region.start_addr().raw_value() + region.len())
}

/// A guest that is ready to start.
#[derive(Debug)]
pub struct Loaded {
    /// How its first vCPU starts.
    pub state: BootState,
    /// The kernel, where it is mapped from the cache.
    pub kernel: Option<MappedKernel>,
}

/// A kernel that is mapped from a file of the cache.
#[derive(Clone, Debug)]
pub struct MappedKernel {
    /// The file.
    pub file: Arc<SharedFile>,
    /// Guest physical addresses of its text and read-only data: from the first read-only segment to the end of the
    /// last.
    pub addresses: Range<u64>,
}

/// The memory that files are loaded into, and the cache that they are mapped from.
struct Destination<'a> {
    memory: &'a GuestMemory,
    shared: Option<&'a SharedMemory>,
    cache: &'a Path,
}

impl Destination<'_> {
    /// The immutable file that `cached` finds, if memory is shared.
    fn cached(&self, cached: impl FnOnce(&Path) -> Option<File>) -> Option<Arc<SharedFile>> {
        let files = self.shared?.files();
        files.share(&Arc::new(cached(self.cache)?)).ok()
    }

    fn put(
        &self,
        path: &Path,
        role: &'static str,
        file: &File,
        cached: Option<&Arc<SharedFile>>,
        segment: &LoadSegment,
    ) -> Result<(), BootError> {
        match (self.shared, cached) {
            (Some(shared), Some(cached)) => {
                files::share(self.memory, shared, path, role, cached, segment)
            }
            (None, _) | (_, None) => copy(self.memory, path, role, file, segment),
        }
    }
}

/// Puts the kernel's segments into guest memory; returns the first address past them, and the kernel if it is mapped.
fn load_kernel(
    into: &Destination<'_>,
    kernel: &Kernel,
    ram_end: u64,
) -> Result<(u64, Option<MappedKernel>), BootError> {
    check_entry(kernel)?;
    let (path, file) = (&kernel.path, &kernel.file);
    let cached = into.cached(|cache| kernel.cached(cache));
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
        // RAM is zero, so nothing is written for the bytes past `file_len`.
        into.put(path, "kernel", file, cached.as_ref(), segment)?;
        kernel_end = kernel_end.max(end);
    }
    let mapped = cached.and_then(|file| {
        let read_only = || {
            kernel
                .segments
                .iter()
                .filter(|segment| !segment.is_writable)
        };
        let start = read_only().map(|segment| segment.guest_address.raw_value());
        let end = read_only().map(|segment| segment.guest_address.raw_value() + segment.mem_len);
        let addresses = start.min()?..end.max()?;
        Some(MappedKernel { file, addresses })
    });
    Ok((kernel_end, mapped))
}

/// Puts the initrd as high as possible, where no kernel needs the room.
fn load_initrd(
    into: &Destination<'_>,
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
        is_writable: true,
    };
    let cached = into.cached(|cache| unpack::cache_copy(path, &file, len, cache));
    into.put(path, "initrd", &file, cached.as_ref(), &segment)?;
    Ok(Initrd { address, len })
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use proptest::prelude::*;
    use vm_memory::Bytes;

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
            cmdline: config::limits::DEFAULT_CMDLINE.to_owned(),
            protocol,
            domain: None,
        }
    }

    fn boot(bytes: &[u8], protocol: Protocol) -> Result<BootState, BootError> {
        let kernel = file(bytes);
        load(
            &memory(4 << 20),
            None,
            &source(kernel.path(), protocol),
            1,
            &[],
        )
        .map(|loaded| loaded.state)
    }

    #[test]
    fn each_protocol_has_its_entry() {
        let elf = elf::tests::kernel(0x1000);
        let pvh = EntryPoint::Pvh {
            rip: GuestAddress(0x10_0008),
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
    fn segments_are_loaded_at_the_kernels_addresses() {
        let (kernel, memory) = (file(&elf::tests::kernel(0x1000)), memory(4 << 20));
        load(
            &memory,
            None,
            &source(kernel.path(), Protocol::Auto),
            1,
            &[],
        )
        .unwrap();
        let loaded: [u8; 17] = memory.read_obj(GuestAddress(0x10_0000)).unwrap();
        assert_eq!(loaded[..16], [0xf4; 16]);
        assert_eq!(loaded[16], 0);
    }

    #[test]
    fn shared_files_are_mapped_where_pages_are_aligned_and_read_elsewhere() {
        const PAGE: u64 = memshare::PAGE_SIZE;
        let folder = tempfile::tempdir().unwrap();
        let memory = memory(8 << 20);
        let shared = crate::vm::shared_memory(&memory, memshare::Limits::of_host(5, false));
        let into = Destination {
            memory: &memory,
            shared: Some(&shared),
            cache: &folder.path().join("cache"),
        };
        let bytes: Vec<u8> = (0..3 * PAGE + 100).map(|at| (at / 7) as u8).collect();
        let source = file(&bytes);
        let cached = into.cached(|cache| {
            unpack::cache_copy(source.path(), source.as_file(), bytes.len() as u64, cache)
        });
        let put = |file_offset, address| {
            let segment = LoadSegment {
                file_offset,
                file_len: bytes.len() as u64 - file_offset,
                guest_address: GuestAddress(address),
                mem_len: 4 * PAGE,
                is_writable: false,
            };
            let file = source.as_file();
            into.put(source.path(), "initrd", file, cached.as_ref(), &segment)
                .unwrap();
            let mut loaded = vec![0; segment.file_len as usize];
            memory
                .read_slice(&mut loaded, segment.guest_address)
                .unwrap();
            assert!(loaded == bytes[file_offset as usize..], "{address:#x}");
        };
        put(0, 1 << 20);
        put(512, 2 << 20);
        put(PAGE + 512, (3 << 20) + 512);
        let mapped: Vec<_> = shared
            .mapped()
            .iter()
            .map(|run| (run.gfn * PAGE, run.pages, run.backing.offset))
            .collect();
        // Pages of the file are aligned to pages of the guest at the first and the last of the three addresses.
        let expected = [(1 << 20, 3, 0), ((3 << 20) + PAGE, 1, 2 * PAGE)];
        assert_eq!(mapped, expected);
        // The file itself may change, because guests have the copy in the cache.
        source.as_file().set_len(0).unwrap();
        let first: [u8; 8] = memory.read_obj(GuestAddress(1 << 20)).unwrap();
        assert_eq!(first, bytes[..8]);
    }

    #[test]
    fn an_entry_outside_the_kernel_is_refused() {
        let mut bytes = elf::tests::kernel(0x1000);
        bytes[24..32].copy_from_slice(&0xffff_ffff_8100_0000u64.to_le_bytes());
        let error = boot(&bytes, Protocol::Linux64).unwrap_err();
        assert!(error.to_string().contains("0xffffffff81000000"), "{error}");
    }

    #[test]
    fn compressed_kernels_boot_as_elf_and_other_compressions_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let cache = dir.path().join("cache");
        let find = |bytes: &[u8]| {
            let path = dir.path().join("vmlinuz");
            std::fs::write(&path, bytes).unwrap();
            find_kernel(&source(&path, Protocol::Auto), &cache).map(|kernel| kernel.entry)
        };
        let pvh = EntryPoint::Pvh {
            rip: GuestAddress(0x10_0008),
        };
        for (compression, mut packed) in compression::tests::packed(&elf::tests::kernel(0x1000)) {
            assert_eq!(find(&packed).unwrap(), pvh, "{compression:?}");
            packed.extend(272u32.to_le_bytes());
            let image = bzimage::tests::image(&packed);
            assert_eq!(find(&image).unwrap(), pvh, "{compression:?} in a bzImage");
        }
        let error = find(b"BZh91AY&SY").unwrap_err();
        assert!(error.to_string().contains("bzip2"), "{error}");
    }

    proptest! {
        #[test]
        fn no_file_panics_the_loader(
            image: bool,
            changes in prop::collection::vec((0..0x280usize, any::<u8>()), 0..16),
            cut in 0..0x900usize,
        ) {
            let mut bytes = if image {
                bzimage::tests::image(b"payload")
            } else {
                elf::tests::kernel(0x1000)
            };
            for (at, value) in changes {
                if let Some(byte) = bytes.get_mut(at) {
                    *byte = value;
                }
            }
            bytes.truncate(cut.max(1));
            for protocol in [Protocol::Pvh, Protocol::Linux64, Protocol::BzImage] {
                if let Err(error) = boot(&bytes, protocol) {
                    prop_assert!(!error.to_string().contains('\n'));
                }
            }
        }
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
            match load(&memory, None, &source, 1, &[]) {
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
    fn a_file_that_is_no_kernel_is_refused_with_its_first_bytes() {
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
            load(
                &memory(4 << 20),
                None,
                &source(path, Protocol::Auto),
                1,
                &[],
            )
            .unwrap_err()
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
