//! Locks that keep two processes from writing one disk.
//!
//! The locks are those of the open file description (`F_OFD_SETLK`), so they go with the last copy of
//! the descriptor, whatever thread or process holds it. A writer locks the whole file for itself. A reader
//! takes shared locks on the bytes that QEMU's `file-posix` driver gives a meaning, so that QEMU and this
//! crate respect each other: both may read one file, neither writes what the other has open.
//!
//! | holder | bytes | kind |
//! |---|---|---|
//! | a writer of this crate | all | exclusive |
//! | a reader of this crate | 100, 201, 203 | shared |
//! | a guardian of readers | 100, 201, 203 | shared |
//! | | 300 | exclusive |
//! | a writer of QEMU | 100, 101, 103, and what it keeps from others of 200 to 203 | shared |
//!
//! So who has a file open for reading can keep others out: its shared locks keep writers out, as they should, and a
//! shared lock on byte 101 or 103, which any reader can take, looks like a writer of QEMU and keeps all other readers
//! out. An exclusive lock it cannot take, as the kernel wants a descriptor that is open for writing. Whoever answers
//! for a file that readers of different owners share, such as a daemon for its guests, guards it ([`guard`]): as long
//! as it does, readers know by byte 300 that nobody writes, and do not look for writers of QEMU.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// Byte that QEMU holds while it reads an image (100 + `BLK_PERM_CONSISTENT_READ`).
const READS: u64 = 100;
/// Bytes that QEMU holds while it may write or resize an image (100 + the bit of the permission).
const WRITES: [u64; 2] = [101, 103];
/// Bytes that QEMU holds while nobody else may write or resize the image (200 + the bit of the permission).
const KEEPS_WRITERS_OUT: [u64; 2] = [201, 203];

/// Byte that a guardian holds.
const GUARDED: u64 = 300;

/// What a disk is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OpenMode {
    /// For reading; others may read it too.
    ReadOnly,
    /// For reading and writing; nobody else has it open.
    ReadWrite,
}

impl OpenMode {
    /// Whether nothing may be written.
    pub fn is_read_only(self) -> bool {
        match self {
            Self::ReadOnly => true,
            Self::ReadWrite => false,
        }
    }
}

/// Why a file could not be locked.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Someone else writes the file.
    #[error("is in use for writing by another process")]
    Written,
    /// Someone else reads the file, so that it cannot be opened for writing.
    #[error("is in use for reading by another process")]
    Read,
    /// The host or the file system cannot lock the file.
    #[error("cannot be locked")]
    Host(#[source] io::Error),
}

#[derive(Clone, Copy)]
pub(crate) enum Kind {
    None,
    Shared,
    Exclusive,
}

impl Kind {
    #[allow(clippy::cast_possible_wrap)] // they are 0, 1 and 2
    fn raw(self) -> libc::c_short {
        match self {
            Self::None => libc::F_UNLCK as libc::c_short,
            Self::Shared => libc::F_RDLCK as libc::c_short,
            Self::Exclusive => libc::F_WRLCK as libc::c_short,
        }
    }
}

/// Locks `file` for `mode`, without waiting. The lock goes when the last copy of the descriptor is closed.
///
/// # Errors
/// `Written` or `Read` says what the other holder does with the file; `Host` where the file system has no locks.
pub fn lock(file: &File, mode: OpenMode) -> Result<(), LockError> {
    match mode {
        OpenMode::ReadWrite => {
            // Length zero reaches to the end of the file, however far that moves.
            if !set(file, Kind::Exclusive, 0, 0)? {
                return Err(holder(file)?);
            }
        }
        OpenMode::ReadOnly => {
            for byte in [READS].into_iter().chain(KEEPS_WRITERS_OUT) {
                if !set(file, Kind::Shared, byte, 1)? {
                    return Err(LockError::Written);
                }
            }
            // QEMU's writers hold shared locks only; they are seen by asking.
            if !is_guarded(file)? && is_written_by_qemu(file)? {
                return Err(LockError::Written);
            }
        }
    }
    Ok(())
}

