//! The stack canary of a copy.
//!
//! The C library's functions put this word before their return address, and end the process where it has changed when
//! they return (GCC, `-fstack-protector`). It is chosen when a program is executed, so copies would have that of their
//! zygote, and whoever learns it of one guest's process would know it of all. Rust's own functions have none.

use std::arch::asm;
use std::io;

use rustix::rand::{GetRandomFlags, getrandom};

/// Gives this process, which has one thread, a canary of its own. Threads that it starts have the same one.
///
/// The word beside it, with which the C library disguises addresses that it keeps (its *pointer guard*), stays:
/// addresses disguised by the old one are kept already, of the destructors of this thread's variables among others, and
/// where they are only the library knows.
///
/// # Errors
/// Where the host gives no random bytes.
pub(super) fn renew() -> io::Result<()> {
    let mut bytes = [0; 8];
    let len = getrandom(&mut bytes, GetRandomFlags::empty())?;
    if len != bytes.len() {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    // As the C library has it: a zero at the lowest address, so that no text that ends with a zero can hold it.
    bytes[0] = 0;
    let canary = u64::from_ne_bytes(bytes);
    // SAFETY: the place is the C library's, of its thread descriptor (System V ABI, AMD64: `%fs:0x28`), and is written
    // to by nobody else, because there is one thread. A function that has put the old word on the stack must not return
    // after this. All that are being called are Rust's, which have no such word in a build by a stable compiler, `main`
    // among them, and those that have called `main`: they end the process and do not return. No function begins before
    // this and ends after it, because it is one instruction.
    unsafe { asm!("mov fs:[0x28], {}", in(reg) canary, options(nostack, preserves_flags)) };
    Ok(())
}
