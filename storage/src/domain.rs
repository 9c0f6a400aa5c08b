//! Which guests may share the pages of a file: those of one domain.
//!
//! Guests of one domain hold one byte of the file with a shared lock, each domain another byte, out of a range that no
//! file reaches. So a guest sees whether guests of another domain have the file, and no process has to keep a list. The
//! range lies in what a writer locks for itself, and apart from the bytes that QEMU gives a meaning.

use std::fs::File;

use crate::lock::{Kind, LockError, conflict, set};

/// First byte of the range: 4 EiB, where no file system keeps data.
const START: u64 = 1 << 62;
/// Bytes of the range.
const LEN: u64 = 1 << 61;

/// A domain of guests, as it is seen in locks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Domain(u64);

impl Domain {
    /// The domain that a digest of its name stands for: of two that are alike in it, guests would be taken for those of
    /// one.
    pub fn new(digest: u64) -> Self {
        Self(START + digest % LEN)
    }

    /// Joins the guests that share a file, which is open and locked for reading. False, with no more locked than
    /// before, where guests of another domain have it; two that come at once may both be refused.
    ///
    /// # Errors
    /// `Host`.
    pub fn join(self, file: &File) -> Result<bool, LockError> {
        let (byte, end) = (self.0, START + LEN);
        if !set(file, Kind::Shared, byte, 1)? {
            return Ok(false);
        }
        // First the lock, then the look: of two that do both, one at least sees the other.
        for (from, to) in [(START, byte), (byte + 1, end)] {
            if from < to && conflict(file, Kind::Exclusive, from, to - from)?.is_some() {
                set(file, Kind::None, byte, 1)?;
                return Ok(false);
            }
        }
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lock::{OpenMode, lock};

    fn reader(path: &std::path::Path) -> File {
        let file = File::open(path).unwrap();
        lock(&file, OpenMode::ReadOnly).unwrap();
        file
    }

    #[test]
    fn a_file_is_shared_within_one_domain_at_a_time() {
        let named = tempfile::NamedTempFile::new().unwrap();
        let open = || reader(named.path());
        let (tenant, other) = (Domain::new(7), Domain::new(8));
        let (first, second, third) = (open(), open(), open());
        assert!(tenant.join(&first).unwrap() && tenant.join(&second).unwrap());
        assert!(!other.join(&third).unwrap());
        drop(first);
        assert!(!other.join(&third).unwrap(), "the second is still there");
        drop(second);
        assert!(other.join(&third).unwrap() && other.join(&third).unwrap());
        assert!(
            !tenant.join(&open()).unwrap(),
            "who was refused has left nothing behind"
        );
    }

    #[test]
    fn a_writer_and_those_who_share_keep_each_other_out() {
        let named = tempfile::NamedTempFile::new().unwrap();
        let sharing = File::open(named.path()).unwrap();
        for digest in [0, LEN - 1, u64::MAX] {
            assert!(Domain::new(digest).join(&sharing).unwrap());
            let writer = named.reopen().unwrap();
            let refused = lock(&writer, OpenMode::ReadWrite);
            assert!(matches!(refused, Err(LockError::Read)), "{digest:#x}");
            set(&sharing, Kind::None, 0, 0).unwrap();
            lock(&writer, OpenMode::ReadWrite).unwrap();
            assert!(!Domain::new(digest).join(&sharing).unwrap());
        }
    }
}
