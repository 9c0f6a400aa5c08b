//! Sector bitmaps ([MS-VHDX] 2.4): which sectors of a partially present block are in the file. Bit 0 is the least
//! significant one of byte 0; a set bit says that the sector is here and not in the parent.

use std::ops::Range;

use super::bat::PAGE;

/// Sectors that a page describes.
const BITS_PER_PAGE: u64 = PAGE * 8;

/// The pages of a bitmap at `bitmap` that hold the bits of a range, each with the bits of it that it holds.
pub(super) fn pages(
    bitmap: u64,
    bits: Range<u64>,
) -> impl Iterator<Item = (u64, Range<usize>)> + Clone {
    let numbers = bits.start / BITS_PER_PAGE..bits.end.div_ceil(BITS_PER_PAGE);
    numbers.map(move |number| {
        let base = number * BITS_PER_PAGE;
        let start = bits.start.max(base) - base;
        let end = bits.end.min(base + BITS_PER_PAGE) - base;
        (bitmap + number * PAGE, start as usize..end as usize)
    })
}

/// Whether the first bit of a range, which is not empty, is set, and how many bits of it from there are the same.
pub(super) fn run(bytes: &[u8], bits: &Range<usize>) -> (bool, usize) {
    let is_set = |bit: usize| bytes[bit / 8] & (1 << (bit % 8)) != 0;
    let first = is_set(bits.start);
    let same = if first { u64::MAX } else { 0 };
    let mut at = bits.start + 1;
    while at < bits.end {
        // A word at a time where one is left.
        if at.is_multiple_of(64)
            && at + 64 <= bits.end
            && let Some(word) = bytes[at / 8..].first_chunk()
            && u64::from_le_bytes(*word) == same
        {
            at += 64;
        } else if is_set(at) == first {
            at += 1;
        } else {
            break;
        }
    }
    (first, at - bits.start)
}

/// Whether all bits of a range are set.
pub(super) fn is_full(bytes: &[u8], bits: &Range<usize>) -> bool {
    bits.is_empty() || run(bytes, bits) == (true, bits.len())
}

/// Whether no bit of a range is set.
pub(super) fn is_clear(bytes: &[u8], bits: &Range<usize>) -> bool {
    bits.is_empty() || run(bytes, bits) == (false, bits.len())
}

/// Sets or clears the bits of a range.
pub(super) fn fill(bytes: &mut [u8], bits: &Range<usize>, value: bool) {
    let mut at = bits.start;
    while at < bits.end {
        let (byte, first) = (at / 8, at % 8);
        let count = (8 - first).min(bits.end - at);
        let mask = (u8::MAX >> (8 - count)) << first;
        if value {
            bytes[byte] |= mask;
        } else {
            bytes[byte] &= !mask;
        }
        at += count;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn what_is_set_is_found(ranges in prop::collection::vec((0..4096_usize, 0..600_usize, any::<bool>()), 1..20), from in 0..4600_usize) {
            let mut bytes = vec![0; 1024];
            let mut model = vec![false; 8192];
            for (start, len, value) in ranges {
                fill(&mut bytes, &(start..start + len), value);
                model[start..start + len].fill(value);
            }
            let mut at = from;
            while at < model.len() {
                let (value, len) = run(&bytes, &(at..model.len()));
                prop_assert!(model[at..at + len].iter().all(|bit| *bit == value));
                prop_assert!(model.get(at + len).is_none_or(|bit| *bit != value));
                prop_assert_eq!(is_full(&bytes, &(at..at + len)), value);
                prop_assert_eq!(is_clear(&bytes, &(at..at + len)), !value);
                at += len;
            }
        }
    }

    #[test]
    fn a_range_falls_on_the_pages_that_hold_it() {
        let found: Vec<_> = pages(1 << 20, 32760..65540).collect();
        assert_eq!(
            found,
            [
                (1 << 20, 32760..32768),
                ((1 << 20) + PAGE, 0..32768),
                ((1 << 20) + 2 * PAGE, 0..4)
            ]
        );
    }
}
