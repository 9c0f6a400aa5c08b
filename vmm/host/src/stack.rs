//! The stack of the main thread. It is kept small, because every guest of a host has one.

use std::hint::black_box;

use memshare::PAGE_SIZE;

/// How far below the stack pointer pages are given back: building a guest takes no deeper stack.
const DEPTH: usize = 2 << 20;
/// Room for the functions that are called from here, and for the red zone that the ABI lets a function use below its
/// stack (System V ABI, AMD64, 3.2.2: 128 bytes).
const MARGIN: usize = PAGE_SIZE as usize;

/// Gives back the pages below the stack pointer that the main thread has used: building a guest takes a deep stack, and
/// serving it does not. Does nothing in any other thread.
pub fn give_back() {
    if rustix::thread::gettid() != rustix::process::getpid() {
        return;
    }
    let here = black_box(0u8);
    let end =
        (&raw const here as usize).saturating_sub(MARGIN) / PAGE_SIZE as usize * PAGE_SIZE as usize;
    // SAFETY: all of the range is more than a page below the main thread's stack pointer, where nothing is stored, and
    // within the 128 MiB below its stack at which the kernel maps nothing else (MIN_GAP of mmap_base, Linux'
    // arch/x86/mm/mmap.c). Pages that are not mapped are skipped, with ENOMEM.
    unsafe {
        libc::madvise(
            (end - DEPTH) as *mut libc::c_void,
            DEPTH,
            libc::MADV_DONTNEED,
        )
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_threads_stack_stays_as_it_is() {
        // A test is never the main thread.
        let kept = black_box([7u8; 64]);
        give_back();
        assert_eq!(black_box(kept), [7; 64]);
    }
}
