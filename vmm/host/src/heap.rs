//! The heap of a guest's process. It is kept small, because every guest of a host has one.

/// The size in bytes from which an allocation is a mapping of its own, and the size that may be free at the heap's end.
const LARGE: i32 = 64 << 10;

/// Has all threads allocate from one heap. By default the C library has a heap for each thread, each with free pages,
/// so that threads do not wait for each other. Threads of a guest's process hardly allocate once the guest runs.
pub fn share() {
    for (parameter, value) in [
        (libc::M_ARENA_MAX, 1),
        // Buffers are given back as soon as they are free. Unless the threshold is set, the library raises it to the
        // size of the largest buffer that was freed.
        (libc::M_MMAP_THRESHOLD, LARGE),
        (libc::M_TRIM_THRESHOLD, LARGE),
    ] {
        // SAFETY: it sets a number of the C library's allocator (mallopt(3)), before there is another thread.
        unsafe { libc::mallopt(parameter, value) };
    }
}

/// Gives free pages of the heap back to the host. Building a guest takes much more memory than running it, most of it
/// in the parser of the command line, and the C library would never give it back.
pub fn give_back() {
    // SAFETY: malloc_trim(3) changes only free pages of the C library, whose locks keep out threads that allocate
    // meanwhile.
    unsafe { libc::malloc_trim(0) };
}
