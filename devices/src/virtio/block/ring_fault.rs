//! What is wrong with a ring or with what the driver has put into it.

use super::super::chain::ChainError;

/// The driver broke a ring.
#[derive(Debug, thiserror::Error)]
pub(super) enum RingFault {
    #[error(transparent)]
    Queue(#[from] virtio_queue::Error),
    #[error(transparent)]
    Chain(#[from] ChainError),
    #[error("a request without a status byte")]
    NoStatus,
}
