//! Pages on their way back to the host.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use vm_memory::{GuestAddress, GuestMemoryBackend};

use super::super::chain::{self, Segment};
use super::metrics::Returned;
use crate::GuestMemory;
use crate::metrics::add;

/// Gives a range of whole pages inside guest RAM back to the host, at once: its address and its length in bytes.
///
/// What the pages hold afterwards is not defined, and the guest does not rely on it. Called on the device thread, and
/// on the threads of vCPUs, one call at a time for each device.
pub type GiveBack = Arc<dyn Fn(GuestAddress, u64) -> io::Result<()> + Send + Sync>;

/// Bytes of a page, whatever the guest's own pages are (5.5.6).
pub(super) const PAGE: u64 = 4096;
/// Most page numbers that are taken from one buffer. Linux sends at most 256; of a longer buffer the rest stays with
/// the guest's RAM.
pub(super) const MAX_PFNS: usize = 1024;
/// A range of this many bytes counts as much work as a page does: a page table of the host.
const TABLE: u64 = 2 << 20;

/// Sorts ranges and joins those that touch or overlap.
fn joined(mut ranges: Vec<Range<u64>>) -> Vec<Range<u64>> {
    ranges.sort_unstable_by_key(|range| range.start);
    let mut joined: Vec<Range<u64>> = Vec::new();
    for range in ranges {
        match joined.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            Some(_) | None => joined.push(range),
        }
    }
    joined
}

fn give(give_back: &GiveBack, ranges: Vec<Range<u64>>, returned: &Returned) {
    for range in joined(ranges) {
        let len = range.end - range.start;
        match give_back(GuestAddress(range.start), len) {
            Ok(()) => {
                add(&returned.ranges, 1);
                add(&returned.bytes, len);
            }
            Err(error) => {
                // The guest could make any number of these lines.
                tracing::debug!(error = %report::chain(&error), address = range.start, len, "memory cannot be given back");
                add(&returned.failures, 1);
            }
        }
    }
}

/// Gives back the pages whose numbers are in `segments`; returns how much work it was.
pub(super) fn give_numbered(
    give_back: &GiveBack,
    memory: &GuestMemory,
    segments: &[Segment],
    returned: &Returned,
) -> u64 {
    let len = chain::total_len(segments);
    let taken = (len / 4).min(MAX_PFNS as u64) as usize;
    if taken as u64 * 4 != len {
        add(&returned.failures, 1);
    }
    let mut bytes = vec![0; taken * 4];
    if chain::read(memory, segments, &mut bytes).is_err() {
        // The segments were checked to lie in memory that does not go.
        return 0;
    }
    let (numbers, _) = bytes.as_chunks::<4>();
    let mut pages = Vec::with_capacity(taken);
    for number in numbers {
        let start = u64::from(u32::from_le_bytes(*number)) * PAGE;
        if memory.check_range(GuestAddress(start), PAGE as usize) {
            pages.push(start..start + PAGE);
        } else {
            add(&returned.failures, 1);
        }
    }
    give(give_back, pages, returned);
    taken as u64
}

/// Gives back the whole pages of `segments`, which lie in guest memory; returns how much work it was.
pub(super) fn give_segments(
    give_back: &GiveBack,
    segments: &[Segment],
    returned: &Returned,
) -> u64 {
    let whole = |segment: &Segment| {
        let end = segment.address.0 + u64::from(segment.len);
        segment.address.0.next_multiple_of(PAGE)..end - end % PAGE
    };
    let ranges: Vec<_> = segments
        .iter()
        .map(whole)
        .filter(|range| range.start < range.end)
        .collect();
    let work = segments
        .iter()
        .map(|segment| 1 + u64::from(segment.len) / TABLE)
        .sum();
    give(give_back, ranges, returned);
    work
}
