//! A service for the guest within this process.

/// Something that guests connect to, other than a socket of the host.
pub trait Service: Send + Sync {
    /// A guest has connected.
    fn open(&self) -> Box<dyn Session>;
}

/// One connection of a guest. What it keeps is bounded, whatever the guest sends: the guest sends as much as it likes.
pub trait Session: Send {
    /// The guest has sent these bytes.
    fn receive(&mut self, bytes: &[u8]);

    /// Takes what is to be sent next into `buffer`, and says how much that is: 0 where there is nothing more to come,
    /// `None` where there is nothing yet.
    fn send(&mut self, buffer: &mut [u8]) -> Option<usize>;
}
