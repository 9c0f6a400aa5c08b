//! A file or folder of the host that a guest needs, and for what.

use std::path::PathBuf;

/// What is done with a file or folder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// It is read.
    Read,
    /// It is read and written; in a folder, files come and go.
    Write,
    /// It is a device.
    Device,
    /// A file in it is removed at the end.
    Remove,
    /// It is a socket that is connected to.
    Connect,
}

/// A file or folder that a guest needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Need {
    /// Where it is on the host.
    pub source: PathBuf,
    /// Where the guest process looks for it.
    pub target: PathBuf,
    /// What is done with it.
    pub access: Access,
    /// What the guest has to be able to do with it, to start.
    pub vital: Option<Access>,
}
