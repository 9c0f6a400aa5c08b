//! How a disk is to be opened, whatever its format.

use std::path::PathBuf;

use crate::lock::OpenMode;

/// The format of a disk's file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// The file is the disk.
    Raw,
    /// [MS-VHDX].
    Vhdx,
}

/// What a disk may be in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FileKinds {
    /// A regular file.
    #[default]
    Regular,
    /// A regular file, or a block device of the host, which is a raw disk.
    RegularAndBlock,
}

/// How to open a disk.
#[derive(Clone, Debug)]
pub struct OpenOptions {
    /// Open for reading alone; the file is shared with other readers and never written.
    pub read_only: bool,
    /// The format. `None` looks for signatures: it knows VHDX, refuses the containers of other formats, and takes
    /// everything else as raw. Right for files that their owner made, but name the format of a raw disk that a
    /// guest can write, since the guest decides what its first bytes look like. A disk that was taken for raw refuses
    /// the writes by which it would be taken for something else.
    pub format: Option<Format>,
    /// Where the parents of a differencing disk may lie.
    pub parents: Parents,
    /// Read a child whose parent has changed since it was made. What is read may never have been on the disk. Only with
    /// `read_only`.
    pub ignore_changed_parents: bool,
    /// Give space that is freed back to the host at once, rather than keep it for the next block.
    pub punch_holes: bool,
    /// What the disk may be in; its parents are regular files.
    pub kinds: FileKinds,
}

impl Default for OpenOptions {
    fn default() -> Self {
        Self {
            read_only: false,
            format: None,
            parents: Parents::default(),
            ignore_changed_parents: false,
            punch_holes: true,
            kinds: FileKinds::default(),
        }
    }
}

impl From<OpenMode> for OpenOptions {
    fn from(mode: OpenMode) -> Self {
        Self {
            read_only: mode.is_read_only(),
            ..Self::default()
        }
    }
}

impl OpenOptions {
    /// To open for reading alone.
    pub fn read_only() -> Self {
        Self {
            read_only: true,
            ..Self::default()
        }
    }

    /// What these options open a file for.
    pub fn mode(&self) -> OpenMode {
        if self.read_only {
            OpenMode::ReadOnly
        } else {
            OpenMode::ReadWrite
        }
    }
}

/// Where the parents of a differencing disk may lie. The disk's own file says which files they are, so whoever made it
/// could name any file of the host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Parents {
    /// Anywhere: for disks of an owner who is trusted.
    #[default]
    Anywhere,
    /// In this folder or below, links followed.
    Within(PathBuf),
    /// A disk with a parent is refused.
    Nowhere,
}
