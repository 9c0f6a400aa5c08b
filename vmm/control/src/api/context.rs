//! What a request acts on.

use std::sync::Arc;

use config::VmConfig;
use parking_lot::{Mutex, MutexGuard};

use crate::control::{Control, Guest, LaunchError, Origin};
use crate::metrics::ApiMetrics;

/// Builds a guest, and lets it run if it is new; on any thread but that of the event loop.
pub type Launch =
    Arc<dyn Fn(&VmConfig, Origin) -> Result<Box<dyn Guest>, LaunchError> + Send + Sync>;

/// What requests act on.
#[derive(Clone)]
pub(super) struct Context {
    pub(super) control: Arc<Mutex<Control>>,
    pub(super) metrics: Arc<ApiMetrics>,
    pub(super) launch: Launch,
    /// The longest body of a request, in bytes.
    pub(super) longest_body: usize,
}

impl Context {
    /// Locks the guest. A handler does so only once a request has been read and understood, and for that request alone.
    pub(super) fn control(&self) -> MutexGuard<'_, Control> {
        self.control.lock()
    }
}
