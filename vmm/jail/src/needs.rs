//! Which of the host's files a guest needs.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::{
    FileExt, FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt, fchown, lchown,
};
use std::path::{Component, Path, PathBuf};

use memshare::ShareMode;
use rustix::fs::{Access as Mode, access};
use storage::vhdx::SIGNATURE;

use super::error::JailError;
use super::landlock;
use super::need::{Access, Need};
use super::options::JailConfig;
use super::reader;
use config::{DeviceConfig, DriveFormat, HostFile, LoadSnapshot, VmConfig};
use host::output::open_output;
use host::shared_folder::{is_plain_block_device, is_plain_file};
use kvm::boot;

/// The longest chain of disks that is followed; a longer one is refused when it is opened.
const LONGEST_CHAIN: usize = 256;

/// Collects the files that exist, under all names that they are opened by.
#[derive(Default)]
struct Needs {
    found: Vec<Need>,
    /// Files that the guest only reads, and that others may have, too.
    shared: BTreeSet<PathBuf>,
    /// Who reads disks: the user of the jail.
    reader: reader::User,
}

impl Needs {
    /// Adds a path as it is written, and as it is with all links followed. A file that does not exist is left out;
    /// whoever opens it reports that.
    fn add(&mut self, path: &Path, access: Access) {
        self.add_as(path, access, None);
    }

    /// Adds a path without which the guest cannot start.
    fn add_vital(&mut self, path: &Path, access: Access) {
        self.add_as(path, access, Some(access));
    }

    fn add_as(&mut self, path: &Path, access: Access, vital: Option<Access>) {
        let Ok(source) = path.canonicalize() else {
            return;
        };
        let written = std::path::absolute(path).ok().filter(|written| {
            *written != source
                && !written
                    .components()
                    .any(|part| matches!(part, Component::ParentDir))
        });
        for target in written.into_iter().chain([source.clone()]) {
            self.found.push(Need {
                source: source.clone(),
                target,
                access,
                vital,
            });
        }
    }

    /// Adds what a device uses.
    fn add_host_file(&mut self, file: HostFile<'_>) -> Result<(), JailError> {
        match file {
            HostFile::Disk {
                path,
                format,
                is_written,
            } => {
                let access = if is_written {
                    Access::Write
                } else {
                    Access::Read
                };
                self.add_disk(path, format, access)
            }
            HostFile::PortSockets(path) => {
                self.add_ports(path);
                Ok(())
            }
        }
    }

    /// Adds the sockets that exist of those that a vsock device at `path` connects to.
    fn add_ports(&mut self, path: &Path) {
        let mut start = path.file_name().unwrap_or_default().to_owned();
        start.push("_");
        let entries = fs::read_dir(folder_of(path)).into_iter().flatten();
        for entry in entries.flatten() {
            let name = entry.file_name();
            let is_port = name
                .as_encoded_bytes()
                .starts_with(start.as_encoded_bytes());
            if is_port && entry.file_type().is_ok_and(|kind| kind.is_socket()) {
                self.add(&path.with_file_name(name), Access::Connect);
            }
        }
    }

    /// Adds a disk and all its parents, or a block device, which has none. These are files without links in a guest's
    /// folder: a guest writes what names the parent of its disk, and may have put a link in the place of a disk there.
    /// What is left out is refused where it is opened.
    fn add_disk(
        &mut self,
        path: &Path,
        format: Option<DriveFormat>,
        access: Access,
    ) -> Result<(), JailError> {
        if is_plain_block_device(path) {
            self.add_vital(path, access);
            return Ok(());
        }
        if !is_plain_file(path) {
            return Ok(());
        }
        self.add_vital(path, access);
        if access == Access::Read {
            self.shared.insert(path.to_owned());
        }
        if !DriveFormat::may_have_parents(format, path) {
            return Ok(());
        }
        let mut disk = path.to_owned();
        for _ in 0..LONGEST_CHAIN {
            let Some(parent) = parent_of(&disk, self.reader)? else {
                return Ok(());
            };
            self.add_vital(&parent, Access::Read);
            self.shared.insert(parent.clone());
            disk = parent;
        }
        Ok(())
    }

