//! The command line that others see of this process (`/proc/PID/cmdline`).

use std::io;

/// Fields of `/proc/self/stat` behind the name: `arg_start`, `arg_end` (proc(5): 48 and 49, the name being the second).
const ARG_START: usize = 48 - 3;

/// The addresses of the command line that the process was started with.
fn place(stat: &str) -> Option<(usize, usize)> {
    let (_, fields) = stat.rsplit_once(')')?;
    let mut fields = fields.split_whitespace().skip(ARG_START);
    let mut next = || fields.next()?.parse().ok();
    let (start, end) = (next()?, next()?);
    (0 < start && start < end).then_some((start, end))
}

/// Overwrites the command line that the process was started with by other words, as far as there is room.
///
/// # Errors
/// Where `/proc` does not tell its addresses.
pub(super) fn set(words: &[String]) -> io::Result<()> {
    let stat = std::fs::read_to_string("/proc/self/stat")?;
    let (start, end) = place(&stat).ok_or(io::ErrorKind::NotFound)?;
    let words = words.iter().flat_map(|word| word.bytes().chain([0]));
    // The last byte has to stay zero: else the kernel takes what follows, the environment, for more of it.
    let bytes = words.take(end - start - 1).chain(std::iter::repeat(0));
    for (address, byte) in (start..end).zip(bytes) {
        let place = std::ptr::with_exposed_provenance_mut::<u8>(address);
        // SAFETY: the kernel has put the words there, on the stack above all frames, when the program was executed; it
        // is writable, and nobody holds a reference into it: Rust copies arguments when it is asked for them, and this
        // process has one thread.
        unsafe { place.write_volatile(byte) };
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_place_is_found_behind_any_name() {
        let fields: Vec<String> = (3..=52).map(|field| (field * 100).to_string()).collect();
        let stat = format!("7 (a) b (c) {}", fields.join(" "));
        assert_eq!(place(&stat), Some((4800, 4900)));
        assert_eq!(place("7 (a) 1 2 3"), None);
        let own = std::fs::read_to_string("/proc/self/stat").unwrap();
        let (start, end) = place(&own).unwrap();
        let line = std::fs::read("/proc/self/cmdline").unwrap();
        assert_eq!(end - start, line.len());
    }
}
