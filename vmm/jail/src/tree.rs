//! The tree: a root folder with what the guest needs, under the names it has on the host, and nothing else.
//!
//! Each file or folder is a mount of its own, which is opened before the host's tree is out of reach. The new root is a
//! file system in memory, which is made read-only when all mounts are attached.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::fs::{AtFlags, CWD, Mode, OFlags, mkdirat, openat, statat, symlinkat};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags,
    OpenTreeFlags, UnmountFlags, fsconfig_create, fsconfig_set_string, fsmount, fsopen,
    mount_change, move_mount, open_tree, unmount,
};
use rustix::process::{chroot, fchdir, pivot_root};

use super::error;

use super::need::{Access, Need};

/// The size of the file system itself, which holds folders, links and empty files.
const SIZE: &str = "1m";
/// Where the new root is mounted until it becomes the root. The mount covers what is there.
const TEMPORARY_MOUNT: &str = "/proc";

/// A mount that is not attached yet.
struct Mount<'a> {
    need: &'a Need,
    tree: OwnedFd,
    is_folder: bool,
}

fn failed_to(what: &str, path: &Path) -> impl FnOnce(Errno) -> io::Error {
    let failed = error::doing(format!("{what} {}", path.display()));
    move |error| failed(error.into())
}

/// Moves the process into a tree of the files that it needs. The process has a mount namespace of its own.
pub(super) fn enter(needs: &[Need]) -> io::Result<()> {
    let cwd = std::env::current_dir()?;
    let root = Path::new("/");
    mount_change(
        "/",
        MountPropagationFlags::PRIVATE | MountPropagationFlags::REC,
    )
    .map_err(failed_to("keep to itself the mounts of", root))?;
    let own = needs
        .iter()
        .filter(|need| !is_covered_by_a_folder(need, needs));
    let mounts: Vec<_> = own.map(open_mount).collect::<Result<_, _>>()?;
    let tree = new_root()?;
    move_mount(
        &tree,
        "",
        CWD,
        TEMPORARY_MOUNT,
        MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH,
    )
    .map_err(failed_to("mount on", Path::new(TEMPORARY_MOUNT)))?;
    if let Err(error) = fill_and_pivot(&tree, &mounts, &cwd) {
        // The process goes on without a tree, and /proc is uncovered again.
        let _ = unmount(TEMPORARY_MOUNT, UnmountFlags::DETACH);
        let _ = std::env::set_current_dir(cwd);
        return Err(error);
    }
    set_attributes(tree.as_fd(), libc::MOUNT_ATTR_RDONLY, false)?;
    std::env::set_current_dir("/")?;
    std::env::set_current_dir(&cwd)
}