    /// Adds the disks that a guest which goes on from a snapshot is given in place of those that it had.
    fn add_restored(&mut self, load: &LoadSnapshot) -> Result<(), JailError> {
        let memory = load.mem_file_path.iter().chain(&load.lower_mem_files);
        self.shared.extend(memory.cloned());
        let (cloned, moved): (Vec<_>, Vec<_>) = load.drives.iter().partition(|drive| drive.clone);
        for drive in moved {
            let is_cloned = cloned.iter().any(|clone| clone.drive_id == drive.drive_id);
            let (format, access) = if is_cloned {
                (Some(DriveFormat::Vhdx), Access::Read)
            } else {
                (None, Access::Write)
            };
            self.add_disk(&drive.path_on_host, format, access)?;
        }
        Ok(())
    }
}

fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}

/// The parent of a disk: the first file that the disk names and that has the identifier of its parent. `None` where the
/// disk is no VHDX, cannot be opened, or names no file that exists.
fn parent_of(disk: &Path, reader: reader::User) -> Result<Option<PathBuf>, JailError> {
    let Ok(file) = File::open(disk) else {
        return Ok(None);
    };
    let mut signature = [0; SIGNATURE.len()];
    if file.read_exact_at(&mut signature, 0).is_err() || signature != *SIGNATURE {
        return Ok(None);
    }
    let folder = std::path::absolute(folder_of(disk)).map_err(failed(disk))?;
    let link = reader::parent_of(&file, &folder, reader).map_err(failed(disk))?;
    let Some(link) = link else {
        return Ok(None);
    };
    let mut other = None;
    for candidate in link.paths.iter().filter(|path| is_plain_file(path)) {
        let Ok(file) = File::open(candidate) else {
            continue;
        };
        if link.is_of(file) {
            return Ok(Some(candidate.clone()));
        }
        other.get_or_insert(candidate);
    }
    match other {
        Some(parent) => Err(JailError::OtherParent {
            disk: disk.to_owned(),
            parent: parent.clone(),
        }),
        None => Ok(None),
    }
}

fn failed(path: &Path) -> impl FnOnce(io::Error) -> JailError {
    let path = path.to_owned();
    move |source| JailError::Path { path, source }
}

/// All that a guest of `config` needs, which goes on from the snapshot `restored` if that is given, with its sockets at
/// `sockets`. Makes the files that it needs to find when it is
/// jailed: its outputs, and the cache of kernels.
pub(super) fn of(
    config: &VmConfig,
    restored: Option<&LoadSnapshot>,
    sockets: &[&Path],
    jail: &JailConfig,
) -> Result<Vec<Need>, JailError> {
    let mut needs = Needs {
        found: Vec::new(),
        shared: BTreeSet::new(),
        reader: (jail.uid, jail.gid),
    };
    needs.add(Path::new("/dev/kvm"), Access::Device);
    // Identifiers of disks are random, and a static program may read this file instead of calling getrandom(2).
    needs.add(Path::new("/dev/random"), Access::Device);
    needs.add(Path::new("/dev/urandom"), Access::Device);
    needs.add(Path::new("/dev/null"), Access::Device);
    // This file has the limit of mappings of a process.
    needs.add(Path::new("/proc/sys/vm/max_map_count"), Access::Read);
    let process = Path::new("/proc/self");
    needs.found.push(Need {
        source: process.canonicalize().map_err(failed(process))?,
        // The process has another number in its PID namespace.
        target: Path::new("/proc").join(std::process::id().to_string()),
        access: Access::Read,
        vital: None,
    });
    if let Some(source) = &config.boot_source {
        needs.add_vital(&source.kernel_image_path, Access::Read);
        if let Some(initrd) = &source.initrd_path {
            needs.add_vital(initrd, Access::Read);
        }
    }
    add_cache(&mut needs, config, jail);
    for file in config.devices().flat_map(DeviceConfig::host_files) {
        needs.add_host_file(file)?;
    }
    if let Some(load) = restored {
        needs.add_restored(load)?;
    }
    if let Some(path) = config
        .serial
        .as_ref()
        .and_then(|serial| serial.serial_out_path.as_ref())
    {
        let is_new = path.symlink_metadata().is_err();
        let file = open_output(path).map_err(failed(path))?;
        if is_new {
            fchown(&file, jail.uid, jail.gid).map_err(failed(path))?;
        }
        needs.add_vital(path, Access::Write);
    }
    for socket in sockets {
        give(socket, jail)?;
        add_folder_of_socket(&mut needs, socket, jail);
    }
    for path in &jail.allow {
        let kind = path.metadata().map_err(failed(path))?.file_type();
        // Landlock has a right of its own for the requests (ioctl) of a device.
        let access = if kind.is_char_device() {
            Access::Device
        } else {
            Access::Write
        };
        needs.add(path, access);
    }
    // The files in a folder have to come after the folder.
    needs.found.sort_by(|a, b| a.target.cmp(&b.target));
    needs.found.dedup_by(|later, first| {
        let is_same = later.target == first.target;
        if is_same && later.access == Access::Write {
            first.access = Access::Write;
        }
        if is_same && first.vital != Some(Access::Write) {
            first.vital = later.vital.or(first.vital);
        }
        is_same
    });
    if let Some(path) = &jail.shared {
        write_shared(&needs.shared, path).map_err(failed(path))?;
    }
    Ok(needs.found)
}