/// Answers for a file that is open for writing, and that others have open for reading: nobody writes it until the last
/// copy of the descriptor is closed, and no reader can keep another one out. The caller knows that nobody writes it
/// now. False, with nothing locked, where there is a writer, or another guardian.
///
/// # Errors
/// `Host`: also where the file is open for reading alone.
pub fn guard(file: &File) -> Result<bool, LockError> {
    if !set(file, Kind::Exclusive, GUARDED, 1)? {
        return Ok(false);
    }
    for byte in [READS].into_iter().chain(KEEPS_WRITERS_OUT) {
        if !set(file, Kind::Shared, byte, 1)? {
            unlock(file)?;
            return Ok(false);
        }
    }
    Ok(true)
}

/// Whether somebody answers for the readers of a file, on which the caller has a reader's locks: so what holds that
/// byte is no writer.
fn is_guarded(file: &File) -> Result<bool, LockError> {
    Ok(conflict(file, Kind::Shared, GUARDED, 1)?.is_some())
}

/// Turns the lock of a writer into that of a reader; nobody else can get in between.
///
/// # Errors
/// `Host`.
pub(crate) fn share(file: &File) -> Result<(), LockError> {
    set(file, Kind::Shared, 0, 0)?;
    let mut kept: Vec<u64> = [READS].into_iter().chain(KEEPS_WRITERS_OUT).collect();
    kept.sort_unstable();
    let mut from = 0;
    for byte in kept {
        set(file, Kind::None, from, byte - from)?;
        from = byte + 1;
    }
    set(file, Kind::None, from, 0)?;
    Ok(())
}

/// Gives all locks up.
///
/// # Errors
/// `Host`.
pub(crate) fn unlock(file: &File) -> Result<(), LockError> {
    set(file, Kind::None, 0, 0).map(drop)
}

fn holder(file: &File) -> Result<LockError, LockError> {
    if is_written_by_qemu(file)? {
        return Ok(LockError::Written);
    }
    // A writer is in the way of a reader, and a guardian is not. A holder that let go in between was in the way all the
    // same.
    Ok(match conflict(file, Kind::Shared, READS, 1)? {
        Some(_) => LockError::Written,
        None => LockError::Read,
    })
}

