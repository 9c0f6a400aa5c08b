//! The jails of guests' processes: which users of the host they are, which control group they are in, and which files
//! they may write to.
//!
//! ```text
//! vm.json names user and group ──> group made ──> folder given to the user
//!                              ──> process spawned, joins the group, is jailed
//! process ended ──> control group removed ──> folder removed
//! ```
//!
//! So whatever a jail takes of the host is named by the record in a folder that exists for as long, where the next
//! daemon finds and removes it.
//!
//! A guest's folder belongs to the daemon, and to the group of the guest; it is sticky. The process makes and removes
//! files of its own there, and can neither read, nor replace, nor remove the daemon's records beside them. The daemon
//! follows no link in that folder, and trusts no other file there: see `store`, `proxy`.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::ops::RangeInclusive;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, Uid, chownat, fchmod, fchown, fstat, open, openat,
};
use rustix::process::geteuid;
use rustix::thread::{CapabilitySet, capabilities};

use super::fault::Fault;
use super::guarded_files::SHARED;
use super::own_disks::own_disks;
use super::record::JailResources;
use super::store::named;
use host::report::chain;
use jail::{CgroupConfig, JailConfig, cgroup_root};

/// Users of guests where none are named: numbers that neither distributions, nor systemd, nor containers hand out
/// (systemd's UIDS-GIDS.md: 1879048192 to 2147483647 are unused).
pub const UIDS: RangeInclusive<u32> = 1_900_000_000..=1_900_065_535;
/// Memory of a guest's group beyond its RAM: a part of that for page tables, and this for the process and the disks'
/// pages in the cache.
const MARGIN: u64 = 64 << 20;
const MARGIN_PART: u64 = 16;
/// Files of a guest's folder that are the daemon's own, also with an ending that they have while they are written.
const RECORDS: [&str; 6] = [
    "vm.json",
    "config.json",
    "pid.json",
    "metadata.json",
    "log",
    SHARED,
];

/// How guests are jailed: `coppice serve --jail`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct JailPolicy {
    /// Users that guests become, one each. [`UIDS`] where absent, for a daemon of root's.
    pub uids: Option<RangeInclusive<u32>>,
    /// The control group below which each guest has its own.
    pub cgroup: Option<PathBuf>,
    /// Percent of a core for each guest.
    pub cpu: Option<u32>,
    /// Processes and threads of each guest.
    pub pids: Option<u32>,
    /// Files and folders that all guests may open and write to, as far as their users may.
    pub allow: Vec<PathBuf>,
    /// A layer that the host does not have is an error.
    pub require_all: bool,
}

/// The jails of all guests.
#[derive(Debug)]
pub struct Jails {
    policy: Option<JailPolicy>,
    /// Whether groups can limit memory here.
    limits_memory: bool,
}

/// The place in the range of users, 0 to `last`, from which on a user is looked for: always the same one for a name, so
/// that disks can be given to that user before the guest is made, or made again. (FNV-1a, which never changes.)
fn first_place(id: &str, last: u32) -> u32 {
    let hash = id.bytes().fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    (hash % (u64::from(last) + 1)) as u32
}

fn invalid(why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, why)
}

/// Whether a map of users or groups of a namespace (`user_namespaces(7)`) has all of a range.
fn maps(map: &str, wanted: &RangeInclusive<u32>) -> bool {
    map.lines().any(|line| {
        let numbers: Vec<u64> = line.split_whitespace().flat_map(str::parse).collect();
        matches!(numbers[..], [first, _, count] if first <= u64::from(*wanted.start())
            && u64::from(*wanted.end()) < first + count)
    })
}

/// Checks that root may start processes of these users here.
///
/// # Errors
/// What is in the way.
fn has_users(wanted: &RangeInclusive<u32>) -> io::Result<()> {
    let (first, last) = (wanted.start(), wanted.end());
    for path in ["/proc/self/uid_map", "/proc/self/gid_map"] {
        if !maps(&fs::read_to_string(path)?, wanted) {
            let why = format!("{path} has no {first}-{last} here: see uids=");
            return Err(io::Error::other(why));
        }
    }
    let needed = CapabilitySet::SETUID | CapabilitySet::SETGID | CapabilitySet::CHOWN;
    if !capabilities(None)?.effective.contains(needed) {
        return Err(io::Error::other(
            "it takes CAP_SETUID, CAP_SETGID and CAP_CHOWN",
        ));
    }
    Ok(())
}