/// Writes which files the guest shares, apart from those in the folder that the process works in, which is the guest's.
fn write_shared(files: &BTreeSet<PathBuf>, path: &Path) -> io::Result<()> {
    let folder = std::env::current_dir()?;
    let whole = files.iter().map(|file| folder.join(file));
    let elsewhere = whole.filter(|file| !file.starts_with(&folder));
    let text = serde_json::to_vec(&elsewhere.collect::<Vec<_>>())?;
    // The guest may have put anything in its place, which is neither followed nor written to.
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        Ok(()) | Err(_) => {}
    }
    let mut options = File::options();
    let mut file = options
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)?;
    file.write_all(&text)
}

/// Changes the owner of a file to the guest process's user.
pub(super) fn give(path: &Path, jail: &JailConfig) -> Result<(), JailError> {
    if jail.uid.is_none() && jail.gid.is_none() {
        return Ok(());
    }
    lchown(path, jail.uid, jail.gid).map_err(failed(path))
}

/// Checks that the user that this process has become has the access to the guest's files that it needs, before any of
/// them is opened.
pub(super) fn check_access(needs: &[Need], in_tree: bool) -> Result<(), JailError> {
    for need in needs {
        let (mode, wanted) = match need.vital {
            Some(Access::Read) => (Mode::READ_OK, "read"),
            Some(Access::Write) => (Mode::READ_OK | Mode::WRITE_OK, "read and write"),
            Some(Access::Device | Access::Remove | Access::Connect) | None => continue,
        };
        let path = if in_tree { &need.target } else { &need.source };
        if access(path, mode) == Err(rustix::io::Errno::ACCESS) {
            let metadata = path.metadata().ok();
            return Err(JailError::Closed {
                path: need.source.clone(),
                uid: rustix::process::geteuid().as_raw(),
                access: wanted,
                owner: metadata.as_ref().map_or(0, MetadataExt::uid),
                mode: metadata.map_or(0, |metadata| metadata.mode() & 0o7777),
            });
        }
    }
    Ok(())
}

/// Adds the unpacked kernels, and the files that are made of them. They are only read, as other guests have them too.
/// Files that the cache lacks are made now.
fn add_cache(needs: &mut Needs, config: &VmConfig, jail: &JailConfig) {
    let domain = config.sharing.domain.as_deref();
    let cache = boot::cache_dir(domain);
    let share = config.share_mode() >= ShareMode::Boot;
    let kept = match &config.boot_source {
        Some(source) => boot::fill_cache(source, domain, share),
        None => Vec::new(),
    };
    if jail.uid.is_none() {
        needs.add(&cache, Access::Read);
        return;
    }
    // Only its owner may list the folder, so that a file in it may be readable for users who are given the file itself.
    for file in kept.iter().flat_map(|file| with_references(file, &cache)) {
        if let Err(error) = readable(&file) {
            tracing::warn!(error = %host::report::chain(&error), file = %file.display(), "the guest has a copy of its own of it");
        }
        needs.add(&file, Access::Read);
    }
}

/// A file of the cache, and the reference images beside it, which have longer names.
fn with_references(file: &Path, cache: &Path) -> Vec<PathBuf> {
    let stem = file.file_stem().unwrap_or_default().as_encoded_bytes();
    let beside = fs::read_dir(cache).into_iter().flatten().flatten();
    let references = beside.map(|entry| entry.path()).filter(|path| {
        let name = path.file_name().unwrap_or_default().as_encoded_bytes();
        name.starts_with(stem) && path.extension().is_some_and(|end| end == "reference")
    });
    references.chain([file.to_owned()]).collect()
}

