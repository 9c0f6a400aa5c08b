//! What the process of a guest tells of the guest's memory, and how it is believed.
//!
//! ```text
//! address (u64, little-endian), 4096 bytes     for each page, from the first address to the last
//! BOOTED or NOT_BOOTED                         at the end
//! ```
//!
//! The guest's kernel may have taken over the process. So its answer decides about no more than the bytes of a file as
//! long as the guest's memory: a page that lies elsewhere, or before an earlier one, ends the reading.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use memshare::PAGE_SIZE;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// In place of an address: the guest has booted and powered off, and all of its pages have been told.
const BOOTED: u64 = u64::MAX;
/// In place of an address: the guest did not boot to its end.
const NOT_BOOTED: u64 = u64::MAX - 1;

/// Tells one page.
///
/// # Errors
/// The host's error.
pub(super) fn tell_page(to: &mut impl Write, address: u64, bytes: &[u8]) -> io::Result<()> {
    to.write_all(&address.to_le_bytes())?;
    to.write_all(bytes)
}

/// Tells how the guest has ended.
///
/// # Errors
/// The host's error.
pub(super) fn tell_end(to: &mut impl Write, has_booted: bool) -> io::Result<()> {
    let word = if has_booted { BOOTED } else { NOT_BOOTED };
    to.write_all(&word.to_le_bytes())?;
    to.flush()
}

/// What an answer says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// The guest has booted, and has this many pages of its own.
    Booted {
        /// The pages.
        pages: u64,
    },
    /// It did not boot to its end.
    NotBooted,
}

/// Why an answer is none.
#[derive(Debug, thiserror::Error)]
pub enum AnswerError {
    /// A page that the guest does not have, or not there.
    #[error(
        "it tells of a page at {address:#x}, which is no page of {ram:#x} bytes of memory, or comes before the one told last"
    )]
    Address {
        /// The address told.
        address: u64,
        /// The guest's memory in bytes.
        ram: u64,
    },
    /// The answer ends before its end is told.
    #[error("it ended before it had told all of the guest's memory")]
    Cut,
    /// The answer does not come.
    #[error("it has not told of the guest's memory in time")]
    Slow,
    /// The pipe, or the file, failed.
    #[error("pages that it tells cannot be kept")]
    Io(#[source] io::Error),
}

impl AnswerError {
    fn of_pipe(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::UnexpectedEof => Self::Cut,
            io::ErrorKind::TimedOut => Self::Slow,
            _ => Self::Io(error),
        }
    }
}

/// Reads an answer of a guest with `ram` bytes of memory, and writes its pages to an empty file.
///
/// # Errors
/// [`AnswerError`]; what is in the file is then of no use.
pub(super) fn receive(from: &mut impl Read, ram: u64, image: &File) -> Result<Answer, AnswerError> {
    let mut word = [0; 8];
    let mut page = [0; PAGE_SIZE as usize];
    let (mut next, mut pages) = (0, 0);
    loop {
        from.read_exact(&mut word).map_err(AnswerError::of_pipe)?;
        let address = match u64::from_le_bytes(word) {
            NOT_BOOTED => return Ok(Answer::NotBooted),
            BOOTED => break,
            address => address,
        };
        if address < next || address >= ram || !address.is_multiple_of(PAGE_SIZE) {
            return Err(AnswerError::Address { address, ram });
        }
        from.read_exact(&mut page).map_err(AnswerError::of_pipe)?;
        image
            .write_all_at(&page, address)
            .map_err(AnswerError::Io)?;
        // It is below `ram`, so that this does not overflow.
        next = address + PAGE_SIZE;
        pages += 1;
    }
    image.set_len(ram).map_err(AnswerError::Io)?;
    Ok(Answer::Booted { pages })
}

/// A pipe that is read until a moment, and no longer.
pub(super) struct Until<P> {
    pipe: P,
    end: Instant,
}

