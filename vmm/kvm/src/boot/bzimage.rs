//! `bzImage`: the setup header, the kernel that unpacks itself, and the payload inside it.
//!
//! Source: Linux, Documentation/arch/x86/boot.rst.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use linux_loader::loader::bootparam::setup_header;
use vm_memory::ByteValued;

use super::BootError;

/// `header`, at 0x202: "`HdrS`".
pub(super) const MAGIC: [u8; 4] = *b"HdrS";
/// Offset of [`MAGIC`] in the file.
pub(super) const MAGIC_OFFSET: u64 = 0x202;

const SETUP_HEADER_OFFSET: u64 = 0x1f1;
const BOOT_FLAG: u16 = 0xaa55;
/// Version 2.12 has `xloadflags`, and with it the 64-bit entry point.
const MIN_VERSION: u16 = 0x020c;
/// `loadflags`: the protected-mode code loads high.
const LOADED_HIGH: u8 = 1 << 0;
/// `xloadflags`: the kernel has the 64-bit entry point.
const XLF_KERNEL_64: u16 = 1 << 0;
/// The 64-bit entry point, in bytes from the start of the loaded kernel.
pub(super) const ENTRY_64: u64 = 0x200;

/// A bzImage whose setup header has been checked.
pub(super) struct BzImage {
    pub(super) header: setup_header,
    /// Where the protected-mode kernel starts in the file, in bytes.
    pub(super) kernel_offset: u64,
    /// Its length in bytes.
    pub(super) kernel_len: u64,
}

/// Parses the setup header of `file`, of `len` bytes.
pub(super) fn parse(file: &File, path: &Path, len: u64) -> Result<BzImage, BootError> {
    let error = |offset: u64, expected: String| BootError::BzImage {
        path: path.to_owned(),
        offset,
        expected,
    };
    let mut header = setup_header::default();
    file.read_exact_at(header.as_mut_slice(), SETUP_HEADER_OFFSET)
        .map_err(|_| {
            error(
                SETUP_HEADER_OFFSET,
                format!("a setup header expected, the file ends at {len:#x}"),
            )
        })?;
    let (boot_flag, version, flags) = (header.boot_flag, header.version, header.xloadflags);
    if boot_flag != BOOT_FLAG {
        return Err(error(
            0x1fe,
            format!("boot flag {BOOT_FLAG:#x} expected, found {boot_flag:#x}"),
        ));
    }
    if version < MIN_VERSION {
        return Err(error(
            0x206,
            format!("boot protocol 2.12 or later expected, found {version:#x}"),
        ));
    }
    if flags & XLF_KERNEL_64 == 0 {
        return Err(error(
            0x236,
            format!("a 64-bit kernel expected, found load flags {flags:#x}"),
        ));
    }
    if header.loadflags & LOADED_HIGH == 0 {
        return Err(error(
            0x211,
            format!(
                "a kernel that loads high expected, found load flags {:#x}",
                header.loadflags
            ),
        ));
    }
    // 0 means 4 (boot protocol, `setup_sects`).
    let sectors = if header.setup_sects == 0 {
        4
    } else {
        u64::from(header.setup_sects)
    };
    let kernel_offset = (sectors + 1) * 512;
    let kernel_len = len
        .checked_sub(kernel_offset)
        .filter(|len| *len > ENTRY_64)
        .ok_or_else(|| {
            error(
                kernel_offset,
                format!("the kernel expected, the file ends at {len:#x}"),
            )
        })?;
    Ok(BzImage {
        header,
        kernel_offset,
        kernel_len,
    })
}

impl BzImage {
    /// The compressed kernel: offset in the file and length, in bytes.
    pub(super) fn payload(&self, path: &Path) -> Result<(u64, u64), BootError> {
        let (offset, len) = (
            u64::from(self.header.payload_offset),
            u64::from(self.header.payload_length),
        );
        // Both are 32 bits wide.
        if offset + len > self.kernel_len || len == 0 {
            return Err(BootError::BzImage {
                path: path.to_owned(),
                offset: 0x248,
                expected: format!(
                    "a payload inside the kernel's {:#x} bytes, found {offset:#x}+{len:#x}",
                    self.kernel_len
                ),
            });
        }
        Ok((self.kernel_offset + offset, len))
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::io::Write;

    use super::*;

    /// A bzImage with `payload` behind its header.
    pub(in crate::boot) fn image(payload: &[u8]) -> Vec<u8> {
        let header = setup_header {
            setup_sects: 1,
            boot_flag: BOOT_FLAG,
            header: u32::from_le_bytes(MAGIC),
            version: 0x020f,
            loadflags: LOADED_HIGH,
            xloadflags: XLF_KERNEL_64,
            pref_address: 0x10_0000,
            init_size: 0x10_0000,
            relocatable_kernel: 1,
            initrd_addr_max: 0x7fff_ffff,
            cmdline_size: 255,
            payload_offset: 0x400,
            payload_length: payload.len() as u32,
            ..Default::default()
        };
        let mut bytes = vec![0; SETUP_HEADER_OFFSET as usize];
        bytes.extend(header.as_slice());
        bytes.resize(1024 + 0x400, 0);
        bytes.extend(payload);
        bytes
    }

    fn parse_bytes(bytes: &[u8]) -> Result<BzImage, BootError> {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        parse(&file, Path::new("vmlinuz"), bytes.len() as u64)
    }

    #[test]
    fn the_payload_is_found() {
        let image = parse_bytes(&image(b"payload")).unwrap();
        assert_eq!(image.payload(Path::new("")).unwrap(), (1024 + 0x400, 7));
    }

    #[test]
    fn damaged_headers_are_refused_by_field() {
        for (offset, value, names) in [
            (0x1fe, 0, "boot flag"),
            (0x207, 1, "boot protocol"),
            (0x236, 0, "64-bit"),
            (0x211, 0, "high"),
        ] {
            let mut bytes = image(b"payload");
            bytes[offset] = value;
            let Err(error) = parse_bytes(&bytes) else {
                panic!("{names}")
            };
            assert!(error.to_string().contains(names), "{error}");
        }
        let mut bytes = image(b"payload");
        bytes.truncate(1024);
        assert!(parse_bytes(&bytes).is_err());
        let mut bytes = image(b"payload");
        bytes.pop();
        assert!(parse_bytes(&bytes).unwrap().payload(Path::new("")).is_err());
    }
}
