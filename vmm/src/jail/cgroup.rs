//! Control groups (v2): limits of what the process takes of the host.

use std::path::{Component, Path, PathBuf};
use std::{fs, io};

/// A group and its limits; what is absent is not limited.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
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

/// The period of `cpu.max`, in microseconds.
const PERIOD: u64 = 100_000;

/// Where the v2 hierarchy is mounted: alone, or beside those of v1.
fn root() -> io::Result<PathBuf> {
    ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"]
        .map(PathBuf::from)
        .into_iter()
        .find(|root| root.join("cgroup.controllers").exists())
        .ok_or_else(|| io::Error::other("cgroup v2 is not mounted"))
}

fn write(path: &Path, value: &str) -> io::Result<()> {
    fs::write(path, value)
        .map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", path.display())))
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

    /// Makes the group where it is not there, sets its limits, and joins it.
    pub(super) fn join(&self) -> io::Result<()> {
        let relative = self.name.strip_prefix("/").unwrap_or(&self.name);
        let plain = |part: Component<'_>| matches!(part, Component::Normal(_));
        if relative.as_os_str().is_empty() || !relative.components().all(plain) {
            let name = self.name.display();
            return Err(io::Error::other(format!(
                "{name} is not the name of a group"
            )));
        }
        let limits = self.limits();
        let mut group = root()?;
        for part in relative.components() {
            for (controller, ..) in &limits {
                // It may be given on already, and the limit tells if it is not.
                let _ = fs::write(
                    group.join("cgroup.subtree_control"),
                    format!("+{controller}"),
                );
            }
            group.push(part);
            match fs::create_dir(&group) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                    let group = group.display();
                    return Err(io::Error::new(error.kind(), format!("{group}: {error}")));
                }
                _ => {}
            }
        }
        for (_, file, value) in limits {
            write(&group.join(file), &value)?;
        }
        // 0 is who writes.
        write(&group.join("cgroup.procs"), "0")
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
        }
    }
}
