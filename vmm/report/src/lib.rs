//! The one reporter of errors: an error and its sources in one line.
//!
//! `Display` of an error says what was being done, and never repeats its source; so whoever shows an error to a person
//! (`main`, the log, the body of a refused request) shows it by [`chain`]. `tests/tree` holds every crate to that.
//!
//! The crate depends on nothing, so that those at the bottom, which know nothing of each other, log errors by it too.

use std::error::Error;
use std::fmt::{self, Display, Formatter};

/// An error and all its sources, the outermost first, with `: ` between them.
///
/// Errors of other crates may repeat their source, so a source whose words the text ends with already is not shown
/// twice.
pub fn chain(error: &dyn Error) -> impl Display {
    Chain(error)
}

struct Chain<'a>(&'a dyn Error);

impl Display for Chain<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let mut shown = self.0.to_string();
        f.write_str(&shown)?;
        let mut next = self.0.source();
        while let Some(source) = next {
            let text = source.to_string();
            if !shown.ends_with(&text) {
                write!(f, ": {text}")?;
                shown = text;
            }
            next = source.source();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("drive {drive}")]
    struct DriveError {
        drive: &'static str,
        source: io::Error,
    }

    #[derive(Debug, thiserror::Error)]
    #[error("the snapshot: {0}")]
    struct Repeating(#[source] DriveError);

    #[test]
    fn the_errno_at_the_end_of_a_chain_is_shown_once() {
        let source = io::Error::from_raw_os_error(libc::EMFILE);
        let expected = format!("drive root: {source}");
        assert!(expected.ends_with("(os error 24)"), "{expected}");
        let error = DriveError {
            drive: "root",
            source,
        };
        assert_eq!(chain(&error).to_string(), expected);
        let repeating = Repeating(error);
        assert_eq!(
            chain(&repeating).to_string(),
            format!("the snapshot: {expected}")
        );
    }
}
