//! What outlives the daemon: a folder for each guest.
//!
//! ```text
//! DIR/lock               held by the one daemon of this folder
//! DIR/images.json        images by name
//! DIR/templates/NAME   see `templates`
//! DIR/vms/ID/vm.json     what was asked for, and how far it has come
//!           /config.json what the process is given
//!           /pid.json    the process: number, start, boot
//!           /end.json    why the process ended, written by itself
//!           /log         what the process logs
//!           /metadata.json what the guest is told of itself, see `identity`
//!           /api.sock, /console.sock, /vsock.sock
//! ```
//!
//! A file is written under another name, and renamed when it is complete. The order makes a crash at any step harmless: the folder is
//! there before the process, with `vm.json` saying `creating`; the process does nothing before its number is in `pid.json` (see
//! `process`); `vm.json` says `present` when the guest is as it was asked for, and `deleting` before anything of it goes. What the next
//! daemon finds as `creating` or `deleting` it removes.

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::jail::Jailed;
use super::pending::Pending;
use super::spec::VmSpec;
use super::status::{Ended, State};
use super::told::Told;

/// Longest file that is read, in bytes: a process of a guest may have written it.
const LONGEST: u64 = 4 << 20;
/// Longest path of a socket (unix(7)), without its zero byte.
const SOCKET_PATH: usize = 107;

/// How far a guest has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Its creation has begun.
    Creating,
    /// It is there.
    Present,
    /// Its deletion has begun.
    Deleting,
}

/// `vm.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Record {
    /// What was asked for; with its id.
    pub spec: VmSpec,
    /// Who asked.
    pub uid: u32,
    /// When, in ms since 1970.
    pub created_ms: u64,
    /// How far it has come.
    pub phase: Phase,
    /// Its state when this was written.
    pub state: State,
    /// What its jail takes of the host.
    #[serde(default)]
    pub jail: Option<Jailed>,
    /// Images that it uses.
    #[serde(default)]
    pub images: Vec<String>,
    /// Whether it goes on from its template, and has not started anew since.
    #[serde(default)]
    pub loaded: bool,
    /// The identifier of its vsock device, if it has one.
    #[serde(default)]
    pub cid: Option<u32>,
    /// Disks that have taken the place of those that it was made with, by drive.
    #[serde(default)]
    pub disks: BTreeMap<String, PathBuf>,
    /// What it was told over its own API.
    #[serde(default)]
    pub told: Told,
    /// What is under way with it.
    #[serde(default)]
    pub pending: Pending,
    /// How often it was started again.
    #[serde(default)]
    pub restarts: u32,
    /// Of those, how often without having run for long.
    #[serde(default)]
    pub failures: u32,
    /// How it ended the last time.
    #[serde(default)]
    pub end: Option<Ended>,
}

/// `pid.json`. A number is used again; with the start and the boot, it is one process for good.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PidFile {
    /// Its number.
    pub pid: u32,
    /// When it started, in µs since boot.
    pub start_us: u64,
    /// The boot of the host.
    pub boot_id: String,
}

/// The state folder. There is one daemon for it as long as this lives.
#[derive(Debug)]
pub struct Store {
    folder: PathBuf,
    _lock: File,
}

fn make_folder(path: &Path) -> io::Result<()> {
    match DirBuilder::new().mode(0o700).recursive(true).create(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        made => made,
    }
}

/// The host's boot.
///
/// # Errors
/// What the host says.
pub fn boot_id() -> io::Result<String> {
    let id = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    Ok(id.trim_end().to_owned())
}

