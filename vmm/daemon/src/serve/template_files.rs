//! The files of a template that is being made: copies in new inodes, none of which a guest's process has ever had.
//!
//! ```text
//! begin   the guest is paused, and saved: copies begun of its state, its memory, and each disk that it writes to,
//!         with the parents of that as far as a guest may write to them
//! lock    the disks have children: no commit writes to them while they are copied
//! fill    the guest goes on: bytes copied, parents moved, all durable
//! ```
//!
//! A disk names its parent, and who wrote the disk has chosen that. A parent is believed by the DataWriteGuid that its
//! file has ([MS-VHDX] 2.2.2), which only those know who were given the file; see [`jail::reader`]. It stays where it
//! is if no guest may write to it. Otherwise it is copied, too, or there is a copy of it already, in an earlier
//! template of the same guest; and the child, which is a copy as well, is changed to name that.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, Mode, OFlags, fstat, open};
use rustix::process::geteuid;
use sha2::{Digest, Sha256};

use super::disk_parent;
use super::file_copy::{CopyProgress, FileCopy};
use super::store::named;
use config::{DeviceId, Sha256Digest};
use host::shared_folder::open_beneath;
use jail::reader::ParentLink;
use storage::OpenMode;
use storage::lock::lock;

/// The most disks of a chain that are copied.
const DEEPEST: usize = 64;

/// Bits of a mode by which others than the owner write.
const OTHERS_WRITE: u32 = 0o022;

/// A device and an inode there: a file, whatever its name.
type Inode = (u64, u64);

/// What cannot be part of a template.
#[derive(Debug, thiserror::Error)]
pub enum TemplateFileError {
    /// It is something else.
    #[error("it is no regular file")]
    Kind,
    /// The parent is not where the disk says.
    #[error(
        "the parent that it names is at none of {0:?}, or has changed: mend it with coppice disk rebase"
    )]
    NoParent(Vec<PathBuf>),
    /// The chain goes on.
    #[error("it stands on more than {DEEPEST} disks in guests' folders: commit some of them")]
    TooDeep,
    /// It is the guest's own, and clones would have it where it is.
    #[error("it lies in the folder of a guest, which clones would read it from: put it elsewhere")]
    InGuestsFolder,
    /// The guest's process has changed it.
    #[error(
        "it names another parent than before: the process of the guest writes to it, although it has a child"
    )]
    Changed,
}

fn wrong(error: TemplateFileError) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

/// Where the files of guests are, and which of them guests may write to.
#[derive(Clone, Debug)]
pub struct Places {
    /// The folder of all guests' folders.
    pub vms: PathBuf,
    /// The folder of all templates.
    pub templates: PathBuf,
    /// What the operator lets all guests write to.
    pub allowed: Vec<PathBuf>,
    /// Disks that this guest has, or had.
    pub own_disks: Vec<PathBuf>,
    /// Folders of templates that were made of this guest, and have files that no guest's process had.
    pub earlier: Vec<PathBuf>,
    /// What clones have where it is: kernel, initrd, and disks that are only read.
    pub shared: Vec<PathBuf>,
    /// The user of the guest.
    pub uid: Option<u32>,
}

/// A disk, and what the copy of it is to name.
#[derive(Debug)]
struct DiskCopy {
    copy: FileCopy,
    /// The folder that the disk is copied from.
    folder: PathBuf,
    parent: Option<(ParentLink, PathBuf)>,
}

/// The files.
#[derive(Debug)]
pub struct TemplateFiles {
    folder: PathBuf,
    uid: Option<u32>,
    state: FileCopy,
    memory: FileCopy,
    disks: Vec<DiskCopy>,
    /// The copies of the uppermost disks, by drive.
    tops: BTreeMap<DeviceId, PathBuf>,
    stands_on: BTreeSet<String>,
}

/// The files, copied.
#[derive(Debug)]
pub struct FilledFiles {
    /// The digest of the state.
    pub state_sha256: Sha256Digest,
    /// Bytes that the memory takes on the host's disk.
    pub memory_bytes: u64,
    /// Whether all of them share their blocks with those that they were made of.
    pub is_reflink: bool,
}

