//! The metadata that a guest can read about itself: Firecracker's microVM metadata service, asked over vsock.
//!
//! ```text
//! PUT, PATCH /mmds ──> Mmds (one JSON object, bounded) <── GET ── http <── vsock ── guest: CID 2, port 80
//! ```
//!
//! A guest has no network here, so that it connects to a port of its host, where its own VMM answers.

mod http;
mod metadata;

use std::sync::Arc;

use devices::virtio::vsock::{Service, Session};

pub use metadata::{MetadataFileError, Mmds, MmdsError};

/// Answers a guest's connections.
pub struct MmdsService {
    /// The metadata of the guest.
    pub metadata: Arc<Mmds>,
    /// Whether it answers in the format of IMDS alone, whatever the guest accepts.
    pub imds_compat: bool,
}

impl Service for MmdsService {
    fn open(&self) -> Box<dyn Session> {
        Box::new(http::Request::new(self.metadata.clone(), self.imds_compat))
    }
}
