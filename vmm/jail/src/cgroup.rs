//! Control groups (v2): limits of the host's resources that the process may use.
//!
//! A process that jails itself makes its group and joins it. Where a daemon starts the process, the daemon makes the
//! group before and removes it afterwards, and the process only joins it.

use std::path::{Component, Path, PathBuf};
use std::time::Duration;
use std::{fs, io};

use serde::{Deserialize, Serialize};

use super::error::doing;
use host::report::chain;

/// A group and its limits. A limit that is absent is not set.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CgroupConfig {
    /// The group, by its path below the root of the hierarchy.
    pub name: PathBuf,
    /// Bytes of memory (`memory.max`).
    pub memory: Option<u64>,
    /// Percent of a core (`cpu.max`).
    pub cpu: Option<u32>,
    /// Processes and threads (`pids.max`).
    pub pids: Option<u32>,
    /// Share of the disks' time, 1 to 10000 (`io.weight`).
    pub io: Option<u16>,
}

/// How often a group has reached its limits since it was made; 0 where that is not known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LimitHits {
    /// Processes that the kernel has killed for want of memory (`memory.events`).
    pub killed: u64,
    /// Processes and threads that could not be made (`pids.events`).
    pub refused: u64,
}

/// The period of `cpu.max`, in microseconds.
const PERIOD: u64 = 100_000;

/// The files of all limits.
const LIMITS: [&str; 4] = ["memory.max", "cpu.max", "pids.max", "io.weight"];

/// How often the removal of a group is tried while its last process ends, and the pause between two attempts.
const REMOVE_ATTEMPTS: u32 = 50;
const REMOVE_PAUSE: Duration = Duration::from_millis(20);

/// The mount point of the v2 hierarchy, which may be the only one, or be beside those of v1.
///
/// # Errors
/// Where it is not mounted.
pub fn root() -> io::Result<PathBuf> {
    ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"]
        .map(PathBuf::from)
        .into_iter()
        .find(|root| root.join("cgroup.controllers").exists())
        .ok_or_else(|| io::Error::other("cgroup v2 is not mounted"))
}

fn write(path: &Path, value: &str) -> io::Result<()> {
    fs::write(path, value).map_err(doing(path.display().to_string()))
}

impl CgroupConfig {
    /// The files to write, with the controllers that they belong to.
    fn limits(&self) -> Vec<(&'static str, &'static str, String)> {
        let mut limits = Vec::new();
        if let Some(bytes) = self.memory {
            limits.push(("memory", "memory.max", bytes.to_string()));
        }
        if let Some(percent) = self.cpu {
            let quota = u64::from(percent) * PERIOD / 100;
            limits.push(("cpu", "cpu.max", format!("{quota} {PERIOD}")));
        }
        if let Some(most) = self.pids {
            limits.push(("pids", "pids.max", most.to_string()));
        }
        if let Some(weight) = self.io {
            limits.push(("io", "io.weight", format!("default {weight}")));
        }
        limits
    }

    /// The path of the group below `root`, which has to be made of plain names.
    fn relative(&self) -> io::Result<&Path> {
        let relative = self.name.strip_prefix("/").unwrap_or(&self.name);
        let plain = |part: Component<'_>| matches!(part, Component::Normal(_));
        if relative.as_os_str().is_empty() || !relative.components().all(plain) {
            let name = self.name.display();
            return Err(io::Error::other(format!(
                "{name} is not the name of a group"
            )));
        }
        Ok(relative)
    }