impl TemplateFiles {
    /// Begins the copies in `folder`, which has no files yet, of the state and the memory in `saved` and of `disks`.
    /// Finds a full disk.
    ///
    /// # Errors
    /// The host's error, which names the file; or a [`TemplateFileError`].
    pub fn begin(
        folder: &Path,
        saved: &Path,
        disks: &BTreeMap<DeviceId, PathBuf>,
        places: &Places,
    ) -> io::Result<Self> {
        let begin = |name: &str| {
            let source = places.open(&saved.join(name))?;
            FileCopy::begin(source, &folder.join(name))
        };
        places.check_shared()?;
        let mut plan = Plan {
            places,
            folder,
            disks: Vec::new(),
            copied: BTreeMap::new(),
            stands_on: BTreeSet::new(),
        };
        let mut tops = BTreeMap::new();
        for (drive, disk) in disks {
            let source = places.open(disk)?;
            let copy = plan.add(source, disk, drive, 0)?;
            tops.insert(drive.clone(), copy);
        }
        Ok(Self {
            folder: folder.to_owned(),
            uid: places.uid,
            state: begin("state")?,
            memory: begin("memory")?,
            disks: plan.disks,
            tops,
            stands_on: plan.stands_on,
        })
    }

    /// The disks that each clone has a child of, by drive.
    pub fn tops(&self) -> &BTreeMap<DeviceId, PathBuf> {
        &self.tops
    }

    /// Other templates, on whose disks these stand.
    pub fn stands_on(&self) -> &BTreeSet<String> {
        &self.stands_on
    }

    /// Bytes of data that they have.
    pub fn bytes(&self) -> u64 {
        self.copies().map(FileCopy::bytes).sum()
    }

    /// Keeps writers away from the disks that are copied until the copies are filled.
    ///
    /// # Errors
    /// Where a process writes to one of them.
    pub fn lock(&self) -> io::Result<()> {
        self.disks.iter().try_for_each(|disk| {
            let locked = lock(disk.copy.source(), OpenMode::ReadOnly).map_err(io::Error::other);
            locked.map_err(named(disk.copy.path()))
        })
    }

    fn copies(&self) -> impl Iterator<Item = &FileCopy> {
        let disks = self.disks.iter().map(|disk| &disk.copy);
        [&self.state, &self.memory].into_iter().chain(disks)
    }

    /// Copies all bytes, and makes them durable, but for the names in the folder.
    ///
    /// # Errors
    /// The host's error, which names the file; or a [`TemplateFileError`].
    pub fn fill(&self, progress: &CopyProgress) -> io::Result<FilledFiles> {
        for copy in [&self.state, &self.memory] {
            copy.fill(progress)?;
            copy.finish(false)?;
        }
        for disk in &self.disks {
            disk.copy.fill(progress)?;
            disk.place(&self.folder, self.uid)?;
            disk.copy.finish(true)?;
        }
        Ok(FilledFiles {
            state_sha256: digest_of(self.state.path())?,
            memory_bytes: self.memory.allocated()?,
            is_reflink: self.copies().all(FileCopy::is_reflink),
        })
    }
}

impl DiskCopy {
    /// Has the copy name the place of its parent. Until it was copied, the guest's process may have changed it, so what
    /// it names is compared with what the place was found by.
    fn place(&self, folder: &Path, uid: Option<u32>) -> io::Result<()> {
        let (file, path) = (self.copy.file(), self.copy.path());
        // The paths that a child names are relative to its folder: it is read as if it lay where it lay.
        let found = disk_parent::named_by(file, &self.folder, uid).map_err(named(path))?;
        let (link, place) = self.parent.as_ref().map(|(l, p)| (l, p)).unzip();
        if found.as_ref() != link {
            return Err(named(path)(wrong(TemplateFileError::Changed)));
        }
        if let Some(place) = place {
            disk_parent::move_to(file, folder, uid, place).map_err(named(path))?;
        }
        Ok(())
    }
}

/// The digest of a file.
///
/// # Errors
/// The host's error, which names the file.
pub fn digest_of(path: &Path) -> io::Result<Sha256Digest> {
    let digest = || -> io::Result<Sha256Digest> {
        let (mut file, mut hash) = (File::open(path)?, Sha256::new());
        let mut buffer = vec![0; 64 << 10];
        loop {
            match file.read(&mut buffer)? {
                0 => return Ok(Sha256Digest::from(<[u8; 32]>::from(hash.finalize()))),
                count => hash.update(buffer.get(..count).unwrap_or_default()),
            }
        }
    };
    digest().map_err(named(path))
}

