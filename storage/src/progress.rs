//! Progress of long operations, and how they are cancelled.

/// The observer of a long operation. Both methods are called often, from the thread that does the work, so they have to
/// be cheap.
pub trait Progress: Sync {
    /// `done` of `total` bytes (of the virtual disk or of the file, as the operation says) are behind.
    fn advance(&self, done: u64, total: u64);

    /// Whether the operation is to stop where it is; it then leaves every file as its own documentation says.
    fn is_cancelled(&self) -> bool;
}

/// No observer: nothing is shown, and nothing cancelled.
#[derive(Clone, Copy, Debug, Default)]
pub struct Unwatched;

impl Progress for Unwatched {
    fn advance(&self, _done: u64, _total: u64) {}

    fn is_cancelled(&self) -> bool {
        false
    }
}