/// The daemon's own group, below the root of the hierarchy.
fn own_group() -> Option<PathBuf> {
    let text = fs::read_to_string("/proc/self/cgroup").ok()?;
    let path = text.lines().find_map(|line| line.strip_prefix("0::/"))?;
    Some(path.into())
}

/// Moves the daemon out of its control group where that is above the guests', as it is for a service with a delegated
/// group, into one beside theirs: a group with processes in it cannot limit the groups below it (cgroups(7), no
/// internal processes).
fn leave_parent_group(root: &Path, parent: &Path) -> io::Result<()> {
    let Some(own) = own_group().filter(|own| !own.as_os_str().is_empty()) else {
        return Ok(());
    };
    let parent = parent.strip_prefix("/").unwrap_or(parent);
    if !parent.starts_with(&own) {
        return Ok(());
    }
    let group = CgroupConfig {
        name: own.join("daemon"),
        ..CgroupConfig::default()
    };
    let procs = group.make(root)?.join("cgroup.procs");
    fs::write(&procs, "0").map_err(named(&procs))
}

impl Jails {
    /// What the operator gives all guests beside their own files.
    pub fn allowed(&self) -> &[PathBuf] {
        self.policy.as_ref().map_or(&[], |policy| &policy.allow)
    }

    /// Makes what the jails of guests have in common.
    ///
    /// # Errors
    /// The host's error; where `uids=` is asked for by a user who cannot become others.
    pub fn open(policy: Option<JailPolicy>) -> io::Result<Self> {
        let mut jails = Self {
            policy,
            limits_memory: false,
        };
        let Some(policy) = &mut jails.policy else {
            return Ok(jails);
        };
        if !geteuid().is_root() {
            if policy.uids.is_some() {
                return Err(invalid("uids=: only root's guests can become other users"));
            }
        } else if policy.uids.is_none() {
            match has_users(&UIDS) {
                Ok(()) => policy.uids = Some(UIDS),
                Err(why) if policy.require_all => return Err(why),
                // As in a container without these users.
                Err(why) => {
                    tracing::warn!(why = %chain(&why), "guests run as the daemon's user, in jails without users of their own");
                }
            }
        }
        for path in &mut policy.allow {
            *path = path.canonicalize().map_err(named(path))?;
        }
        if let Some(parent) = &policy.cgroup {
            let root = cgroup_root()?;
            if let Err(error) = leave_parent_group(&root, parent) {
                tracing::warn!(error = %chain(&error), "the daemon stays in its control group, which may keep guests from having limits");
            }
            let controllers = fs::read_to_string(root.join("cgroup.controllers"))?;
            jails.limits_memory = controllers.split_whitespace().any(|name| name == "memory");
            if !jails.limits_memory {
                let why = "cgroup=: the host's cgroup v2 has no memory controller";
                if policy.require_all {
                    return Err(io::Error::other(why));
                }
                tracing::warn!("--jail {why}: guests have groups without that limit");
            }
        }
        Ok(jails)
    }

    /// Gives a new guest a user that is not one of `taken`, and a control group, if guests are to be in jails.
    ///
    /// # Errors
    /// `NoUser`.
    pub fn assign(&self, id: &str, taken: &BTreeSet<u32>) -> Result<Option<JailResources>, Fault> {
        let Some(policy) = &self.policy else {
            return Ok(None);
        };
        let uid = policy.uids.as_ref().map(|uids| {
            let (first, last) = (*uids.start(), *uids.end());
            let begin = first + first_place(id, last - first);
            let mut turn = (begin..=last).chain(first..begin);
            let free = turn.find(|uid| !taken.contains(uid));
            free.ok_or(Fault::NoUser { first, last })
        });
        Ok(Some(JailResources {
            uid: uid.transpose()?,
            cgroup: policy.cgroup.as_ref().map(|parent| parent.join(id)),
        }))
    }

    /// What the jail of a guest whose record cannot be read has of the host, as far as that follows from its name and
    /// its folder. That has the group of the guest from its first start on; before, nothing is that user's.
    pub fn found(&self, id: &str, folder: &Path) -> Option<JailResources> {
        use std::os::unix::fs::MetadataExt;
        let policy = self.policy.as_ref()?;
        let gid = fs::symlink_metadata(folder).ok()?.gid();
        Some(JailResources {
            uid: Some(gid).filter(|gid| *gid != rustix::process::getegid().as_raw()),
            cgroup: policy.cgroup.as_ref().map(|parent| parent.join(id)),
        })
    }

