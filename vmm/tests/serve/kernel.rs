//! A kernel of 98 bytes that any KVM can run: it prints `up`, tells the boot timer, and then echoes its serial console.

use std::fs;
use std::path::Path;

/// `q` has it power off, `r` reset, `t` crash (a triple fault), `p` panic. Any key of its keyboard has it power off.
const CODE: [u8; 98] = [
    // mov edx, 0x3f8; out 'u', 'p', '\n'
    0xba, 0xf8, 0x03, 0x00, 0x00, 0xb0, 0x75, 0xee, 0xb0, 0x70, 0xee, 0xb0, 0x0a, 0xee,
    // mov edx, 0x3f0; mov al, 123; out dx, al
    0xba, 0xf0, 0x03, 0x00, 0x00, 0xb0, 0x7b, 0xee,
    // poll: pause; mov edx, 0x3fd; in al, dx; test al, 1; jz keyboard
    0xf3, 0x90, 0xba, 0xfd, 0x03, 0x00, 0x00, 0xec, 0xa8, 0x01, 0x74, 0x19,
    // mov edx, 0x3f8; in al, dx; cmp al, 'q'; je off; cmp al, 'r'; je reset
    0xba, 0xf8, 0x03, 0x00, 0x00, 0xec, 0x3c, 0x71, 0x74, 0x15, 0x3c, 0x72, 0x74, 0x1a,
    // cmp al, 't'; je crash; cmp al, 'p'; je panic; out dx, al; jmp poll
    0x3c, 0x74, 0x74, 0x24, 0x3c, 0x70, 0x74, 0x17, 0xee, 0xeb, 0xdb,
    // keyboard: in al, 0x64; test al, 1; jz poll
    0xe4, 0x64, 0xa8, 0x01, 0x74, 0xd5,
    // off: mov edx, 0x600; mov al, 0x34; out dx, al; hlt
    0xba, 0x00, 0x06, 0x00, 0x00, 0xb0, 0x34, 0xee, 0xf4,
    // reset: mov al, 0xfe; out 0x64, al; hlt
    0xb0, 0xfe, 0xe6, 0x64, 0xf4, // panic: mov edx, 0x505; mov al, 1; out dx, al; hlt
    0xba, 0x05, 0x05, 0x00, 0x00, 0xb0, 0x01, 0xee, 0xf4,
    // crash: push 0; push 0; lidt [rsp]; ud2
    0x6a, 0x00, 0x6a, 0x00, 0x0f, 0x01, 0x1c, 0x24, 0x0f, 0x0b,
];

/// Where it lies in memory.
const ADDRESS: u64 = 0x10_0000;
const CODE_AT: u64 = 0x1000;

/// Writes the kernel to a file: an ELF of one segment.
pub fn write(path: &Path) {
    let len = CODE.len() as u64;
    let mut elf = b"\x7fELF\x02\x01\x01".to_vec();
    elf.resize(16, 0);
    elf.extend([2u16, 62].iter().flat_map(|half| half.to_le_bytes()));
    elf.extend(1u32.to_le_bytes());
    elf.extend([ADDRESS, 64, 0].iter().flat_map(|word| word.to_le_bytes()));
    elf.extend(0u32.to_le_bytes());
    elf.extend(
        [64u16, 56, 1, 0, 0, 0]
            .iter()
            .flat_map(|half| half.to_le_bytes()),
    );
    elf.extend([1u32, 7].iter().flat_map(|word| word.to_le_bytes()));
    let segment = [CODE_AT, ADDRESS, ADDRESS, len, 1 << 16, 0x1000];
    elf.extend(segment.iter().flat_map(|word| word.to_le_bytes()));
    elf.resize(CODE_AT as usize, 0);
    elf.extend(CODE);
    fs::write(path, elf).unwrap();
}