impl Places {
    /// The folder, or file, above which guests may replace nothing of a path, where they may replace what is below it.
    fn root_of<'a>(&'a self, path: &'a Path) -> Option<PathBuf> {
        if let Ok(inside) = path.strip_prefix(&self.vms) {
            return inside.components().next().map(|id| self.vms.join(id));
        }
        let mut roots = self.allowed.iter().filter(|root| path.starts_with(root));
        roots.next().cloned()
    }

    /// Checks that what clones have where it is lies in no guest's folder.
    fn check_shared(&self) -> io::Result<()> {
        self.shared.iter().try_for_each(|path| {
            // What is not there any more, no clone reads.
            let real = path.canonicalize();
            if real.is_ok_and(|real| real.starts_with(&self.vms)) {
                return Err(named(path)(wrong(TemplateFileError::InGuestsFolder)));
            }
            Ok(())
        })
    }

    /// Opens a file that the daemon's records name. Where a guest may replace it, or a folder that it is in, no link is
    /// followed.
    fn open(&self, path: &Path) -> io::Result<File> {
        let opened = || -> io::Result<File> {
            let root = self.root_of(path).filter(|root| root != path);
            let Some(root) = root else {
                let flags = if self.root_of(path).is_some() {
                    OFlags::NOFOLLOW
                } else {
                    OFlags::empty()
                };
                return regular(open(path, flags | HANDLE, Mode::empty())?);
            };
            let folder = open(
                &root,
                HANDLE | OFlags::DIRECTORY | OFlags::NOFOLLOW,
                Mode::empty(),
            )?;
            let inside = path.strip_prefix(&root).map_err(io::Error::other)?;
            regular(open_beneath(&folder, inside, HANDLE, Mode::empty())?)
        };
        opened().map_err(named(path))
    }

    /// Whether a guest may write to a file, or replace it, which has this path without links.
    fn may_be_written(&self, path: &Path, inode: Inode) -> bool {
        let is_own = |own: &PathBuf| own.metadata().is_ok_and(|found| inode_of(&found) == inode);
        // A guest without a user of its own has the rights of the daemon.
        let is_open = |root: &PathBuf| {
            path.starts_with(root) && (self.uid.is_none() || !is_closed(root, path))
        };
        path.starts_with(&self.vms)
            || self.allowed.iter().any(is_open)
            || self.own_disks.iter().any(is_own)
    }

    /// A copy of the file that a link is of, in an earlier template of the guest, and the name of that.
    fn earlier_copy(
        &self,
        link: &ParentLink,
        inode: Inode,
    ) -> io::Result<Option<(String, PathBuf)>> {
        for folder in &self.earlier {
            for entry in fs::read_dir(folder).map_err(named(folder))? {
                let path = entry?.path();
                let name = path.file_name().unwrap_or_default();
                if !name.as_encoded_bytes().starts_with(b"disk-") {
                    continue;
                }
                let file = File::open(&path).map_err(named(&path))?;
                let template = folder.file_name().and_then(|name| name.to_str());
                let is_copy = inode_of(&file.metadata()?) != inode && link.is_of(file);
                if let (true, Some(template)) = (is_copy, template) {
                    return Ok(Some((template.to_owned(), path)));
                }
            }
        }
        Ok(None)
    }
}

/// A descriptor that says which file it is, and has none of the effects of an open.
const HANDLE: OFlags = OFlags::PATH.union(OFlags::CLOEXEC);

/// Whether no guest's user may write to a file below `root`, or to the folders between them, so that it is what the
/// daemon's user has put there.
fn is_closed(root: &Path, file: &Path) -> bool {
    let own = geteuid().as_raw();
    let mut parts = file.ancestors().take_while(|part| part.starts_with(root));
    parts.all(|part| {
        let found = part.symlink_metadata();
        found.is_ok_and(|found| found.uid() == own && found.mode() & OTHERS_WRITE == 0)
    })
}

fn inode_of(metadata: &fs::Metadata) -> Inode {
    (metadata.dev(), metadata.ino())
}

/// Opens a file for reading, where it is a regular file.
fn regular(handle: impl AsFd) -> io::Result<File> {
    let handle = handle.as_fd();
    if FileType::from_raw_mode(fstat(handle)?.st_mode) != FileType::RegularFile {
        return Err(wrong(TemplateFileError::Kind));
    }
    let path = format!("/proc/self/fd/{}", handle.as_raw_fd());
    Ok(open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?.into())
}