    fn group(&self, jailed: &JailResources, ram_mib: u32) -> Option<CgroupConfig> {
        let policy = self.policy.as_ref()?;
        let ram = u64::from(ram_mib) << 20;
        Some(CgroupConfig {
            name: jailed.cgroup.clone()?,
            memory: self
                .limits_memory
                .then_some(ram + ram / MARGIN_PART + MARGIN),
            cpu: policy.cpu,
            pids: policy.pids,
            io: None,
        })
    }

    /// Makes the group of a guest of `ram_mib`, or gives it other limits.
    ///
    /// # Errors
    /// The host's error.
    fn limit(&self, jailed: &JailResources, ram_mib: u32) -> io::Result<()> {
        match self.group(jailed, ram_mib) {
            Some(group) => group.make(&cgroup_root()?).map(|_| ()),
            None => Ok(()),
        }
    }

    /// Makes the control group and the folder ready for the process of a guest that is about to start. Gives its jail,
    /// if it is to be in one.
    ///
    /// # Errors
    /// The host's error.
    pub fn prepare(
        &self,
        jailed: Option<&JailResources>,
        folder: &Path,
        ram_mib: u32,
    ) -> io::Result<Option<JailConfig>> {
        let (Some(policy), Some(jailed)) = (&self.policy, jailed) else {
            return Ok(None);
        };
        self.limit(jailed, ram_mib)?;
        if let Some(uid) = jailed.uid {
            give_folder(folder, uid).map_err(named(folder))?;
        }
        let own = own_disks(folder).map_err(named(folder))?;
        Ok(Some(jail_config(policy, jailed, own)))
    }
}

/// The jail of a guest's process, which works in its folder and has the files `own` there.
fn jail_config(policy: &JailPolicy, jailed: &JailResources, own: Vec<PathBuf>) -> JailConfig {
    let mut allow = vec![PathBuf::from(".")];
    allow.extend(own);
    allow.extend(policy.allow.iter().cloned());
    JailConfig {
        uid: jailed.uid,
        gid: jailed.uid,
        // The daemon has made it, with its limits.
        cgroup: jailed.cgroup(),
        allow,
        require_all: policy.require_all,
        shared: Some(SHARED.into()),
    }
}

/// Removes the control group of a guest whose process has ended, and the one beside it, if an image was being made.
///
/// # Errors
/// The host's error.
pub fn release(jailed: Option<&JailResources>) -> io::Result<()> {
    match jailed.and_then(JailResources::cgroup) {
        Some(group) => {
            let root = cgroup_root()?;
            group.remove(&root)?;
            // A process that makes an image in the background, after the end of the guest, removes it itself.
            let _ = group.for_image().remove(&root);
            Ok(())
        }
        None => Ok(()),
    }
}

/// Lets a guest's user write to the guest's folder, and gives that user the files in it that the daemon has made for
/// the guest, such as disks. The guest has no process. An earlier one may have put links there, which are not followed.
fn give_folder(path: &Path, uid: u32) -> io::Result<()> {
    let folder = open(
        path,
        OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::RDONLY,
        Mode::empty(),
    )?;
    fchown(&folder, None, Some(Gid::from_raw(uid)))?;
    fchmod(&folder, Mode::from_raw_mode(0o1770))?;
    for entry in fs::read_dir(path)? {
        let name = entry?.file_name();
        let is_record = RECORDS
            .iter()
            .any(|record| name.as_bytes().starts_with(record.as_bytes()));
        if is_record {
            continue;
        }
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = openat(&folder, &*name, flags, Mode::empty())?;
        let stat = fstat(&file)?;
        // A file with a second name may be one of the daemon's records.
        let is_new = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile
            && stat.st_nlink == 1
            && stat.st_uid == geteuid().as_raw();
        if is_new {
            let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(uid));
            chownat(file.as_fd(), "", Some(uid), Some(gid), AtFlags::EMPTY_PATH)?;
        }
    }
    Ok(())
}

