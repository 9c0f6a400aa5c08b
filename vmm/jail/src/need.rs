//! A file or folder of the host that a guest needs, and how it is used.

use std::path::PathBuf;

/// How a file or folder is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// It is read.
    Read,
    /// It is read and written; in a folder, files are also made and removed.
    Write,
    /// It is a device.
    Device,
    /// It is a folder in which a file is removed at the end.
    Remove,
    /// It is a socket that is connected to.
    Connect,
}

/// A file or folder that a guest needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Need {
    /// Where it is on the host.
    pub source: PathBuf,
    /// The path at which the guest process opens it.
    pub target: PathBuf,
    /// How it is used.
    pub access: Access,
    /// The access without which the guest cannot start.
    pub vital: Option<Access>,
}
