//! Landlock: allows the files that the guest needs and no others, also where there is no mount namespace.

use std::io;

use landlock::{
    ABI, Access as _, AccessFs, AccessNet, BitFlags, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetStatus, Scope,
};

use super::need::{Access, Need};

/// The newest ABI that is used. Rights that an older kernel does not know are left out.
const FILES: ABI = ABI::V9;

fn rights(need: &Need, is_folder: bool) -> BitFlags<AccessFs> {
    let file: BitFlags<AccessFs> = match need.access {
        Access::Read => AccessFs::ReadFile.into(),
        Access::Write => {
            AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::Truncate | AccessFs::ResolveUnix
        }
        Access::Device => AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::IoctlDev,
        Access::Remove => return AccessFs::RemoveFile.into(),
        Access::Connect => AccessFs::ResolveUnix.into(),
    };
    match (need.access, is_folder) {
        (_, false) => file,
        (Access::Write, true) => {
            file | AccessFs::ReadDir
                | AccessFs::MakeReg
                | AccessFs::MakeSock
                | AccessFs::RemoveFile
                | AccessFs::MakeDir
                | AccessFs::RemoveDir
                | AccessFs::Refer
        }
        (Access::Read | Access::Device | Access::Remove | Access::Connect, true) => {
            file | AccessFs::ReadDir
        }
    }
}

/// Whether the kernel has Landlock.
pub(super) fn is_available() -> bool {
    const VERSION: libc::c_long = 1;
    // SAFETY: with this flag, landlock_create_ruleset(2) reads no memory, and returns a number.
    let version = unsafe {
        libc::syscall(
            libc::SYS_landlock_create_ruleset,
            std::ptr::null::<libc::c_void>(),
            0usize,
            VERSION,
        )
    };
    version > 0
}

/// Restricts this thread and all threads that it starts from now on.
///
/// The files are named as the process sees them: by their targets if it is in a tree.
pub(super) fn enter(needs: &[Need], in_tree: bool) -> io::Result<()> {
    let mut ruleset = Ruleset::default()
        .handle_access(AccessFs::from_all(FILES))
        .and_then(|ruleset| ruleset.handle_access(AccessNet::from_all(ABI::V4)))
        .and_then(|ruleset| ruleset.scope(Scope::from_all(ABI::V6)))
        .and_then(Ruleset::create)
        .map_err(io::Error::other)?;
    for need in needs {
        // A file that does not exist needs no rule.
        let path = if in_tree { &need.target } else { &need.source };
        let (Ok(opened), is_folder) = (PathFd::new(path), path.is_dir()) else {
            continue;
        };
        let rights = rights(need, is_folder);
        ruleset = ruleset
            .add_rule(PathBeneath::new(opened, rights))
            .map_err(io::Error::other)?;
    }
    let status = ruleset.restrict_self().map_err(io::Error::other)?;
    match status.ruleset {
        RulesetStatus::NotEnforced => Err(io::Error::other("the kernel does not have it")),
        RulesetStatus::PartiallyEnforced | RulesetStatus::FullyEnforced => Ok(()),
    }
}