/// Makes a new folder in a guest's, for the guest to write to.
///
/// # Errors
/// The host's error.
pub fn make_folder(path: &Path, jailed: Option<&JailResources>) -> io::Result<()> {
    let mut builder = fs::DirBuilder::new();
    builder.mode(0o700).create(path).map_err(named(path))?;
    match jailed.and_then(|jailed| jailed.uid) {
        Some(uid) => give_folder(path, uid).map_err(named(path)),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn jails(policy: JailPolicy) -> Jails {
        Jails {
            policy: Some(policy),
            limits_memory: true,
        }
    }

    #[test]
    fn guests_have_users_where_the_namespace_has_them() {
        let all = "         0          0 4294967295\n";
        let rootless = "0 1000 1\n1 100000 65536\n";
        assert!(maps(all, &UIDS) && maps(rootless, &(1..=65536)));
        assert!(!maps(rootless, &UIDS) && !maps(rootless, &(2..=65537)) && !maps("", &UIDS));
    }

    #[test]
    fn no_two_guests_have_the_same_user() {
        let jails = jails(JailPolicy {
            uids: Some(10..=13),
            cgroup: Some("guests".into()),
            ..JailPolicy::default()
        });
        // A guest whose record cannot be read has this user.
        let mut taken = BTreeSet::from([11]);
        let next = |taken: &BTreeSet<u32>| Some(jails.assign("g", taken).ok()??.uid.unwrap());
        let first = next(&taken);
        for _ in 0..3 {
            let uid = next(&taken).unwrap();
            assert!((10..=13).contains(&uid) && uid != 11);
            assert!(taken.insert(uid));
        }
        assert!(next(&taken).is_none());
        // A guest of the same name gets the same user again, where no other guest has it.
        taken.clear();
        assert_eq!(next(&taken), first);
        let jailed = jails.assign("g", &taken).unwrap().unwrap();
        assert_eq!(jailed.cgroup, Some("guests/g".into()));
    }

    #[test]
    fn a_process_gets_its_jail_with_paths_from_its_folder() {
        let policy = JailPolicy {
            allow: vec!["/disks/a,b".into()],
            require_all: true,
            ..JailPolicy::default()
        };
        let jailed = JailResources {
            uid: Some(7),
            cgroup: Some("guests/g".into()),
        };
        let jail = jail_config(&policy, &jailed, vec!["./d".into()]);
        let allow = [".", "./d", "/disks/a,b"].map(PathBuf::from);
        assert_eq!((jail.uid, jail.gid), (Some(7), Some(7)));
        assert_eq!(jail.cgroup.unwrap().name, Path::new("guests/g"));
        assert_eq!(jail.allow, allow);
        assert!(jail.require_all);
    }

    #[test]
    fn the_limit_of_memory_is_the_ram_and_a_margin() {
        let jails = jails(JailPolicy {
            cpu: Some(150),
            pids: Some(32),
            ..JailPolicy::default()
        });
        let jailed = JailResources {
            uid: None,
            cgroup: Some("g".into()),
        };
        let group = jails.group(&jailed, 128).unwrap();
        assert_eq!(group.memory, Some((128 + 8 + 64) << 20));
        assert_eq!((group.cpu, group.pids), (Some(150), Some(32)));
        assert_eq!(jails.group(&JailResources::default(), 128), None);
    }

    #[test]
    fn a_guest_is_given_its_disks_and_never_the_records_or_what_it_has_linked_there() {
        use std::os::unix::fs::{MetadataExt, symlink};
        if !skip::unless_root() {
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        for name in ["vm.json", "pid.json.new", "log", "disk", "outside"] {
            fs::write(path(name), "").unwrap();
        }
        fs::create_dir(path("vm")).unwrap();
        for name in ["vm.json", "disk"] {
            fs::rename(path(name), path("vm").join(name)).unwrap();
        }
        symlink(path("outside"), path("vm/link")).unwrap();
        fs::hard_link(path("vm/vm.json"), path("vm/name")).unwrap();
        give_folder(&path("vm"), 1234).unwrap();
        for name in ["vm/disk", "vm/a"] {
            fs::write(path(name), "vhdxfile").unwrap();
        }
        fs::hard_link(path("vm/a"), path("of a template")).unwrap();
        assert_eq!(own_disks(&path("vm")).unwrap(), [Path::new("./disk")]);
        let owner = |name: &str| {
            let metadata = fs::symlink_metadata(path(name)).unwrap();
            (metadata.uid(), metadata.gid())
        };
        assert_eq!(owner("vm"), (0, 1234));
        assert_eq!(owner("vm/disk"), (1234, 1234));
        for name in ["vm/vm.json", "vm/name", "vm/link", "outside"] {
            assert_eq!(owner(name), (0, 0), "{name}");
        }
        assert_eq!(fs::metadata(path("vm")).unwrap().mode() & 0o7777, 0o1770);
    }
}