/// The file that a link is of, among those that it names, with the path by which it names it.
fn parent_of(link: &ParentLink) -> Option<(File, PathBuf)> {
    let mut found = link.paths.iter().filter_map(|path| {
        let file = regular(open(path, HANDLE, Mode::empty()).ok()?).ok()?;
        let is_it = link.is_of(file.try_clone().ok()?);
        is_it.then(|| (file, path.clone()))
    });
    found.next()
}

/// The path of an open file, without links.
fn real_path(file: &File, by: &Path) -> io::Result<PathBuf> {
    let path = by.canonicalize().map_err(named(by))?;
    let is_it = inode_of(&path.metadata()?) == inode_of(&file.metadata()?);
    // It was replaced a moment ago.
    is_it
        .then_some(path)
        .ok_or_else(|| named(by)(wrong(TemplateFileError::Changed)))
}

/// What is found while the copies begin.
struct Plan<'a> {
    places: &'a Places,
    folder: &'a Path,
    disks: Vec<DiskCopy>,
    /// Files that are copied, and their copies.
    copied: BTreeMap<Inode, PathBuf>,
    stands_on: BTreeSet<String>,
}

impl Plan<'_> {
    /// Adds a disk, and what it stands on; gives the path of the copy. `depth` disks of the chain are copied already.
    fn add(&mut self, source: File, path: &Path, drive: &str, depth: usize) -> io::Result<PathBuf> {
        if depth > DEEPEST {
            return Err(named(path)(wrong(TemplateFileError::TooDeep)));
        }
        let folder = path.parent().unwrap_or(Path::new("/")).to_owned();
        let named_by = disk_parent::named_by(&source, &folder, self.places.uid);
        let parent = match named_by.map_err(named(path))? {
            None => None,
            Some(link) => {
                let place = self.place_of(&link, path, drive, depth)?;
                Some((link, place))
            }
        };
        let name = match depth {
            0 => format!("disk-{drive}"),
            _ => format!("disk-{drive}-parent-{depth}"),
        };
        let inode = inode_of(&source.metadata().map_err(named(path))?);
        let copy = FileCopy::begin(source, &self.folder.join(name))?;
        let at = copy.path().to_owned();
        self.copied.insert(inode, at.clone());
        self.disks.push(DiskCopy {
            copy,
            folder,
            parent,
        });
        Ok(at)
    }

    /// Where the parent of a copy of the disk at `child` is to be.
    fn place_of(
        &mut self,
        link: &ParentLink,
        child: &Path,
        drive: &str,
        depth: usize,
    ) -> io::Result<PathBuf> {
        let found = parent_of(link);
        let (file, path) = found.ok_or_else(|| {
            let tried = link.paths.clone();
            named(child)(wrong(TemplateFileError::NoParent(tried)))
        })?;
        let real = real_path(&file, &path)?;
        let inode = inode_of(&file.metadata().map_err(named(&real))?);
        if let Ok(inside) = real.strip_prefix(&self.places.templates) {
            let template = inside.iter().next().and_then(|name| name.to_str());
            self.stands_on.extend(template.map(str::to_owned));
            return Ok(real);
        }
        if !self.places.may_be_written(&real, inode) {
            return Ok(real);
        }
        if let Some(copied) = self.copied.get(&inode) {
            return Ok(copied.clone());
        }
        if let Some((template, copy)) = self.places.earlier_copy(link, inode)? {
            self.stands_on.insert(template);
            return Ok(copy);
        }
        self.add(file, &path, drive, depth + 1)
    }
}

#[cfg(test)]
mod tests {
    use std::fs::Permissions;
    use std::os::unix::fs::{PermissionsExt, symlink};

    use storage::vhdx::{ChildOptions, CreateOptions, Vhdx};

    use super::*;

    /// A host with a state folder, a folder that all guests may write to, and files.
    fn host() -> (tempfile::TempDir, Places) {
        let host = tempfile::tempdir().unwrap();
        let path = |name: &str| host.path().canonicalize().unwrap().join(name);
        for folder in ["vms/a/sub", "vms/b", "templates/t", "allowed", "images"] {
            fs::create_dir_all(path(folder)).unwrap();
        }
        for name in [
            "secret",
            "vms/a/disk",
            "vms/a/sub/disk",
            "vms/b/disk",
            "allowed/disk",
            "images/disk",
        ] {
            fs::write(path(name), name).unwrap();
        }
        let places = Places {
            vms: path("vms"),
            templates: path("templates"),
            allowed: vec![path("allowed")],
            own_disks: Vec::new(),
            earlier: Vec::new(),
            shared: Vec::new(),
            uid: Some(1234),
        };
        (host, places)
    }

