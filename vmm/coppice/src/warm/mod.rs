//! `coppice image warm`: boots a guest that is thrown away, and keeps what became of its kernel.
//!
//! ```text
//! who keeps the image ── the guest, its jail ─────────> who boots the guest (`guest`)
//!   cache, lock, name                                     jailed as any guest
//!   a new file, renamed  <── pages, how it ended ───────
//! ```
//!
//! The kernel may be anybody's, and may take over the process that boots it. So that process has no more than any guest
//! has, and the image is a file that it never had: see `answer` for what is believed of it.

mod answer;
mod guest;
mod initrd;
mod temporary;

use std::fs::{DirBuilder, File};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use memshare::ShareMode;
use rustix::fs::{FlockOperation, flock};

use answer::{Answer, Until, receive};
use config::{BootSourceConfig, SharingConfig, VmConfig};
use guest::{PATIENCE, WarmingGuest};
use host::report::chain;
use jail::{CgroupConfig, Confinement, JailConfig};
use kvm::boot::BootError;
use kvm::vm::{self, VmError};
use machine::reference::{Key, WarmRequest, WarmTerms};

pub use answer::AnswerError;
pub use guest::{WarmingGuestError, boot_and_tell};

/// How long the process of the guest may take beyond what its kernel may.
const MARGIN: Duration = Duration::from_mins(1);
/// Longest request in bytes: what a pipe takes at once.
const LONGEST_REQUEST: u64 = 64 << 10;

/// What became of a request for a reference image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WarmOutcome {
    /// The image was there already.
    Kept(PathBuf),
    /// It was made.
    Made {
        /// Where it is.
        path: PathBuf,
        /// Pages in it: those that differ from the kernel's file.
        pages: u64,
    },
}

