//! The stack of the main thread, which every guest of a host has.

use std::hint::black_box;

use memshare::PAGE_SIZE;

/// As far down as it is looked for pages: what puts a guest together does not go deeper.
const DEPTH: usize = 2 << 20;
/// For what is called from here, and for what the ABI lets a function use below its stack (System V ABI, AMD64, 3.2.2:
/// 128 bytes).
const MARGIN: usize = PAGE_SIZE as usize;

/// Gives the pages below back that the main thread has used and uses no more: what a guest is put together with is
/// deep, and what serves it is not. Another thread's stack stays as it is.
pub fn give_back() {
    if rustix::thread::gettid() != rustix::process::getpid() {
        return;
    }
    let here = black_box(0u8);
    let end =
        (&raw const here as usize).saturating_sub(MARGIN) / PAGE_SIZE as usize * PAGE_SIZE as usize;
    // SAFETY: all of the range is more than a page below the main thread's stack pointer, where nothing lives, and
    // within the 128 MiB below its stack at which the kernel maps nothing else (MIN_GAP of mmap_base, Linux'
    // arch/x86/mm/mmap.c). What is not mapped there is left out, with ENOMEM.
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