    #[test]
    fn where_a_guest_makes_links_no_link_is_followed_and_what_is_no_file_is_not_copied() {
        let (host, places) = host();
        let path = |name: &str| host.path().canonicalize().unwrap().join(name);
        symlink(path(""), path("vms/a/way")).unwrap();
        symlink("../../secret", path("vms/a/link")).unwrap();
        symlink(path("secret"), path("allowed/link")).unwrap();
        symlink(path("images/disk"), path("images/link")).unwrap();
        let mode = Mode::RWXU;
        rustix::fs::mkfifoat(rustix::fs::CWD, path("vms/a/pipe"), mode).unwrap();
        for refused in [
            "vms/a/way/secret",
            "vms/a/../../secret",
            "vms/a/sub/../../b/disk",
            "vms/a/link",
            "vms/a/pipe",
            "vms/a/sub",
            "allowed/link",
            "images/missing",
        ] {
            places.open(&path(refused)).unwrap_err();
        }
        for opened in [
            "vms/a/disk",
            "vms/a/sub/disk",
            "allowed/disk",
            "images/link",
        ] {
            let found = io::read_to_string(places.open(&path(opened)).unwrap()).unwrap();
            assert_eq!(found, opened.replace("link", "disk"));
        }
    }

    #[test]
    fn a_parent_stays_where_it_is_only_if_no_guest_may_write_to_it_or_replace_it() {
        let (host, mut places) = host();
        let path = |name: &str| host.path().canonicalize().unwrap().join(name);
        let may_be_written = |places: &Places, name: &str| {
            let inode = inode_of(&fs::metadata(path(name)).unwrap());
            places.may_be_written(&path(name), inode)
        };
        let set_mode = |name: &str, mode| {
            fs::set_permissions(path(name), Permissions::from_mode(mode)).unwrap();
        };
        for name in ["allowed", "allowed/disk"] {
            set_mode(name, 0o755);
        }
        assert!(may_be_written(&places, "vms/b/disk"));
        assert!(!may_be_written(&places, "images/disk"));
        assert!(!may_be_written(&places, "allowed/disk"));
        for open in ["allowed", "allowed/disk"] {
            set_mode(open, 0o775);
            assert!(may_be_written(&places, "allowed/disk"), "{open}");
            set_mode(open, 0o755);
        }
        // A disk that the guest has had, by whatever name.
        fs::hard_link(path("images/disk"), path("other")).unwrap();
        places.own_disks = vec![path("missing"), path("other")];
        assert!(may_be_written(&places, "images/disk"));
        places.uid = None;
        assert!(may_be_written(&places, "allowed/disk"));
    }

    #[test]
    fn the_parent_of_a_disk_is_the_file_that_has_its_identifier_among_those_that_it_names() {
        let (host, mut places) = host();
        let path = |name: &str| host.path().canonicalize().unwrap().join(name);
        let base = path("base");
        Vhdx::create(&base, &CreateOptions::new(8 << 20)).unwrap();
        Vhdx::create_child(path("vms/a/top"), &base, &ChildOptions::default()).unwrap();
        let guid = storage::vhdx::data_write_guid(File::open(&base).unwrap()).unwrap();
        let link = ParentLink {
            paths: ["vms", "secret", "missing", "vms/a/top", "base"]
                .map(path)
                .into(),
            identifiers: vec![guid.to_string()],
        };
        let (_, found) = parent_of(&link).unwrap();
        assert_eq!(found, base);
        let other = ParentLink {
            identifiers: vec!["0".to_owned()],
            ..link.clone()
        };
        assert!(parent_of(&other).is_none());
        // A copy of it in an earlier template is that only where it is another file.
        let inode = inode_of(&fs::metadata(&base).unwrap());
        places.earlier = vec![path("templates/t")];
        let earlier = || places.earlier_copy(&link, inode).unwrap();
        assert_eq!(earlier(), None);
        let kept = path("templates/t/disk-root");
        fs::hard_link(&base, &kept).unwrap();
        assert_eq!(earlier(), None);
        fs::remove_file(&kept).unwrap();
        fs::copy(&base, &kept).unwrap();
        assert_eq!(earlier(), Some(("t".to_owned(), kept)));
    }
}
