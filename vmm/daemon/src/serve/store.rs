//! The state folder, which outlives the daemon: it has a folder for each guest.
//!
//! ```text
//! DIR/lock                 locked by the one daemon of this folder
//! DIR/images.json          images by name
//! DIR/key                  see `record_key`
//! DIR/networks             is there as long as the host may have networks of this daemon
//! DIR/templates/NAME       see `templates`
//! DIR/vms/ID/vm.json       what was asked for, and how far its creation or deletion has come
//!           /config.json   the configuration that the process starts with
//!           /pid.json      the process: number, start, boot
//!           /end.json      why the process ended, written by itself
//!           /log, /log.pipe   the log of the process, and the way to it; see `guest_log`
//!           /metadata.json the guest's metadata, see `identity`
//!           /api.sock, /console.sock, /vsock.sock
//! ```
//!
//! A file is written under another name, and renamed when it is complete. The order makes a crash at any step harmless:
//! the folder exists before the process, with `vm.json` saying `creating`; the process does nothing before its number
//! is in `pid.json` (see `process`); `vm.json` says `present` when the guest is as it was asked for, and `deleting`
//! before anything of it is removed. The next daemon removes every guest that it finds as `creating` or `deleting`.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::record::Record;
pub use super::removal::remove_folder;
use host::report::chain;

/// The socket of a guest's vsock device, in the guest's folder.
pub const VSOCK_SOCKET: &str = "vsock.sock";
/// The file with the guest's metadata, in the same folder.
pub const METADATA: &str = "metadata.json";
/// The record of a template, in the template's folder.
pub const TEMPLATE: &str = "template.json";
/// The log of a guest's process, in the same folder.
pub const LOG: &str = "log";

/// Longest record in bytes. A longer one is neither written, as it could not be read again, nor read, as the process of
/// a guest may have written it.
const LONGEST_RECORD: u64 = 4 << 20;
/// Longest path of a socket (unix(7)), without its zero byte.
const SOCKET_PATH: usize = 107;

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
/// The host's error.
pub fn boot_id() -> io::Result<String> {
    let id = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    Ok(id.trim_end().to_owned())
}

/// The file that an error is about.
#[derive(Debug, thiserror::Error)]
#[error("{}", path.display())]
struct FileError {
    path: PathBuf,
    source: io::Error,
}

/// Has an error name the file that it is about; its kind stays.
pub fn named(path: &Path) -> impl FnOnce(io::Error) -> io::Error {
    move |source| {
        let path = path.to_owned();
        io::Error::new(source.kind(), FileError { path, source })
    }
}

/// Whether no file has that name.
///
/// # Errors
/// Where the host does not say.
pub fn is_missing(path: &Path) -> io::Result<bool> {
    match fs::symlink_metadata(path) {
        Ok(_) => Ok(false),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(true),
        Err(error) => Err(error),
    }
}

/// The folder that a template is made in: inside the guest's own, as the guest's process may see no other.
pub fn unfinished_template(folder: &Path, template: &str) -> PathBuf {
    folder.join(format!("template-{template}"))
}

/// The name of a file until it is complete.
fn unfinished(path: &Path) -> PathBuf {
    let mut new = path.as_os_str().to_owned();
    new.push(".new");
    new.into()
}

/// Removes the half-written file that a process leaves when it is killed while it writes `path`. A folder of that name
/// is left alone.
pub fn remove_unfinished(path: &Path) {
    // Most often there is no such file; and one that cannot be removed does no harm.
    let _ = fs::remove_file(unfinished(path));
}

/// A record that the next daemon could not read.
#[derive(Debug, thiserror::Error)]
#[error("it would have {len} bytes, and {LONGEST_RECORD} at most can be read again")]
struct TooLong {
    len: u64,
}

/// Opens a file that the process of a guest may have replaced: no link is followed, no named pipe is waited for, and
/// what is no regular file is refused.
///
/// # Errors
/// The host's error.
pub fn open_without_waiting(path: &Path, options: &mut OpenOptions) -> io::Result<File> {
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    let file = options.custom_flags(flags).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("it is no file"));
    }
    Ok(file)
}

/// Writes JSON to `path`, whole or not at all; where it is `durable`, also at a power cut.
///
/// # Errors
/// The host's error; `FileTooLarge` where it is longer than what [`read`] takes.
pub fn write(path: &Path, value: &impl Serialize, durable: bool) -> io::Result<()> {
    let text = serde_json::to_vec(value).map_err(|error| named(path)(error.into()))?;
    let len = text.len() as u64;
    if len > LONGEST_RECORD {
        let error = io::Error::new(io::ErrorKind::FileTooLarge, TooLong { len });
        return Err(named(path)(error));
    }
    replace_as(path, &text, durable)
}

/// Replaces a file by one with these bytes, whole or not at all.
///
/// # Errors
/// The host's error.
pub fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    replace_as(path, bytes, false)
}

/// As [`replace`], also at a power cut.
///
/// # Errors
/// The host's error.
pub fn replace_durably(path: &Path, bytes: &[u8]) -> io::Result<()> {
    replace_as(path, bytes, true)
}

fn replace_as(path: &Path, bytes: &[u8], durable: bool) -> io::Result<()> {
    let new = unfinished(path);
    // A process in a jail may have put a link of that name there, which must not be written through. A folder of that
    // name makes `create_new` fail.
    let _ = fs::remove_file(&new);
    let written = || {
        let mut options = OpenOptions::new();
        options.write(true).create_new(true).mode(0o600);
        let mut file = options.open(&new)?;
        file.write_all(bytes)?;
        if durable {
            file.sync_all()?;
        }
        fs::rename(&new, path)
    };
    let done = written();
    if done.is_err() {
        // The disk is full, most likely. Where the file does not exist yet, its removal fails, which does no harm.
        let _ = fs::remove_file(&new);
    } else if durable && let Some(folder) = path.parent() {
        sync_folder(folder)?;
    }
    done.map_err(named(path))
}