/// Has an error name the file that it is about.
pub fn named(path: &Path) -> impl FnOnce(io::Error) -> io::Error {
    move |error| io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

/// Removes a folder and all in it, if it is there.
///
/// # Errors
/// What the host says.
pub fn remove_folder(path: &Path) -> io::Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

/// The name of a file until it is complete.
fn unfinished(path: &Path) -> PathBuf {
    let mut new = path.as_os_str().to_owned();
    new.push(".new");
    new.into()
}

/// Removes what a process has left that was killed while it wrote `path`. A folder of that name is no such thing.
pub fn remove_unfinished(path: &Path) {
    // Most often there is nothing; and what stays does no harm.
    let _ = fs::remove_file(unfinished(path));
}

/// Writes JSON to `path`, whole or not at all; where it is `durable`, also at a power cut.
///
/// # Errors
/// What the host says.
pub fn write(path: &Path, value: &impl Serialize, durable: bool) -> io::Result<()> {
    let new = unfinished(path);
    // A process in a jail may have left something of that name: it is no way to elsewhere, and where it is a folder the file is not written.
    let _ = fs::remove_file(&new);
    let written = || {
        let mut options = OpenOptions::new();
        options.write(true).create_new(true).mode(0o600);
        let mut file = options.open(&new)?;
        file.write_all(&serde_json::to_vec(value)?)?;
        if durable {
            file.sync_all()?;
        }
        fs::rename(&new, path)
    };
    let done = written();
    if done.is_err() {
        // The disk is full, most likely. What is not there yet does no harm.
        let _ = fs::remove_file(&new);
    } else if durable && let Some(folder) = path.parent() {
        sync_folder(folder)?;
    }
    done.map_err(named(path))
}

/// Makes durable which names a folder has.
///
/// # Errors
/// What the host says.
pub fn sync_folder(folder: &Path) -> io::Result<()> {
    let synced = File::open(folder).and_then(|folder| folder.sync_all());
    synced.map_err(named(folder))
}

/// Moves a folder to another, where it is after a power cut, too, with the names in it.
///
/// # Errors
/// What the host says.
pub fn rename(from: &Path, to: &Path) -> io::Result<()> {
    sync_folder(from)?;
    fs::rename(from, to)?;
    [to, from]
        .into_iter()
        .filter_map(Path::parent)
        .try_for_each(sync_folder)
}

/// Reads JSON; `None` where there is no such file.
///
/// # Errors
/// What the host says, or what is wrong with the JSON.
pub fn read<T: DeserializeOwned>(path: &Path) -> io::Result<Option<T>> {
    // No link is followed, and nothing waited for.
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    let opened = OpenOptions::new().read(true).custom_flags(flags).open(path);
    let file = match opened {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    if !file.metadata()?.is_file() {
        return Err(io::Error::other(format!("{} is no file", path.display())));
    }
    let mut text = Vec::new();
    file.take(LONGEST).read_to_end(&mut text)?;
    let value = serde_json::from_slice(&text).map_err(|error| named(path)(error.into()))?;
    Ok(Some(value))
}

impl Store {
    /// Opens, or makes, the folder; `None` where another daemon has it.
    ///
    /// # Errors
    /// What the host says.
    pub fn open(folder: &Path) -> io::Result<Option<Self>> {
        make_folder(&folder.join("vms"))?;
        make_folder(&folder.join("templates"))?;
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false);
        let lock = options.mode(0o600).open(folder.join("lock"))?;
        match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Some(Self {
                // Guests are given paths, and run in another folder.
                folder: fs::canonicalize(folder)?,
                _lock: lock,
            })),
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// The file of the images.
    pub fn images(&self) -> PathBuf {
        self.folder.join("images.json")
    }

    /// The folder of the templates.
    pub fn templates(&self) -> PathBuf {
        self.folder.join("templates")
    }

    /// The folder of a template.
    pub fn template(&self, id: &str) -> PathBuf {
        self.templates().join(id)
    }

    /// The folder of a guest.
    pub fn vm(&self, id: &str) -> PathBuf {
        self.folder.join("vms").join(id)
    }

    /// Whether the paths of a guest's sockets are short enough.
    pub fn has_room_for(&self, id: &str) -> bool {
        self.vm(id).join("console.sock").as_os_str().len() <= SOCKET_PATH
    }

    /// The guests that have a folder.
    ///
    /// # Errors
    /// What the host says.
    pub fn ids(&self) -> io::Result<Vec<String>> {
        let entries = fs::read_dir(self.folder.join("vms"))?;
        let names = entries.map(|entry| Ok(entry?.file_name().into_string().ok()));
        names.filter_map(Result::transpose).collect()
    }

    /// Makes the folder of a new guest. What is left of another of that name goes.
    ///
    /// # Errors
    /// What the host says. Nothing of the folder stays then.
    pub fn create(&self, id: &str, record: &Record, config: &impl Serialize) -> io::Result<()> {
        let folder = self.vm(id);
        self.remove(id)?;
        let made = || {
            let mut builder = DirBuilder::new();
            builder
                .mode(0o700)
                .create(&folder)
                .map_err(named(&folder))?;
            // A record is no more durable than the name of the folder that it is in.
            sync_folder(&self.folder.join("vms"))?;
            write(&folder.join("vm.json"), record, true)?;
            write(&folder.join("config.json"), config, false)
        };
        let done = made();
        if done.is_err()
            && let Err(error) = self.remove(id)
        {
            tracing::warn!(vm = id, %error, "a half-made folder stays");
        }
        done
    }

    /// Writes `vm.json`.
    ///
    /// # Errors
    /// What the host says.
    pub fn save(&self, id: &str, record: &Record) -> io::Result<()> {
        write(&self.vm(id).join("vm.json"), record, true)
    }

    /// Removes what was half written in the folder of a guest that has no writer.
    pub fn tidy(&self, id: &str) {
        for name in ["vm.json", "config.json", "pid.json", "metadata.json"] {
            remove_unfinished(&self.vm(id).join(name));
        }
    }

    /// Removes the folder of a guest, if there is one.
    ///
    /// # Errors
    /// What the host says.
    pub fn remove(&self, id: &str) -> io::Result<()> {
        remove_folder(&self.vm(id))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_has_one_daemon() {
        let folder = tempfile::tempdir().unwrap();
        let first = Store::open(folder.path()).unwrap();
        assert!(first.is_some());
        assert!(Store::open(folder.path()).unwrap().is_none());
        drop(first);
        assert!(Store::open(folder.path()).unwrap().is_some());
    }

    #[test]
    fn a_file_that_cannot_be_written_leaves_the_old_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("f");
        write(&path, &1, true).unwrap();
        fs::create_dir(folder.path().join("f.new")).unwrap();
        assert!(write(&path, &2, true).is_err());
        assert_eq!(read::<u8>(&path).unwrap(), Some(1));
        assert_eq!(read::<u8>(&folder.path().join("g")).unwrap(), None);
    }

    #[test]
    fn a_link_that_a_guest_has_left_leads_nowhere() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        fs::write(path("precious"), "1").unwrap();
        for name in ["f", "f.new"] {
            std::os::unix::fs::symlink(path("precious"), path(name)).unwrap();
        }
        read::<u8>(&path("f")).unwrap_err();
        write(&path("f"), &2, false).unwrap();
        assert_eq!(read::<u8>(&path("f")).unwrap(), Some(2));
        assert_eq!(fs::read_to_string(path("precious")).unwrap(), "1");
    }
}
