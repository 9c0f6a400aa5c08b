//! What the host's kernel offers beside KVM: asynchronous I/O, and the means to confine a guest process.

use std::fs;
use std::path::Path;

use io_uring::IoUring;

use super::check::Check;
use super::syscall;
use host::report::chain;

const IO_URING: &str = "io_uring";
const CGROUP: &str = "cgroup_v2";
const LANDLOCK: &str = "landlock";
const SECCOMP: &str = "seccomp";

/// The controllers that limit a guest process.
const CONTROLLERS: [&str; 3] = ["cpu", "memory", "pids"];

pub(super) fn checks() -> Vec<Check> {
    vec![io_uring(), cgroup_v2(), landlock(), seccomp()]
}

fn io_uring() -> Check {
    match IoUring::new(2) {
        Ok(_) => Check::ok(IO_URING, "a ring can be set up"),
        Err(error) => Check::warn(
            IO_URING,
            format!(
                "no ring can be set up: {}; disks use a worker thread instead",
                chain(&error)
            ),
            "sysctl -w kernel.io_uring_disabled=0, and allow io_uring in the container's seccomp profile",
        ),
    }
}

fn cgroup_v2() -> Check {
    let advice = "boot the host with systemd.unified_cgroup_hierarchy=1";
    let mounts = match fs::read_to_string("/proc/self/mountinfo") {
        Ok(mounts) => mounts,
        Err(error) => {
            let found = format!("/proc/self/mountinfo cannot be read: {}", chain(&error));
            return Check::warn(CGROUP, found, "mount /proc");
        }
    };
    let Some(mount) = cgroup2_mount(&mounts) else {
        return Check::warn(CGROUP, "not mounted: no limits for guests", advice);
    };
    let list = Path::new(mount).join("cgroup.controllers");
    let controllers = fs::read_to_string(&list).unwrap_or_default();
    let missing = missing_controllers(&controllers);
    if missing.is_empty() {
        Check::ok(CGROUP, format!("{mount}, with {}", CONTROLLERS.join(", ")))
    } else {
        let found = format!("{mount}, without {}", missing.join(", "));
        Check::warn(CGROUP, found, advice)
    }
}

/// Where cgroup v2 is mounted, by `/proc/self/mountinfo` (proc(5): the mount point is field 5, the type follows the ` -
/// `).
fn cgroup2_mount(mountinfo: &str) -> Option<&str> {
    mountinfo.lines().find_map(|line| {
        let (mount, file_system) = line.split_once(" - ")?;
        let is_cgroup2 = file_system.split(' ').next() == Some("cgroup2");
        mount.split(' ').nth(4).filter(|_| is_cgroup2)
    })
}

fn missing_controllers(available: &str) -> Vec<&'static str> {
    CONTROLLERS
        .into_iter()
        .filter(|wanted| !available.split_whitespace().any(|name| name == *wanted))
        .collect()
}

fn landlock() -> Check {
    match syscall::landlock_abi() {
        Ok(version) => Check::ok(LANDLOCK, format!("ABI version {version}")),
        Err(error) => Check::warn(
            LANDLOCK,
            format!("not available: {}", chain(&error)),
            "use Linux 5.13 or newer with Landlock, and name landlock in the kernel parameter lsm=",
        ),
    }
}

fn seccomp() -> Check {
    match syscall::seccomp_can_kill() {
        Ok(()) => Check::ok(SECCOMP, "filters can end a process"),
        Err(error) => Check::warn(
            SECCOMP,
            format!("not available: {}", chain(&error)),
            "use Linux 4.14 or newer with CONFIG_SECCOMP_FILTER",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HYBRID: &str = "\
30 24 0:26 / /sys/fs/cgroup ro,nosuid - tmpfs tmpfs ro,mode=755
31 30 0:27 / /sys/fs/cgroup/memory rw shared:9 - cgroup cgroup rw,memory
32 30 0:28 / /sys/fs/cgroup/unified rw,nosuid shared:10 master:1 - cgroup2 cgroup2 rw
";

    #[test]
    fn cgroup_v2_is_found_by_type_wherever_it_is_mounted() {
        assert_eq!(cgroup2_mount(HYBRID), Some("/sys/fs/cgroup/unified"));
        let unified = "29 23 0:26 / /sys/fs/cgroup rw - cgroup2 none rw,nsdelegate\n";
        assert_eq!(cgroup2_mount(unified), Some("/sys/fs/cgroup"));
        assert_eq!(
            cgroup2_mount("30 24 0:26 / /cgroup2 rw - tmpfs x rw\n"),
            None
        );
        assert_eq!(cgroup2_mount("garbage\n\n - cgroup2"), None);
    }

    #[test]
    fn controllers_are_compared_by_whole_name() {
        assert_eq!(missing_controllers("cpuset cpu io memory pids\n"), [""; 0]);
        assert_eq!(missing_controllers("cpuset io\n"), CONTROLLERS);
    }
}