    /// Makes the group if it does not exist, and sets its limits, in the hierarchy of `root`.
    ///
    /// # Errors
    /// The host's error, with the file at fault.
    pub fn make(&self, root: &Path) -> io::Result<PathBuf> {
        let relative = self.relative()?;
        let limits = self.limits();
        let mut group = root.to_owned();
        for part in relative.components() {
            for (controller, ..) in &limits {
                // The controller may be enabled already. If it is not, writing the limit fails.
                let _ = fs::write(
                    group.join("cgroup.subtree_control"),
                    format!("+{controller}"),
                );
            }
            group.push(part);
            match fs::create_dir(&group) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                    return Err(doing(group.display().to_string())(error));
                }
                _ => {}
            }
        }
        for (_, file, value) in limits {
            write(&group.join(file), &value)?;
        }
        Ok(group)
    }

    /// The group beside this one, with its limits, for the guest whose memory becomes a reference image for this one's
    /// guest. Within this one, it would take memory and threads from it.
    #[must_use]
    pub fn for_image(&self) -> Self {
        let mut name = self.name.clone().into_os_string();
        // No guest has a name with a colon.
        name.push(":image");
        Self {
            name: name.into(),
            ..self.clone()
        }
    }

    /// Makes the group if it does not exist, with the limits that `other` beside it has in the hierarchy of `root`: who
    /// has made that may have set limits that are not known here.
    ///
    /// # Errors
    /// The host's error, with the file at fault.
    pub fn make_like(&self, other: &Self, root: &Path) -> io::Result<()> {
        let group = self.make(root)?;
        let other = root.join(other.relative()?);
        for file in LIMITS {
            match fs::read_to_string(other.join(file)) {
                Ok(limit) => write(&group.join(file), &limit)?,
                // Its controller is not enabled here.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(doing(other.join(file).display().to_string())(error)),
            }
        }
        Ok(())
    }

    /// Makes the group, and joins it.
    pub(super) fn join(&self) -> io::Result<()> {
        let group = self.make(&root()?)?;
        // The kernel takes 0 as the number of the process that writes it.
        write(&group.join("cgroup.procs"), "0")
    }

    /// How often the group has reached its limits.
    pub fn hits(&self) -> LimitHits {
        LimitHits {
            killed: self.event("memory.events", "oom_kill"),
            refused: self.event("pids.events", "max"),
        }
    }

    /// Why the kernel has killed a process of the group for want of memory, and what to do about it.
    pub fn shortage(&self) -> String {
        let name = self.name.display();
        if self.event("memory.events", "oom") == 0 {
            return format!(
                "the kernel killed the process for want of memory: not its own control group {name} had none left, but one above it or the host. \
                 Run fewer guests, or give them more memory, and start it again"
            );
        }
        format!(
            "the kernel killed the process for want of memory: its control group {name} wanted more than it may have (memory.max: {}). \
             Other guests lack nothing; give this one more RAM, or its group more memory, and start it again",
            self.limit("memory.max")
        )
    }

    /// Why a process of the group could start no thread, and what to do about it.
    pub fn few_threads(&self) -> String {
        format!(
            "its control group {} wanted more processes and threads than it may have (pids.max: {}); pids= of --jail says how many",
            self.name.display(),
            self.limit("pids.max")
        )
    }

    fn limit(&self, file: &str) -> String {
        let limit = self.read(file).map(|limit| limit.trim().to_owned());
        limit.unwrap_or_else(|error| chain(&error).to_string())
    }

    /// How often something has happened to the group (cgroup-v2.rst).
    fn event(&self, file: &str, name: &str) -> u64 {
        let events = self.read(file).unwrap_or_default();
        let mut events = events.lines().filter_map(|line| line.split_once(' '));
        let times = events.find_map(|(event, times)| (event == name).then_some(times));
        times.and_then(|times| times.parse().ok()).unwrap_or(0)
    }

    fn read(&self, file: &str) -> io::Result<String> {
        fs::read_to_string(root()?.join(self.relative()?).join(file))
    }

    /// Removes the group, which has no process any more; groups above it stay. A group that does not exist is no error.
    ///
    /// # Errors
    /// The host's error; also where the last process takes longer than a second to end.
    pub fn remove(&self, root: &Path) -> io::Result<()> {
        let group = root.join(self.relative()?);
        for again in 0.. {
            match fs::remove_dir(&group) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
                Err(error)
                    if error.kind() == io::ErrorKind::ResourceBusy && again < REMOVE_ATTEMPTS =>
                {
                    std::thread::sleep(REMOVE_PAUSE);
                }
                Err(error) => {
                    return Err(doing(group.display().to_string())(error));
                }
                Ok(()) => return Ok(()),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_written_as_the_kernel_reads_them() {
        let group = CgroupConfig {
            name: "guests/a".into(),
            memory: Some(64 << 20),
            cpu: Some(250),
            pids: Some(32),
            io: Some(50),
        };
        let written: Vec<_> = group
            .limits()
            .into_iter()
            .map(|(_, file, value)| format!("{file}={value}"))
            .collect();
        let expected = [
            "memory.max=67108864",
            "cpu.max=250000 100000",
            "pids.max=32",
            "io.weight=default 50",
        ];
        assert_eq!(written, expected);
    }

    #[test]
    fn a_group_lies_below_the_root_of_the_hierarchy() {
        for name in ["", "/", "../a", "a/../../b"] {
            let group = CgroupConfig {
                name: name.into(),
                ..CgroupConfig::default()
            };
            group.join().unwrap_err();
            group.remove(Path::new("/nowhere")).unwrap_err();
        }
    }

    #[test]
    fn the_group_for_an_image_gets_the_limits_that_the_one_beside_it_has() {
        let root = tempfile::tempdir().unwrap();
        let group = CgroupConfig {
            name: "guests/a".into(),
            memory: Some(1 << 20),
            pids: Some(8),
            ..CgroupConfig::default()
        };
        group.make(root.path()).unwrap();
        let known = CgroupConfig {
            name: group.name.clone(),
            ..CgroupConfig::default()
        };
        known.for_image().make_like(&known, root.path()).unwrap();
        let limit = |file: &str| fs::read_to_string(root.path().join("guests/a:image").join(file));
        assert_eq!(limit("memory.max").unwrap(), "1048576");
        assert_eq!(limit("pids.max").unwrap(), "8");
        limit("cpu.max").unwrap_err();
    }

    #[test]
    fn a_group_is_made_with_its_limits_and_removed_without_its_parents() {
        let root = tempfile::tempdir().unwrap();
        let group = CgroupConfig {
            name: "/guests/a".into(),
            memory: Some(1 << 20),
            pids: Some(8),
            ..CgroupConfig::default()
        };
        let made = group.make(root.path()).unwrap();
        assert_eq!(made, root.path().join("guests/a"));
        let read = |path: &Path| fs::read_to_string(path).unwrap();
        assert_eq!(read(&made.join("memory.max")), "1048576");
        assert_eq!(read(&made.join("pids.max")), "8");
        // In a real hierarchy, the files are removed with the folder.
        for file in ["memory.max", "pids.max"] {
            fs::remove_file(made.join(file)).unwrap();
        }
        group.make(root.path()).unwrap();
        for file in ["memory.max", "pids.max"] {
            fs::remove_file(made.join(file)).unwrap();
        }
        group.remove(root.path()).unwrap();
        assert!(!made.exists() && root.path().join("guests").exists());
        group.remove(root.path()).unwrap();
    }
}
