//! The metadata that a guest can read about itself: Firecracker's microVM metadata service, asked over the guest's
//! network interfaces and over vsock.
//!
//! ```text
//! PUT, PATCH /mmds ──> Mmds (one JSON object, bounded) <── GET ── http <┬─ TCP ─── guest: 169.254.169.254
//!                                                                       └─ vsock ─ guest: CID 2, port 80
//! ```
//!
//! The guest's own process answers. Over a network interface the guest may have to show a token (version 2): a program
//! of the guest that fetches what others name cannot be made to ask for one. Nobody can have a program connect by vsock
//! so easily, and no token is needed there.

mod http;
mod metadata;
mod token;

use std::sync::Arc;

use devices::service::{Service, Session};

pub use http::Protocol;
pub use metadata::{MetadataFileError, Mmds, MmdsError};
pub use token::Tokens;

/// Answers a guest's connections.
pub struct MmdsService {
    /// The metadata of the guest.
    pub metadata: Arc<Mmds>,
    /// Whoever makes the tokens of version 2.
    pub tokens: Arc<Tokens>,
    /// How it answers.
    pub protocol: Protocol,
}

impl Service for MmdsService {
    fn open(&self) -> Box<dyn Session> {
        Box::new(http::Request::new(
            self.metadata.clone(),
            self.tokens.clone(),
            self.protocol,
        ))
    }
}
