//! The other files that a source names: backing files, files with its data, extents.
//!
//! A source says by itself which files it is made of, and whoever made it could name any file of the host. So nothing
//! is followed unless the caller says so and has named the format: the signature of a raw disk is what its guest wrote.
//! What is followed lies in one folder or below, is a regular file, and is not on the way to itself.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{Mode, OFlags, ResolveFlags};

use super::source::{MAX_DEPTH, NotFollowed, SourceError};
use crate::file::check_kind;
use crate::lock::{self, OpenMode};
use crate::refusal::Refusal;
use crate::signature::SourceFormat;

/// Where the files lie that a source may name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Backing {
    /// In the folder of the source or below.
    Beside,
    /// In this folder or below.
    Within(PathBuf),
}

/// What the caller has allowed.
#[derive(Debug)]
pub(super) enum NamedFiles {
    /// Nothing is opened: the format was guessed to be this.
    Guessed(SourceFormat),
    /// Nothing is opened: nobody asked for it.
    NotAsked,
    /// What lies in a folder or below.
    Below {
        /// Its path without links.
        path: PathBuf,
        folder: OwnedFd,
    },
}

/// A file that others stand on, as it was opened and without links in its path.
#[derive(Clone, Debug)]
struct Link {
    identity: (u64, u64),
    path: PathBuf,
}

/// The files from a source down to the one that was opened last.
#[derive(Clone, Debug)]
pub(super) struct Chain(Vec<Link>);

fn identity(file: &File) -> io::Result<(u64, u64)> {
    let metadata = file.metadata()?;
    Ok((metadata.dev(), metadata.ino()))
}

impl Chain {
    /// The chain of a source that names nothing yet.
    pub(super) fn new(path: &Path, file: &File) -> Result<Self, SourceError> {
        let found = || -> io::Result<Link> {
            Ok(Link {
                identity: identity(file)?,
                path: path.canonicalize()?,
            })
        };
        let first = found().map_err(|e| SourceError::io("find the file", e))?;
        Ok(Self(vec![first]))
    }

    /// The folder that names are relative to.
    fn folder(&self) -> &Path {
        self.0
            .last()
            .and_then(|last| last.path.parent())
            .unwrap_or(Path::new("/"))
    }

    /// Goes on with a file that the last one names.
    pub(super) fn push(&mut self, named: Named) -> Arc<File> {
        self.0.push(named.link);
        named.file
    }
}

/// A file that was named, and is open and locked for reading.
#[derive(Debug)]
pub(super) struct Named {
    link: Link,
    pub(super) file: Arc<File>,
}

impl NamedFiles {
    /// What a caller allows a source, of which the format is given or guessed, and whose files begin with `chain`.
    pub(super) fn new(
        format: SourceFormat,
        is_guessed: bool,
        backing: Option<&Backing>,
        chain: &Chain,
    ) -> Result<Self, SourceError> {
        let path = match backing {
            _ if is_guessed => return Ok(Self::Guessed(format)),
            None => return Ok(Self::NotAsked),
            Some(Backing::Beside) => chain.folder(),
            Some(Backing::Within(folder)) => folder,
        };
        let opened = || -> io::Result<(PathBuf, OwnedFd)> {
            let path = path.canonicalize()?;
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let folder = rustix::fs::open(&path, flags, Mode::empty())?;
            Ok((path, folder))
        };
        let (path, folder) = opened()
            .map_err(|e| SourceError::io(format!("open the folder {}", path.display()), e))?;
        Ok(Self::Below { path, folder })
    }

    /// Opens what the last file of a chain calls `name`.
    pub(super) fn open(
        &self,
        chain: &Chain,
        what: &'static str,
        name: &str,
    ) -> Result<Named, SourceError> {
        self.find(chain, name).map_err(|reason| SourceError::Named {
            what,
            name: name.to_owned(),
            reason,
        })
    }

    fn find(&self, chain: &Chain, name: &str) -> Result<Named, NotFollowed> {
        let (allowed, folder) = match self {
            Self::Guessed(format) => return Err(NotFollowed::Guessed { format: *format }),
            Self::NotAsked => return Err(NotFollowed::NotAsked),
            Self::Below { path, folder } => (path, folder),
        };
        if chain.0.len() > MAX_DEPTH {
            return Err(NotFollowed::TooDeep);
        }
        let failed = |e| NotFollowed::from(Refusal::io("open the file", e));
        let path = chain.folder().join(name).canonicalize().map_err(failed)?;
        let Ok(inside) = path.strip_prefix(allowed) else {
            return Err(NotFollowed::Outside {
                found: path,
                folder: allowed.clone(),
            });
        };
        let inside = if inside.as_os_str().is_empty() {
            Path::new(".")
        } else {
            inside
        };
        let file = open_below(folder, inside)?;
        let identity = identity(&file).map_err(failed)?;
        if let Some(other) = chain.0.iter().find(|link| link.identity == identity) {
            return Err(NotFollowed::Circle(other.path.clone()));
        }
        lock::lock(&file, OpenMode::ReadOnly).map_err(Refusal::Locked)?;
        Ok(Named {
            link: Link { identity, path },
            file: Arc::new(file),
        })
    }
}

/// Opens a regular file by its path from a folder. That has no links: one that was put there since leads nowhere.
fn open_below(folder: &OwnedFd, inside: &Path) -> Result<File, NotFollowed> {
    let opened = |flags: OFlags| -> Result<File, NotFollowed> {
        let within = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
        let flags = flags | OFlags::CLOEXEC;
        let failed = |e| NotFollowed::from(Refusal::io("open the file", e));
        let file = rustix::fs::openat2(folder, inside, flags, Mode::empty(), within)
            .map_err(|e| failed(e.into()))?;
        let file = File::from(file);
        let metadata = file.metadata().map_err(failed)?;
        check_kind(metadata.file_type())?;
        Ok(file)
    };
    // Looked at before it is opened, because opening a device can have effects of its own, and after, because the name
    // may have come to mean another file. Neither waits for the other end of a FIFO.
    opened(OFlags::PATH)?;
    opened(OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY)
}
