//! The heap of a guest's process, which every guest of a host has.

/// Bytes that have a mapping of their own, or that may be free at the heap's end.
const LARGE: i32 = 64 << 10;

/// Has all threads allocate from one heap. Else the C library would give each thread one of its own, with free pages of
/// its own, so that they do not wait for each other; threads of a guest's process hardly allocate once it runs.
pub fn share() {
    for (parameter, value) in [
        (libc::M_ARENA_MAX, 1),
        // Buffers go back as soon as they are free. Where this is not said, the library raises it to the size of the
        // largest that was.
        (libc::M_MMAP_THRESHOLD, LARGE),
        (libc::M_TRIM_THRESHOLD, LARGE),
    ] {
        // SAFETY: it sets a number of the C library's allocator (mallopt(3)), before there is another thread.
        unsafe { libc::mallopt(parameter, value) };
    }
}

/// Gives the pages of the heap that are free back to the host. What a guest is built with, the command line's parser
/// first of all, takes much more than what it runs with, and the C library would keep it for ever.
pub fn give_back() {
    // SAFETY: the C library's own free pages are all that changes (malloc_trim(3)); whoever allocates meanwhile is kept
    // out by its locks.
    unsafe { libc::malloc_trim(0) };
}