/// Makes the names in a folder durable.
///
/// # Errors
/// The host's error.
pub fn sync_folder(folder: &Path) -> io::Result<()> {
    let synced = File::open(folder).and_then(|folder| folder.sync_all());
    synced.map_err(named(folder))
}

/// Removes the folder of a template, if it is there: first the file that makes it a template, so that no half-removed
/// one is left by a power cut.
///
/// # Errors
/// The host's error.
pub fn remove_template(folder: &Path) -> io::Result<()> {
    match fs::remove_file(folder.join(TEMPLATE)) {
        Ok(()) => sync_folder(folder)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    remove_folder(folder)
}

/// Reads JSON; `None` where there is no such file.
///
/// # Errors
/// The host's error, or what is wrong with the JSON.
pub fn read<T: DeserializeOwned>(path: &Path) -> io::Result<Option<T>> {
    let file = match open_without_waiting(path, OpenOptions::new().read(true)) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(named(path)(error)),
    };
    let mut text = Vec::new();
    file.take(LONGEST_RECORD + 1)
        .read_to_end(&mut text)
        .map_err(named(path))?;
    if text.len() as u64 > LONGEST_RECORD {
        let error = format!("it has more than {LONGEST_RECORD} bytes");
        return Err(named(path)(io::Error::new(
            io::ErrorKind::FileTooLarge,
            error,
        )));
    }
    let value = serde_json::from_slice(&text).map_err(|error| named(path)(error.into()))?;
    Ok(Some(value))
}

impl Store {
    /// Opens, or makes, the folder; `None` where another daemon has it.
    ///
    /// # Errors
    /// The host's error.
    pub fn open(folder: &Path) -> io::Result<Option<Self>> {
        make_folder(&folder.join("vms"))?;
        make_folder(&folder.join("templates"))?;
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false);
        let lock = options.mode(0o600).open(folder.join("lock"))?;
        match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Some(Self {
                // Absolute, as paths in it are handed to guests' processes, which work in other folders.
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

    /// The file of the daemon's key.
    pub fn key(&self) -> PathBuf {
        self.folder.join("key")
    }

    /// The file that is there as long as the host may have networks of this daemon.
    pub fn networks(&self) -> PathBuf {
        self.folder.join("networks")
    }

    /// The folder of all guests' folders.
    pub fn vms(&self) -> PathBuf {
        self.folder.join("vms")
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
        self.vms().join(id)
    }

    /// Whether the paths of a guest's sockets are short enough.
    pub fn has_room_for(&self, id: &str) -> bool {
        self.vm(id).join("console.sock").as_os_str().len() <= SOCKET_PATH
    }

    /// The guests that have a folder.
    ///
    /// # Errors
    /// The host's error.
    pub fn ids(&self) -> io::Result<Vec<String>> {
        let entries = fs::read_dir(self.vms())?;
        let names = entries.map(|entry| Ok(entry?.file_name().into_string().ok()));
        names.filter_map(Result::transpose).collect()
    }

    /// Makes the folder of a new guest. What is left of an earlier guest of that name is removed.
    ///
    /// # Errors
    /// The host's error. Nothing of the folder stays then.
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
            sync_folder(&self.vms())?;
            write(&folder.join("vm.json"), record, true)?;
            write(&folder.join("config.json"), config, false)
        };
        let done = made();
        if done.is_err()
            && let Err(error) = self.remove(id)
        {
            tracing::warn!(vm = id, error = %chain(&error), "a half-made folder stays");
        }
        done
    }

    /// Writes `vm.json`.
    ///
    /// # Errors
    /// The host's error.
    pub fn save(&self, id: &str, record: &Record) -> io::Result<()> {
        write(&self.vm(id).join("vm.json"), record, true)
    }

    /// Removes half-written files from the folder of a guest that nobody writes to.
    pub fn tidy(&self, id: &str) {
        for name in ["vm.json", "config.json", "pid.json", METADATA, LOG] {
            remove_unfinished(&self.vm(id).join(name));
        }
    }

    /// Removes the folder of a guest, if there is one.
    ///
    /// # Errors
    /// The host's error.
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
    fn what_could_not_be_read_again_is_not_written() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("f");
        // Two bytes of it are quotation marks.
        let longest = "x".repeat(LONGEST_RECORD as usize - 2);
        write(&path, &longest, false).unwrap();
        assert_eq!(read::<String>(&path).unwrap().as_ref(), Some(&longest));
        let refused = write(&path, &format!("{longest}x"), false).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::FileTooLarge);
        assert!(chain(&refused).to_string().contains("4194305 bytes"));
        assert_eq!(read::<String>(&path).unwrap(), Some(longest));
        fs::write(&path, vec![b' '; LONGEST_RECORD as usize + 1]).unwrap();
        let refused = read::<String>(&path).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::FileTooLarge);
    }

    #[test]
    fn a_pipe_or_a_folder_in_the_place_of_a_record_is_not_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("f");
        let mode = rustix::fs::Mode::RWXU;
        rustix::fs::mkfifoat(rustix::fs::CWD, &path, mode).unwrap();
        let refused = read::<u8>(&path).unwrap_err();
        assert!(chain(&refused).to_string().contains("/f: it is no file"));
        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        read::<u8>(&path).unwrap_err();
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