impl<P: Read + AsFd> Until<P> {
    pub(super) fn new(pipe: P, patience: Duration) -> Self {
        Self {
            pipe,
            end: Instant::now() + patience,
        }
    }
}

impl<P: Read + AsFd> Read for Until<P> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let left = self.end.saturating_duration_since(Instant::now());
        let timeout = Timespec::try_from(left).map_err(io::Error::other)?;
        let mut ready = [PollFd::new(&self.pipe, PollFlags::IN)];
        if rustix::io::retry_on_intr(|| poll(&mut ready, Some(&timeout)))? == 0 {
            return Err(io::ErrorKind::TimedOut.into());
        }
        self.pipe.read(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RAM: u64 = 4 * PAGE_SIZE;
    const PAGE: [u8; PAGE_SIZE as usize] = [7; PAGE_SIZE as usize];

    fn answer(pages: &[u64], end: Option<bool>) -> Vec<u8> {
        let mut bytes = Vec::new();
        for address in pages {
            tell_page(&mut bytes, *address, &PAGE).unwrap();
        }
        if let Some(has_booted) = end {
            tell_end(&mut bytes, has_booted).unwrap();
        }
        bytes
    }

    fn received(mut bytes: &[u8]) -> (Result<Answer, AnswerError>, u64, File) {
        let image = tempfile::tempfile().unwrap();
        let answer = receive(&mut bytes, RAM, &image);
        (answer, image.metadata().unwrap().len(), image)
    }

    #[test]
    fn each_page_is_at_its_address_and_the_rest_is_a_hole() {
        let (answer, len, image) = received(&answer(&[PAGE_SIZE, 3 * PAGE_SIZE], Some(true)));
        assert_eq!(answer.unwrap(), Answer::Booted { pages: 2 });
        assert_eq!(len, RAM);
        let mut bytes = vec![0; RAM as usize];
        image.read_exact_at(&mut bytes, 0).unwrap();
        let expected = [[0; PAGE_SIZE as usize], PAGE, [0; PAGE_SIZE as usize], PAGE];
        assert_eq!(bytes, expected.concat());
        assert_eq!(
            received(&self::answer(&[], Some(false))).0.unwrap(),
            Answer::NotBooted
        );
    }

    #[test]
    fn a_page_that_the_guest_does_not_have_ends_the_reading_and_lengthens_no_file() {
        for pages in [
            &[RAM][..],
            &[u64::MAX - 2],
            &[1 << 62],
            &[1],
            &[PAGE_SIZE - 8],
            &[0, 0],
            &[2 * PAGE_SIZE, PAGE_SIZE],
            // As many as there are, and one more.
            &[0, PAGE_SIZE, 2 * PAGE_SIZE, 3 * PAGE_SIZE, 0],
        ] {
            let (answer, len, _) = received(&answer(pages, Some(true)));
            let address = *pages.last().unwrap();
            assert!(
                matches!(answer, Err(AnswerError::Address { address: at, .. }) if at == address),
                "{pages:x?}: {answer:?}"
            );
            assert!(len <= RAM, "{pages:x?}: {len}");
        }
    }

    #[test]
    fn an_answer_that_is_cut_anywhere_is_none() {
        let whole = answer(&[0, PAGE_SIZE], Some(true));
        for len in (0..whole.len()).step_by(511).chain([whole.len() - 1]) {
            let (answer, ..) = received(&whole[..len]);
            assert!(matches!(answer, Err(AnswerError::Cut)), "{len}: {answer:?}");
        }
    }

    #[test]
    fn an_answer_that_does_not_come_is_not_waited_for() {
        let (reader, _writer) = io::pipe().unwrap();
        let image = tempfile::tempfile().unwrap();
        let mut pipe = Until::new(reader, Duration::from_millis(20));
        let answer = receive(&mut pipe, RAM, &image);
        assert!(matches!(answer, Err(AnswerError::Slow)), "{answer:?}");
    }
}