/// Why there is no reference image.
#[derive(Debug, thiserror::Error)]
pub enum WarmError {
    /// The kernel.
    #[error(transparent)]
    Kernel(#[from] BootError),
    /// The host's KVM.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// The guest did not boot to its end.
    #[error("a guest with this kernel did not boot to its end")]
    NotBooted,
    /// It was tried before.
    #[error("an earlier guest with this kernel did not boot to its end: to try again, remove {}", .0.display())]
    FailedBefore(PathBuf),
    /// The kernel is none that can be mapped.
    #[error("the kernel is not mapped from the cache, so that its pages cannot be shared: {0}")]
    NotMapped(PathBuf),
    /// The request is for something else than what may be asked for.
    #[error("the kernel is no file of the cache of its domain: {0}")]
    NotOfCache(PathBuf),
    /// The guest's process.
    #[error("the process of the guest")]
    Answer(#[from] AnswerError),
    /// An operation on a file failed.
    #[error("{what}")]
    Io {
        /// The operation, or the file.
        what: String,
        /// The error of the host.
        source: io::Error,
    },
}

fn failed(what: impl Into<String>) -> impl FnOnce(io::Error) -> WarmError {
    let what = what.into();
    move |source| WarmError::Io { what, source }
}

/// Makes the reference image of a kernel, if it is not there, with a guest that is confined so. Of several that are
/// asked for at once, one is made at a time.
///
/// # Errors
/// [`WarmError`]. An empty file is left behind for a kernel that does not boot to its end, and nothing else.
pub fn warm(request: &WarmRequest, confinement: &Confinement) -> Result<WarmOutcome, WarmError> {
    let cpu = vm::cpu_model(request.size.vcpus)?;
    let domain = request.domain.as_deref();
    let cache = kvm::boot::cache_dir(domain);
    // As what unpacks kernels makes it: files in it may be readable for users who are given them, and not listed.
    let made = DirBuilder::new().recursive(true).mode(0o700).create(&cache);
    made.map_err(failed(cache.display().to_string()))?;
    let lock_path = cache.join(".warming");
    let lock = File::create(&lock_path).map_err(failed(lock_path.display().to_string()))?;
    flock(&lock, FlockOperation::LockExclusive)
        .map_err(|error| failed(lock_path.display().to_string())(error.into()))?;
    let kernel = kvm::boot::runtime_kernel(&request.kernel, domain)?;
    let kernel = kernel.ok_or_else(|| WarmError::NotMapped(request.kernel.clone()))?;
    let path = Key {
        kernel: &kernel,
        cpu: &cpu,
        size: request.size,
        cmdline: &request.cmdline,
    }
    .path();
    match path.metadata() {
        Ok(metadata) if metadata.len() == 0 => return Err(WarmError::FailedBefore(path)),
        Ok(_) => return Ok(WarmOutcome::Kept(path)),
        Err(_) => {}
    }
    temporary::remove_left_over(&cache).map_err(failed(cache.display().to_string()))?;
    let initrd = initrd::keep(&cache).map_err(failed("write an initrd"))?;
    let guest = WarmingGuest {
        confinement: confinement.clone(),
        config: configuration(request, kernel, initrd),
    };
    match image_of(guest, &path) {
        Ok(Answer::Booted { pages }) => Ok(WarmOutcome::Made { path, pages }),
        Ok(Answer::NotBooted) | Err(WarmError::Answer(AnswerError::Slow)) => {
            // Without the empty file, every later guest with this kernel would try again. No guest uses an empty image.
            File::create(&path).map_err(failed(path.display().to_string()))?;
            Err(WarmError::NotBooted)
        }
        Err(error) => Err(error),
    }
}

/// The guest: nothing but a kernel, and the program that powers off.
fn configuration(request: &WarmRequest, kernel: PathBuf, initrd: PathBuf) -> VmConfig {
    let mut config = VmConfig {
        boot_source: Some(BootSourceConfig {
            kernel_image_path: kernel,
            initrd_path: Some(initrd),
            boot_args: Some(format!("quiet panic=-1 reboot=k {}", request.cmdline)),
            // As the guests by default that are compared with it.
            lean: Some(true),
            ..BootSourceConfig::default()
        }),
        sharing: SharingConfig {
            mode: ShareMode::Boot,
            domain: request.domain.clone(),
            ..SharingConfig::default()
        },
        ..VmConfig::default()
    };
    config.machine_config.mem_size_mib = request.size.mem_mib;
    config.machine_config.vcpu_count = request.size.vcpus;
    config
}

/// Has a process boot the guest, and keeps what it tells as the image at `path`.
fn image_of(mut guest: WarmingGuest, path: &Path) -> Result<Answer, WarmError> {
    let ram = u64::from(guest.config.machine_config.mem_size_mib) << 20;
    let jail = guest.confinement.jail.get_or_insert_default();
    // It needs nothing but its kernel.
    jail.allow.clear();
    let group = own_group(jail).map_err(failed("control group"))?;
    let answered = with_process(&guest, |pipe| keep(pipe, ram, path));
    if let Some(group) = group {
        let removed = jail::cgroup_root().and_then(|root| group.remove(&root));
        if let Err(error) = removed {
            tracing::warn!(error = %chain(&error), group = %group.name.display(), "the control group stays behind");
        }
    }
    answered
}

/// Puts a group beside the guest's in the place of that, with its limits.
fn own_group(jail: &mut JailConfig) -> io::Result<Option<CgroupConfig>> {
    let Some(of_guest) = &mut jail.cgroup else {
        return Ok(None);
    };
    let own = of_guest.for_image();
    let root = jail::cgroup_root()?;
    own.make_like(of_guest, &root)?;
    *of_guest = CgroupConfig {
        name: own.name.clone(),
        ..CgroupConfig::default()
    };
    Ok(Some(own))
}

/// Starts the process of the guest, and ends it when `read` has read its answer.
fn with_process<T>(
    guest: &WarmingGuest,
    read: impl FnOnce(&mut dyn Read) -> Result<T, WarmError>,
) -> Result<T, WarmError> {
    let told = serde_json::to_vec(guest)
        .map_err(|error| failed("tell what guest to boot")(error.into()))?;
    let mut command = Command::new("/proc/self/exe");
    command
        .args(["image", "warming-guest"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped());
    let spawned = jail::spawn(command).map_err(failed("start the process of the guest"))?;
    let mut child = spawned.child;
    let (stdin, stdout) = (child.stdin.take(), child.stdout.take());
    let answered = match (stdin, stdout) {
        (Some(mut stdin), Some(stdout)) => {
            let sent = stdin.write_all(&told);
            drop(stdin);
            let pipe = Until::new(stdout, PATIENCE + MARGIN);
            sent.map_err(failed("tell what guest to boot"))
                .and_then(|()| read(&mut BufReader::with_capacity(64 << 10, pipe)))
        }
        _ => Err(failed("start the process of the guest")(
            io::ErrorKind::BrokenPipe.into(),
        )),
    };
    // All that it had to say has been read, or is not believed.
    let ended = child.kill().and_then(|()| child.wait());
    ended.map_err(failed("end the process of the guest"))?;
    answered
}

/// Keeps the image that an answer tells of at `path`, as a new file of this user's.
fn keep(answer: &mut dyn Read, ram: u64, path: &Path) -> Result<Answer, WarmError> {
    let io = |source| failed(path.display().to_string())(source);
    let folder = path.parent().unwrap_or(Path::new("/"));
    let file = temporary::make(folder, 0o600).map_err(io)?;
    let answer = receive(&mut &mut *answer, ram, file.as_file())?;
    if let Answer::Booted { .. } = answer {
        file.as_file().sync_data().map_err(io)?;
        file.persist(path).map_err(|error| io(error.error))?;
    }
    Ok(answer)
}

/// Makes the image that standard input asks for, as [`WarmTerms`] on it allow; `None` where it is closed instead.
///
/// # Errors
/// [`WarmError`].
pub fn warm_when_told() -> Result<Option<WarmOutcome>, WarmError> {
    let failed = || failed("read what image to make");
    let mut input = BufReader::new(io::stdin().lock());
    let mut line = Vec::new();
    input.read_until(b'\n', &mut line).map_err(failed())?;
    if line.is_empty() {
        return Ok(None);
    }
    let terms: WarmTerms = serde_json::from_slice(&line).map_err(|error| failed()(error.into()))?;
    // What comes now, a process sends that a guest may have taken over.
    let Some(only) = terms.only else {
        let mut request = Vec::new();
        input
            .take(LONGEST_REQUEST)
            .read_to_end(&mut request)
            .map_err(failed())?;
        if request.is_empty() {
            return Ok(None);
        }
        let request: WarmRequest =
            serde_json::from_slice(&request).map_err(|error| failed()(error.into()))?;
        if !request.is_of_cache() {
            return Err(WarmError::NotOfCache(request.kernel));
        }
        return warm(&request, &terms.confinement).map(Some);
    };
    let is_wanted = input.read(&mut [0]).map_err(failed())? == 1;
    is_wanted
        .then(|| warm(&only, &terms.confinement))
        .transpose()
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::MetadataExt;

    use memshare::PAGE_SIZE;

    use super::*;
    use answer::{tell_end, tell_page};

    const RAM: u64 = 2 * PAGE_SIZE;

    fn answer(pages: &[u64], end: Option<bool>) -> Vec<u8> {
        let mut bytes = Vec::new();
        for address in pages {
            tell_page(&mut bytes, *address, &[7; PAGE_SIZE as usize]).unwrap();
        }
        if let Some(has_booted) = end {
            tell_end(&mut bytes, has_booted).unwrap();
        }
        bytes
    }

    #[test]
    fn an_answer_that_is_not_believed_leaves_no_image() {
        let cache = tempfile::tempdir().unwrap();
        let path = cache.path().join("image");
        for bytes in [
            answer(&[0, RAM], Some(true)),
            answer(&[1], Some(true)),
            answer(&[0, PAGE_SIZE, 0], Some(true)),
            answer(&[0, PAGE_SIZE], None),
            answer(&[0], Some(true))[..4108].to_vec(),
            answer(&[0], Some(true))[..100].to_vec(),
            vec![],
        ] {
            let kept = keep(&mut &*bytes, RAM, &path);
            assert!(matches!(kept, Err(WarmError::Answer(_))), "{kept:?}");
            assert_eq!(fs::read_dir(cache.path()).unwrap().count(), 0, "{kept:?}");
        }
        assert_eq!(
            keep(&mut &*answer(&[0], Some(false)), RAM, &path).unwrap(),
            Answer::NotBooted
        );
        assert!(!path.exists());
    }

    #[test]
    fn an_image_is_a_new_file_of_who_keeps_it() {
        let cache = tempfile::tempdir().unwrap();
        let path = cache.path().join("image");
        let kept = keep(&mut &*answer(&[PAGE_SIZE], Some(true)), RAM, &path).unwrap();
        assert_eq!(kept, Answer::Booted { pages: 1 });
        let metadata = path.metadata().unwrap();
        assert_eq!((metadata.len(), metadata.nlink()), (RAM, 1));
        assert_eq!(metadata.uid(), rustix::process::geteuid().as_raw());
        assert_eq!(metadata.mode() & 0o077, 0);
    }
}
