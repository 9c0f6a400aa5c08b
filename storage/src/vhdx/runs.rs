//! Sets of ranges of the file.

use std::collections::BTreeMap;

/// Ranges that do not touch: length by offset, in bytes.
#[derive(Debug, Default)]
pub(super) struct Runs {
    by_offset: BTreeMap<u64, u64>,
}

impl Runs {
    /// Adds a range that shares nothing with the set.
    pub(super) fn add(&mut self, offset: u64, len: u64) {
        if len == 0 {
            return;
        }
        let (mut start, mut end) = (offset, offset + len);
        if let Some((before, before_len)) = self.by_offset.range(..offset).next_back()
            && before + before_len == offset
        {
            start = *before;
        }
        if let Some(after_len) = self.by_offset.remove(&end) {
            end += after_len;
        }
        self.by_offset.insert(start, end - start);
    }

    /// Takes `len` bytes from the lowest range that has them in one piece.
    pub(super) fn take(&mut self, len: u64) -> Option<u64> {
        let (offset, held) = self
            .by_offset
            .iter()
            .find(|(_, held)| **held >= len)
            .map(|(offset, held)| (*offset, *held))?;
        self.by_offset.remove(&offset);
        if held > len {
            self.by_offset.insert(offset + len, held - len);
        }
        Some(offset)
    }

    /// Takes a range out, if the set has all of it.
    pub(super) fn remove(&mut self, offset: u64, len: u64) -> bool {
        let Some((start, held)) = self
            .by_offset
            .range(..=offset)
            .next_back()
            .map(|(start, held)| (*start, *held))
        else {
            return false;
        };
        let (run_end, end) = (start + held, offset + len);
        if end > run_end {
            return false;
        }
        self.by_offset.remove(&start);
        if offset > start {
            self.by_offset.insert(start, offset - start);
        }
        if run_end > end {
            self.by_offset.insert(end, run_end - end);
        }
        true
    }

    /// Takes the range that ends at `end` out, if there is one; gives its offset.
    pub(super) fn take_last(&mut self, end: u64) -> Option<u64> {
        let (offset, len) = self
            .by_offset
            .range(..end)
            .next_back()
            .map(|(offset, len)| (*offset, *len))?;
        if offset + len != end {
            return None;
        }
        self.by_offset.remove(&offset);
        Some(offset)
    }

    /// The offset of the lowest range of at least `len` bytes that ends no later than `end`.
    pub(super) fn lowest(&self, len: u64, end: u64) -> Option<u64> {
        self.by_offset
            .range(..end)
            .find(|(offset, held)| **held >= len && **offset + len <= end)
            .map(|(offset, _)| *offset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_join_and_split() {
        let mut runs = Runs::default();
        runs.add(10, 5);
        runs.add(20, 5);
        assert_eq!(runs.take(6), None);
        runs.add(15, 5);
        assert_eq!(runs.lowest(15, 25), Some(10));
        assert_eq!(runs.lowest(15, 24), None);
        assert!(runs.remove(12, 3) && !runs.remove(12, 1) && !runs.remove(14, 2));
        assert_eq!(runs.take(2), Some(10));
        assert_eq!(runs.take_last(25), Some(15));
        assert_eq!(runs.take(1), None);
    }
}