fn is_written_by_qemu(file: &File) -> Result<bool, LockError> {
    for byte in WRITES {
        if conflict(file, Kind::Exclusive, byte, 1)?.is_some() {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Takes a lock; false where another holder is in the way.
pub(crate) fn set(file: &File, kind: Kind, start: u64, len: u64) -> Result<bool, LockError> {
    match fcntl(file, libc::F_OFD_SETLK, kind, start, len) {
        Ok(_) => Ok(true),
        Err(e) if matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => Ok(false),
        Err(e) => Err(LockError::Host(e)),
    }
}

/// The lock of another holder that is in the way of `kind`.
pub(crate) fn conflict(
    file: &File,
    kind: Kind,
    start: u64,
    len: u64,
) -> Result<Option<Kind>, LockError> {
    let found = fcntl(file, libc::F_OFD_GETLK, kind, start, len).map_err(LockError::Host)?;
    Ok(match libc::c_int::from(found.l_type) {
        libc::F_UNLCK => None,
        libc::F_WRLCK => Some(Kind::Exclusive),
        _ => Some(Kind::Shared),
    })
}

#[allow(clippy::cast_possible_wrap)] // the constants are small, and byte numbers less than 2^63
fn fcntl(
    file: &File,
    command: libc::c_int,
    kind: Kind,
    start: u64,
    len: u64,
) -> io::Result<libc::flock> {
    let mut lock = libc::flock {
        l_type: kind.raw(),
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: start as libc::off_t,
        l_len: len as libc::off_t,
        // Zero is what the kernel demands for locks of an open file description.
        l_pid: 0,
    };
    // SAFETY: `file` keeps the descriptor open for the call, both commands take a pointer to a `flock`, and `lock`
    // lives on this stack for the whole call.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), command, &raw mut lock) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(lock)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn opened(path: &std::path::Path) -> File {
        File::options().read(true).write(true).open(path).unwrap()
    }

    #[test]
    fn readers_share_and_keep_a_writer_out() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let (first, second, writer) = (
            opened(file.path()),
            opened(file.path()),
            opened(file.path()),
        );
        lock(&first, OpenMode::ReadOnly).unwrap();
        lock(&second, OpenMode::ReadOnly).unwrap();
        assert!(matches!(
            lock(&writer, OpenMode::ReadWrite),
            Err(LockError::Read)
        ));
        drop(first);
        drop(second);
        lock(&writer, OpenMode::ReadWrite).unwrap();
    }

    #[test]
    fn a_writer_that_becomes_a_reader_shares_and_can_become_a_writer_again() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let (first, second) = (opened(file.path()), opened(file.path()));
        lock(&first, OpenMode::ReadWrite).unwrap();
        share(&first).unwrap();
        lock(&second, OpenMode::ReadOnly).unwrap();
        assert!(matches!(
            lock(&first, OpenMode::ReadWrite),
            Err(LockError::Read)
        ));
        unlock(&second).unwrap();
        lock(&first, OpenMode::ReadWrite).unwrap();
        assert!(matches!(
            lock(&second, OpenMode::ReadOnly),
            Err(LockError::Written)
        ));
    }

    #[test]
    fn a_writer_keeps_everyone_out_until_its_last_descriptor_is_closed() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let writer = opened(file.path());
        lock(&writer, OpenMode::ReadWrite).unwrap();
        let copy = writer.try_clone().unwrap();
        drop(writer);
        let other = opened(file.path());
        assert!(matches!(
            lock(&other, OpenMode::ReadOnly),
            Err(LockError::Written)
        ));
        assert!(matches!(
            lock(&other, OpenMode::ReadWrite),
            Err(LockError::Written)
        ));
        drop(copy);
        lock(&other, OpenMode::ReadOnly).unwrap();
    }

    #[test]
    fn a_guarded_file_is_read_whatever_its_readers_lock_and_written_by_nobody() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let reading = || File::open(file.path()).unwrap();
        let (hostile, next, guardian) = (reading(), reading(), opened(file.path()));
        guard(&reading()).unwrap_err();
        lock(&hostile, OpenMode::ReadOnly).unwrap();
        assert!(set(&hostile, Kind::Shared, WRITES[0], 1).unwrap());
        lock(&next, OpenMode::ReadOnly).unwrap_err();
        unlock(&next).unwrap();
        assert!(guard(&guardian).unwrap());
        lock(&next, OpenMode::ReadOnly).unwrap();
        // There is one guardian, and no reader can pass for it.
        assert!(!guard(&opened(file.path())).unwrap());
        assert!(!set(&hostile, Kind::Shared, GUARDED, 1).unwrap());
        unlock(&hostile).unwrap();
        unlock(&next).unwrap();
        let writer = opened(file.path());
        let refused = lock(&writer, OpenMode::ReadWrite);
        assert!(matches!(refused, Err(LockError::Read)), "{refused:?}");
        drop(guardian);
        lock(&writer, OpenMode::ReadWrite).unwrap();
        assert!(!guard(&opened(file.path())).unwrap());
        let refused = lock(&next, OpenMode::ReadOnly);
        assert!(matches!(refused, Err(LockError::Written)), "{refused:?}");
    }

    #[test]
    fn a_reader_can_pass_for_a_writer_of_qemu_and_takes_no_exclusive_lock() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let reading = || File::open(file.path()).unwrap();
        let (first, hostile, next) = (reading(), reading(), reading());
        lock(&first, OpenMode::ReadOnly).unwrap();
        lock(&hostile, OpenMode::ReadOnly).unwrap();
        assert!(set(&hostile, Kind::Exclusive, 0, 0).is_err());
        for byte in WRITES {
            assert!(set(&hostile, Kind::Shared, byte, 1).unwrap());
            assert!(matches!(
                lock(&next, OpenMode::ReadOnly),
                Err(LockError::Written)
            ));
            unlock(&next).unwrap();
            set(&hostile, Kind::None, byte, 1).unwrap();
            lock(&next, OpenMode::ReadOnly).unwrap();
            unlock(&next).unwrap();
        }
        // It lasts no longer than its holder.
        assert!(set(&hostile, Kind::Shared, WRITES[0], 1).unwrap());
        drop(hostile);
        lock(&next, OpenMode::ReadOnly).unwrap();
    }
}