fn readable(file: &Path) -> io::Result<()> {
    let metadata = file.metadata()?;
    if metadata.uid() == rustix::process::geteuid().as_raw() && metadata.mode() & 0o044 != 0o044 {
        fs::set_permissions(file, fs::Permissions::from_mode(metadata.mode() | 0o044))?;
    }
    Ok(())
}

/// Adds the folder of a socket, which is needed to remove the socket at the end. A folder with other files in it can be
/// given to the process only where Landlock keeps it from those.
fn add_folder_of_socket(needs: &mut Needs, socket: &Path, jail: &JailConfig) {
    let folder = folder_of(socket);
    let same = |path: &PathBuf| path.canonicalize().ok() == folder.canonicalize().ok();
    if jail.allow.iter().any(same) {
        return;
    }
    let is_alone = fs::read_dir(folder).is_ok_and(|entries| entries.count() <= 1);
    if is_alone || landlock::is_available() {
        needs.add(folder, Access::Remove);
    } else {
        tracing::warn!(
            folder = %folder.display(),
            "the REST socket stays behind at the end: there are other files in its folder, and the kernel has no Landlock"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use config::{DriveConfig, SerialConfig};
    use storage::vhdx::Vhdx;

    fn vhdx(id: &str, path: PathBuf) -> DriveConfig {
        DriveConfig {
            format: Some(DriveFormat::Vhdx),
            ..DriveConfig::new(id, path)
        }
    }

    fn find<'a>(needs: &'a [Need], path: &Path) -> &'a Need {
        let found = needs.iter().find(|need| need.target == path);
        found.unwrap_or_else(|| panic!("{} in {needs:?}", path.display()))
    }

    #[test]
    fn a_disk_comes_with_all_that_it_stands_on_and_parents_are_not_written_to() {
        use storage::vhdx::{ChildOptions, CreateOptions};
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().canonicalize().unwrap().join(name);
        Vhdx::create(path("base"), &CreateOptions::new(64 << 20)).unwrap();
        Vhdx::create_child(path("child"), path("base"), &ChildOptions::default()).unwrap();
        Vhdx::create_child(path("top"), path("child"), &ChildOptions::default()).unwrap();
        let config = VmConfig {
            drives: vec![vhdx("a", path("top"))],
            serial: Some(SerialConfig {
                serial_out_path: Some(path("serial")),
                rate_limiter: None,
            }),
            ..VmConfig::default()
        };
        let needs = of(&config, None, &[], &JailConfig::default()).unwrap();
        assert_eq!(find(&needs, &path("top")).access, Access::Write);
        assert_eq!(find(&needs, &path("child")).access, Access::Read);
        assert_eq!(find(&needs, &path("base")).access, Access::Read);
        assert_eq!(find(&needs, &path("serial")).access, Access::Write);
        assert!(path("serial").exists());
        assert!(needs.iter().all(|need| need.target != folder.path()));
    }

    #[test]
    fn only_the_disk_that_a_child_was_made_on_is_its_parent_and_only_of_what_is_called_a_vhdx() {
        use storage::vhdx::{ChildOptions, CreateOptions};
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().canonicalize().unwrap().join(name);
        Vhdx::create(path("base"), &CreateOptions::new(64 << 20)).unwrap();
        Vhdx::create_child(path("top"), path("base"), &ChildOptions::default()).unwrap();
        let needs = |name: &str, format| {
            let drive = DriveConfig {
                format,
                ..DriveConfig::new("a", path(name))
            };
            let config = VmConfig {
                drives: vec![drive],
                ..VmConfig::default()
            };
            of(&config, None, &[], &JailConfig::default())
        };
        let has_parent = |name, format| {
            let needs = needs(name, format).unwrap();
            needs.iter().any(|need| need.target == path("base"))
        };
        let vhdx = Some(DriveFormat::Vhdx);
        assert!(has_parent("top", vhdx) && !has_parent("top", None));
        assert!(!has_parent("top", Some(DriveFormat::Raw)));
        fs::rename(path("top"), path("top.vhdx")).unwrap();
        assert!(has_parent("top.vhdx", None));
        // Somebody else's disk, which the guest has written the name of into its own.
        fs::remove_file(path("base")).unwrap();
        Vhdx::create(path("base"), &CreateOptions::new(64 << 20)).unwrap();
        let error = needs("top.vhdx", vhdx).unwrap_err();
        assert!(matches!(error, JailError::OtherParent { .. }), "{error}");
        fs::write(path("base"), vec![1; 1 << 20]).unwrap();
        let error = needs("top.vhdx", vhdx).unwrap_err();
        assert!(matches!(error, JailError::OtherParent { .. }), "{error}");
    }

    #[test]
    fn what_the_guest_shares_with_others_is_written_down_in_a_new_file() {
        use std::os::unix::fs::symlink;
        let folder = tempfile::tempdir().unwrap();
        let outer = folder.path().canonicalize().unwrap();
        fs::create_dir(outer.join("vm")).unwrap();
        for name in ["base", "vm/own", "memory"] {
            fs::write(outer.join(name), "").unwrap();
        }
        std::env::set_current_dir(outer.join("vm")).unwrap();
        symlink(outer.join("base"), "shared.json").unwrap();
        let read_only = |path: PathBuf| DriveConfig {
            is_read_only: true,
            format: Some(DriveFormat::Raw),
            ..DriveConfig::new("a", path)
        };
        let config = VmConfig {
            drives: vec![read_only(outer.join("base")), read_only("own".into())],
            ..VmConfig::default()
        };
        let jail = JailConfig {
            shared: Some("shared.json".into()),
            ..JailConfig::default()
        };
        let load = LoadSnapshot {
            mem_file_path: Some(outer.join("memory")),
            ..LoadSnapshot::new("state".into())
        };
        of(&config, Some(&load), &[], &jail).unwrap();
        let written: Vec<PathBuf> =
            serde_json::from_slice(&fs::read("shared.json").unwrap()).unwrap();
        assert_eq!(written, [outer.join("base"), outer.join("memory")]);
        assert!(fs::read(outer.join("base")).unwrap().is_empty());
        assert!(!fs::symlink_metadata("shared.json").unwrap().is_symlink());
    }

    #[test]
    fn what_a_disk_names_as_its_parent_widens_a_jail_by_regular_files_alone() {
        use storage::vhdx::{ChildOptions, CreateOptions};
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().canonicalize().unwrap().join(name);
        Vhdx::create(path("base"), &CreateOptions::new(64 << 20)).unwrap();
        Vhdx::create_child(path("top"), path("base"), &ChildOptions::default()).unwrap();
        let drives = vec![vhdx("a", path("top"))];
        let config = VmConfig {
            drives,
            ..VmConfig::default()
        };
        let targets = || {
            let needs = of(&config, None, &[], &JailConfig::default()).unwrap();
            let below = needs.into_iter().map(|need| need.target);
            below
                .filter(|target| target.starts_with(path("")))
                .collect::<Vec<_>>()
        };
        assert_eq!(targets(), [path("base"), path("top")]);
        fs::remove_file(path("base")).unwrap();
        fs::create_dir(path("base")).unwrap();
        assert_eq!(targets(), [path("top")]);
        fs::remove_dir(path("base")).unwrap();
        std::os::unix::fs::symlink("/", path("base")).unwrap();
        assert_eq!(targets(), [path("top")]);
        std::os::unix::fs::symlink("/dev/null", path("null")).unwrap();
        fs::rename(path("null"), path("base")).unwrap();
        assert_eq!(targets(), [path("top")]);
    }

    #[test]
    fn a_link_is_there_by_both_names_and_what_is_missing_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path().canonicalize().unwrap();
        fs::write(folder.join("disk"), "").unwrap();
        std::os::unix::fs::symlink("disk", folder.join("link")).unwrap();
        let mut needs = Needs::default();
        needs.add(&folder.join("link"), Access::Read);
        needs.add(&folder.join("nothing"), Access::Read);
        let targets: Vec<_> = needs.found.iter().map(|need| need.target.clone()).collect();
        assert_eq!(targets, [folder.join("link"), folder.join("disk")]);
        assert!(
            needs
                .found
                .iter()
                .all(|need| need.source == folder.join("disk"))
        );
    }
}