fn fill_and_pivot(tree: &OwnedFd, mounts: &[Mount<'_>], cwd: &Path) -> io::Result<()> {
    for mount in mounts {
        let target = mount.need.target.as_path();
        attach(tree.as_fd(), mount).map_err(failed_to("put in place", target))?;
    }
    make_folders(tree.as_fd(), cwd).map_err(failed_to("make", cwd))?;
    let process = std::process::id().to_string();
    symlinkat(process, tree, "proc/self").map_err(failed_to("make", Path::new("/proc/self")))?;
    let root = Path::new("/");
    fchdir(tree).map_err(failed_to("enter", root))?;
    match pivot_root(".", ".") {
        // The old root is mounted on the new one, and covers the working directory of this process, so that "." names
        // it.
        Ok(()) => unmount(".", UnmountFlags::DETACH).map_err(failed_to("unmount", root)),
        // The first root of the kernel (initramfs) cannot be exchanged, but it can be covered: a process that may not
        // call chroot(2) cannot reach what is covered.
        Err(Errno::INVAL) => {
            move_mount(tree, "", CWD, "/", MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
                .map_err(failed_to("cover", root))?;
            chroot(".").map_err(failed_to("change to", root))
        }
        Err(error) => Err(failed_to("pivot_root to", root)(error)),
    }
}

/// Whether a file that is written to is in a folder that is written to, too. If it were a mount of its own, it could
/// neither be removed nor replaced.
fn is_covered_by_a_folder(need: &Need, needs: &[Need]) -> bool {
    let above = needs.iter().filter(|other| {
        other.target != need.target
            && need.target.starts_with(&other.target)
            && other.source.is_dir()
    });
    let nearest = above.max_by_key(|folder| folder.target.components().count());
    need.access == Access::Write
        && nearest.is_some_and(|folder| {
            let inside = |path: &Path, folder: &Path| path.strip_prefix(folder).map(Path::to_owned);
            folder.access == Access::Write
                && inside(&need.source, &folder.source).is_ok_and(|rest| {
                    inside(&need.target, &folder.target).is_ok_and(|other| other == rest)
                })
        })
}

fn new_root() -> io::Result<OwnedFd> {
    let failed = || failed_to("make", Path::new("tmpfs"));
    let context = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC).map_err(failed())?;
    fsconfig_set_string(&context, "size", SIZE).map_err(failed())?;
    fsconfig_set_string(&context, "mode", "0755").map_err(failed())?;
    fsconfig_create(&context).map_err(failed())?;
    fsmount(
        &context,
        FsMountFlags::FSMOUNT_CLOEXEC,
        MountAttrFlags::MOUNT_ATTR_NOSUID
            | MountAttrFlags::MOUNT_ATTR_NODEV
            | MountAttrFlags::MOUNT_ATTR_NOEXEC,
    )
    .map_err(failed())
}

/// Opens a copy of the mount of a file or folder, with no more rights than are needed.
fn open_mount(need: &Need) -> io::Result<Mount<'_>> {
    let is_folder = need.source.is_dir();
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    if is_folder {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    let tree = open_tree(CWD, &need.source, flags)
        .map_err(failed_to("open the mount of", &need.source))?;
    let attributes = libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NOEXEC;
    let attributes = attributes
        | match need.access {
            Access::Read | Access::Connect => libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NODEV,
            Access::Write | Access::Remove => libc::MOUNT_ATTR_NODEV,
            Access::Device => 0,
        };
    // A device that `allow=` names has to stay a device.
    let attributes = if is_folder || need.source.is_file() {
        attributes
    } else {
        attributes & !libc::MOUNT_ATTR_NODEV
    };
    set_attributes(tree.as_fd(), attributes, is_folder)?;
    Ok(Mount {
        need,
        tree,
        is_folder,
    })
}

/// Adds attributes (`MOUNT_ATTR_*`) to a mount, and to those below it if `recursive` is set.
fn set_attributes(mount: BorrowedFd<'_>, attributes: u64, recursive: bool) -> io::Result<()> {
    let attributes = libc::mount_attr {
        attr_set: attributes,
        attr_clr: 0,
        propagation: 0,
        userns_fd: 0,
    };
    let recursive = if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: mount_setattr(2) reads an empty path and a `mount_attr` of the length that is given, both of which live
    // through the call.
    let set = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | recursive,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    if set == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// An absolute path, as a relative one from the root.
fn relative(path: &Path) -> &Path {
    path.strip_prefix("/").unwrap_or(path)
}

fn make_folders(root: BorrowedFd<'_>, path: &Path) -> rustix::io::Result<()> {
    let mut folders: Vec<_> = relative(path).ancestors().collect();
    // The last ancestor is the root itself.
    folders.pop();
    for folder in folders.into_iter().rev() {
        match mkdirat(root, folder, Mode::from_raw_mode(0o755)) {
            Ok(()) | Err(Errno::EXIST) => {}
            // The folder exists, in a folder that is mounted read-only.
            Err(_) if statat(root, folder, AtFlags::empty()).is_ok() => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Makes the file or folder that a mount is attached to, if it does not exist, and attaches the mount.
fn attach(root: BorrowedFd<'_>, mount: &Mount<'_>) -> rustix::io::Result<()> {
    let target = relative(&mount.need.target);
    if mount.is_folder {
        make_folders(root, target)?;
    } else {
        make_folders(root, target.parent().unwrap_or(Path::new("")))?;
        if statat(root, target, AtFlags::empty()).is_err() {
            let flags = OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC | OFlags::RDONLY;
            openat(root, target, flags, Mode::from_raw_mode(0o444))?;
        }
    }
    let target = CString::new(target.as_os_str().as_bytes()).map_err(|_| Errno::INVAL)?;
    move_mount(
        &mount.tree,
        "",
        root,
        target.as_c_str(),
        MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_writable_file_in_a_writable_folder_is_covered_by_the_folder() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        std::fs::create_dir_all(at("own/below")).unwrap();
        std::fs::create_dir(at("read")).unwrap();
        let need = |source: &str, target: &str, access| Need {
            source: at(source),
            target: at(target),
            access,
            vital: None,
        };
        let comes = |source: &str, target: &str, access, folder: Access| {
            let file = need(source, target, access);
            let needs = [
                need("own", "own", Access::Write),
                need("own/below", "own/below", folder),
                file.clone(),
            ];
            is_covered_by_a_folder(&file, &needs)
        };
        let (read, write) = (Access::Read, Access::Write);
        assert!(comes("own/disk", "own/disk", write, read));
        assert!(comes("own/below/disk", "own/below/disk", write, write));
        assert!(!comes("own/below/disk", "own/below/disk", write, read));
        assert!(!comes("own/disk", "own/disk", read, read));
        assert!(!comes("other", "own/disk", write, read));
        assert!(!comes("own", "own", write, read));
    }
}
