//! How much a guest's process takes of its clients.

use config::limits::MAX_BODY;

/// How much a guest's process takes of its clients, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PayloadLimits {
    /// The longest body of a REST request.
    pub body: usize,
    /// The most metadata (MMDS), as JSON.
    pub metadata: usize,
}

impl Default for PayloadLimits {
    fn default() -> Self {
        Self {
            body: MAX_BODY,
            metadata: MAX_BODY,
        }
    }
}
