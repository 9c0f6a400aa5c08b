//! `coppice image warm`: boots a guest that is thrown away, and keeps what became of its kernel.

mod initrd;

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use event_manager::EventManager;
use memshare::{ShareMode, is_zero};
use parking_lot::Mutex;
use rustix::fs::{FlockOperation, flock};
use vmm_sys_util::eventfd::EventFd;

use config::{BootSourceConfig, SharingConfig, VmConfig};
use host::exit::GuestEnd;
use kvm::vm::{self, VmError};
use machine::reference::{Key, WarmRequest, text_words};
use machine::{Machine, StartError, Subscriber, Surroundings, VsockHost};

/// How long a kernel may take to boot and power off; one that takes longer is taken to hang.
const PATIENCE: Duration = Duration::from_mins(2);

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
    /// The guest does not start.
    #[error(transparent)]
    Start(#[from] StartError),
    /// The host's KVM.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// The guest ended otherwise than by powering off.
    #[error("the guest did not boot to its end: {0:?}")]
    End(GuestEnd),
    /// The guest did not end.
    #[error("the guest has not booted within {PATIENCE:?}")]
    Slow,
    /// It was tried before.
    #[error("an earlier guest with this kernel did not boot to its end: to try again, remove {}", .0.display())]
    FailedBefore(PathBuf),
    /// The kernel is none that can be mapped.
    #[error("the kernel is not mapped from the cache, so that its pages cannot be shared: {0}")]
    NotMapped(PathBuf),
    /// The event loop.
    #[error("event loop")]
    EventLoop(#[from] event_manager::Error),
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

/// Makes the reference image of a kernel, if it is not there. Of several that are asked for at once, one is made at a
/// time.
///
/// # Errors
/// [`WarmError`]. An empty file is left behind for a kernel that does not boot to its end, and nothing else.
pub fn warm(request: &WarmRequest) -> Result<WarmOutcome, WarmError> {
    let size = request.size.representative();
    let cpu = vm::cpu_model(size.vcpus)?;
    let mut initrd = tempfile::NamedTempFile::new().map_err(failed("make an initrd"))?;
    initrd::archive()
        .and_then(|archive| initrd.write_all(&archive))
        .map_err(failed("write an initrd"))?;
    let domain = request.domain.as_deref();
    let cache = kvm::boot::cache_dir(domain);
    std::fs::create_dir_all(&cache).map_err(failed(cache.display().to_string()))?;
    let lock_path = cache.join(".warming");
    let lock = File::create(&lock_path).map_err(failed(lock_path.display().to_string()))?;
    flock(&lock, FlockOperation::LockExclusive)
        .map_err(|error| failed(lock_path.display().to_string())(error.into()))?;
    let kernel = kvm::boot::runtime_kernel(&request.kernel, domain).map_err(StartError::from)?;
    let kernel = kernel.ok_or_else(|| WarmError::NotMapped(request.kernel.clone()))?;
    let path = Key {
        kernel: &kernel,
        cpu: &cpu,
        size,
        cmdline: &request.cmdline,
    }
    .path();
    match path.metadata() {
        Ok(metadata) if metadata.len() == 0 => return Err(WarmError::FailedBefore(path)),
        Ok(_) => return Ok(WarmOutcome::Kept(path)),
        Err(_) => {}
    }
    let mut cmdline = "quiet panic=-1 reboot=k".to_owned();
    for word in text_words(&request.cmdline) {
        cmdline.push(' ');
        cmdline.push_str(word);
    }
    let mut config = VmConfig {
        boot_source: Some(BootSourceConfig {
            kernel_image_path: request.kernel.clone(),
            initrd_path: Some(initrd.path().to_owned()),
            boot_args: Some(cmdline),
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
    config.machine_config.mem_size_mib = size.mem_mib;
    config.machine_config.vcpu_count = size.vcpus;
    match boot_and_keep(&config, &path) {
        Ok(pages) => Ok(WarmOutcome::Made { path, pages }),
        Err(error @ (WarmError::End(_) | WarmError::Slow)) => {
            // Without the empty file, every later guest with this kernel would try again. No guest uses an empty image.
            File::create(&path).map_err(failed(path.display().to_string()))?;
            Err(error)
        }
        Err(error) => Err(error),
    }
}

/// Makes the image that a [`WarmRequest`] on standard input asks for; `None` where standard input is closed without
/// one.
///
/// # Errors
/// [`WarmError`].
pub fn warm_when_told() -> Result<Option<WarmOutcome>, WarmError> {
    let mut text = Vec::new();
    let read = io::stdin().read_to_end(&mut text);
    let request = read.and_then(|_| {
        if text.is_empty() {
            return Ok(None);
        }
        Ok(Some(serde_json::from_slice::<WarmRequest>(&text)?))
    });
    let request = request.map_err(|source| WarmError::Io {
        what: "read what image to make".to_owned(),
        source,
    })?;
    request.as_ref().map(warm).transpose()
}

fn boot_and_keep(config: &VmConfig, path: &Path) -> Result<u64, WarmError> {
    let mut manager = EventManager::<Subscriber>::new_with_capacity(8)?;
    let (sender, end) = mpsc::channel();
    let sender = Mutex::new(sender);
    let on_end = Arc::new(move |how: GuestEnd| {
        // It fails only where the receiver has given up waiting.
        let _ = sender.lock().send(how);
    });
    let nowhere = File::options().write(true).open("/dev/null");
    let surroundings = Surroundings {
        serial_out: nowhere.map_err(failed("open /dev/null"))?.into(),
        serial_drained: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
            .map_err(failed("make an eventfd"))?,
        on_end,
        warm: None,
        vsock: VsockHost::default(),
    };
    let started = Instant::now();
    let mut machine = Machine::start(config, &mut manager, surroundings)?;
    let mut how = None;
    while how.is_none() && started.elapsed() < PATIENCE {
        manager.run_with_timeout(50)?;
        how = end.try_recv().ok();
    }
    machine.pause();
    let kept = match how.or_else(|| end.try_recv().ok()) {
        Some(GuestEnd::PowerOff) => keep(&machine, path),
        Some(other) => Err(WarmError::End(other)),
        None => Err(WarmError::Slow),
    };
    machine.shutdown();
    kept
}

/// Writes the guest's own pages, each at its address. Pages of zeros are left out, except in the range of the kernel:
/// from such a page a later guest learns beforehand that its kernel is going to write there.
fn keep(machine: &Machine, path: &Path) -> Result<u64, WarmError> {
    let io = |source| failed(path.display().to_string())(source);
    let kernel = machine
        .kernel()
        .ok_or_else(|| WarmError::NotMapped(path.to_owned()))?;
    let folder = path.parent().unwrap_or(Path::new("/"));
    let file = tempfile::Builder::new()
        .prefix(".warming-")
        .tempfile_in(folder)
        .map_err(io)?;
    let (mut pages, mut end, mut written) = (0, 0, Ok(()));
    let memory = machine.shared_memory();
    for region in memory.regions() {
        let len = region.window.len();
        end = end.max(region.start + len);
        memory
            .own_pages(region.start, len, |address, bytes| {
                if written.is_ok() && (kernel.contains(&address) || !is_zero(bytes)) {
                    pages += 1;
                    written = file.as_file().write_all_at(bytes, address);
                }
            })
            .map_err(io)?;
    }
    written.map_err(io)?;
    file.as_file().set_len(end).map_err(io)?;
    file.as_file().sync_data().map_err(io)?;
    file.persist(path).map_err(|error| io(error.error))?;
    Ok(pages)
}
