//! Why a device cannot serve its queues.

/// A device could not start; the transport sets `DEVICE_NEEDS_RESET`.
#[derive(Debug, thiserror::Error)]
pub enum ActivateError {
    /// The driver has set up none of the queues, or not those that the device cannot do without.
    #[error("a queue that it needs is not ready")]
    NotReady,
    /// A ring is outside guest memory, or not aligned.
    #[error("a ring is not where one can be")]
    Ring(#[source] virtio_queue::Error),
    /// The rings say that the device has buffers of which it knows nothing.
    #[error("requests are in flight already")]
    InFlight,
    /// The rings of a balloon say that the device keeps a statistics buffer, and its state does not say which.
    #[error("its statistics buffer is missing")]
    NoStatisticsBuffer,
    /// The host refuses what the features need.
    #[error("the host refuses to set {what}")]
    Host {
        /// What was to be set.
        what: &'static str,
        /// The host's error.
        source: std::io::Error,
    },
    /// The state of a balloon says that the device keeps a buffer, and its rings do not.
    #[error("it has a buffer of no queue")]
    StrayBuffer,
}
