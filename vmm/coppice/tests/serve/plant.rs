//! What a guest's process, and root in its place, can put where a file of its own, or of the daemon, is expected.

use std::fs::{self, File};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{lchown, symlink};
use std::os::unix::net::UnixListener;
use std::path::Path;

use rustix::fs::{CWD, FileType, Mode, OFlags, makedev, mkdirat, mkfifoat, mknodat, openat};

use super::outside::Canaries;

/// A thing in the place of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plant {
    /// A link to a file that only root can open.
    LinkToSecret,
    /// A link to a folder.
    LinkToFolder,
    /// A link to where there is nothing.
    LinkToNothing,
    /// A link to the record of another guest.
    LinkToNeighbour,
    /// A second name of a file of the guest's own.
    SecondName,
    Fifo,
    /// `/dev/zero`, which the process itself could not make.
    Device,
    /// A folder with a link in it.
    Folder,
    /// Folders in each other, many times.
    DeepFolder,
    /// A socket at which nobody listens.
    Socket,
    /// A file of zeros, longer than the host's memory.
    Huge,
    /// A file of bytes that mean nothing.
    Noise,
}

impl Plant {
    pub const LINKS: [Self; 5] = [
        Self::LinkToSecret,
        Self::LinkToFolder,
        Self::LinkToNothing,
        Self::LinkToNeighbour,
        Self::SecondName,
    ];
    pub const SPECIAL: [Self; 3] = [Self::Fifo, Self::Device, Self::Socket];
    pub const PLAIN: [Self; 3] = [Self::Folder, Self::Huge, Self::Noise];
    pub const DEEP: [Self; 1] = [Self::DeepFolder];

    /// Puts it at `path`, in the place of what is there, and gives it to the user `uid`.
    pub fn at(self, path: &Path, canaries: &Canaries, uid: u32) {
        if path.is_dir() && !path.is_symlink() {
            fs::remove_dir_all(path).unwrap();
        } else if path.is_symlink() || path.exists() {
            fs::remove_file(path).unwrap();
        }
        let link = |to: &Path| symlink(to, path).unwrap();
        match self {
            Self::LinkToSecret => link(&canaries.at("secret")),
            Self::LinkToFolder => link(&canaries.at("folder")),
            Self::LinkToNothing => link(&canaries.at("planted")),
            Self::LinkToNeighbour => link(Path::new("../neighbour/vm.json")),
            Self::SecondName => {
                let own = path.with_file_name("own");
                fs::write(&own, "own").unwrap();
                lchown(&own, Some(uid), Some(uid)).unwrap();
                fs::hard_link(own, path).unwrap();
            }
            Self::Fifo => mkfifoat(CWD, path, Mode::RWXU).unwrap(),
            Self::Device => {
                let mode = Mode::from_raw_mode(0o666);
                mknodat(CWD, path, FileType::CharacterDevice, mode, makedev(1, 5)).unwrap();
            }
            Self::Folder => {
                fs::create_dir(path).unwrap();
                symlink(canaries.at("folder"), path.join("link")).unwrap();
            }
            Self::DeepFolder => deep_folder(path),
            Self::Socket => drop(UnixListener::bind(path).unwrap()),
            Self::Huge => File::create(path).unwrap().set_len(1 << 40).unwrap(),
            Self::Noise => fs::write(path, vec![0xff; 64 << 10]).unwrap(),
        }
        lchown(path, Some(uid), Some(uid)).unwrap();
    }
}

fn deep_folder(path: &Path) {
    fs::create_dir(path).unwrap();
    let mut inner: OwnedFd = File::open(path).unwrap().into();
    let flags = OFlags::DIRECTORY | OFlags::CLOEXEC;
    for _ in 0..100 {
        mkdirat(inner.as_fd(), "d", Mode::RWXU).unwrap();
        inner = openat(inner.as_fd(), "d", flags, Mode::empty()).unwrap();
    }
}
