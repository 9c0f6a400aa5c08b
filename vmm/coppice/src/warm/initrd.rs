//! The initrd of a guest that boots and powers off: one program of two system calls.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use cpio::newc;

use super::temporary;

/// Where the program is loaded, and runs.
const ADDRESS: u64 = 0x40_0000;
const ELF_HEADER: u64 = 64;
const PROGRAM_HEADER: u64 = 56;

/// Sleeps for a second, in which a kernel finishes what it has put off, and powers off.
const CODE: [u8; 54] = [
    0xb8, 0x23, 0x00, 0x00, 0x00, // mov eax, 35 (nanosleep)
    0x48, 0x8d, 0x3d, 0x1a, 0x00, 0x00, 0x00, // lea rdi, [rip + 26]
    0x31, 0xf6, // xor esi, esi
    0x0f, 0x05, // syscall
    0xb8, 0xa9, 0x00, 0x00, 0x00, // mov eax, 169 (reboot)
    0xbf, 0xad, 0xde, 0xe1, 0xfe, // mov edi, LINUX_REBOOT_MAGIC1
    0xbe, 0x69, 0x19, 0x12, 0x28, // mov esi, LINUX_REBOOT_MAGIC2
    0xba, 0xdc, 0xfe, 0x21, 0x43, // mov edx, LINUX_REBOOT_CMD_POWER_OFF
    0x0f, 0x05, // syscall
    // A timespec: one second.
    1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, //
];

/// A static ELF executable (System V ABI, AMD64 supplement) with one segment.
fn program() -> Vec<u8> {
    let start = ELF_HEADER + PROGRAM_HEADER;
    let len = start + CODE.len() as u64;
    let mut elf = b"\x7fELF\x02\x01\x01".to_vec();
    elf.resize(16, 0);
    elf.extend(2u16.to_le_bytes()); // ET_EXEC
    elf.extend(62u16.to_le_bytes()); // EM_X86_64
    elf.extend(1u32.to_le_bytes());
    elf.extend((ADDRESS + start).to_le_bytes());
    elf.extend(ELF_HEADER.to_le_bytes());
    elf.extend(0u64.to_le_bytes());
    elf.extend(0u32.to_le_bytes());
    for half in [ELF_HEADER as u16, PROGRAM_HEADER as u16, 1, 0, 0, 0] {
        elf.extend(half.to_le_bytes());
    }
    elf.extend(1u32.to_le_bytes()); // PT_LOAD
    elf.extend(5u32.to_le_bytes()); // readable, executable
    for word in [0, ADDRESS, ADDRESS, len, len, 0x1000] {
        elf.extend(word.to_le_bytes());
    }
    elf.extend(CODE);
    elf
}

/// Keeps the archive as a file of the cache, which every user may read who is given it, and gives its path. It is
/// written once, so that what guests make of it in the cache is made once.
///
/// # Errors
/// The host's error.
pub(super) fn keep(cache: &Path) -> io::Result<PathBuf> {
    let (path, archive) = (cache.join(".warming.initrd"), archive()?);
    if !fs::read(&path).is_ok_and(|kept| kept == archive) {
        let mut file = temporary::make(cache, 0o644)?;
        file.write_all(&archive)?;
        file.persist(&path)?;
    }
    Ok(path)
}

/// The archive.
///
/// # Errors
/// None: writing to memory does not fail.
fn archive() -> io::Result<Vec<u8>> {
    const EXECUTABLE: u32 = 0o100_755;
    let (mut archive, program) = (Vec::new(), program());
    let entry = newc::Builder::new("init").mode(EXECUTABLE).nlink(1);
    let mut entry = entry.write(&mut archive, program.len() as u32);
    entry.write_all(&program)?;
    entry.finish()?;
    newc::trailer(archive)
}
