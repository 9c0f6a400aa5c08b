//! The guest whose memory becomes a reference image, in the background of another: its jail, and who may ask for what.

use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use jail::{Confinement, JailConfig, SeccompMode};
use machine::reference::{Size, WarmRequest, WarmTerms};

use super::host::USER;
use super::{HANG, field, kernel_of, reachable, tiny_kernel};

/// RAM in MiB of the guests.
const RAM: u32 = 32;

/// A kernel, and a cache for it.
struct Kernel {
    folder: tempfile::TempDir,
}

impl Kernel {
    fn new(bytes: &[u8]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::set_permissions(&folder, fs::Permissions::from_mode(0o755)).unwrap();
        let kernel = Self { folder };
        fs::write(kernel.path(), bytes).unwrap();
        kernel
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("kernel")
    }

    fn cache(&self) -> PathBuf {
        self.folder.path().join("coppice/kernels")
    }

    /// `coppice`, with this cache.
    fn coppice(&self, words: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_coppice"));
        command
            .args(words)
            .env("XDG_CACHE_HOME", self.folder.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        command
    }

    /// A guest with this kernel, which has to have an image made.
    fn run(&self, jail: &[&str]) -> Child {
        let mut command = self.coppice(&["run", "--mem"]);
        command.arg(format!("{RAM}M")).arg("--kernel");
        command.arg(self.path()).args(jail).spawn().unwrap()
    }

    /// Files of the cache, of all domains, with an ending.
    fn cached(&self, ending: &str) -> Vec<PathBuf> {
        let entries = fs::read_dir(self.cache()).into_iter().flatten().flatten();
        let paths = entries.map(|entry| entry.path());
        paths
            .filter(|path| path.extension().is_some_and(|end| end == ending))
            .collect()
    }

    fn images(&self) -> Vec<PathBuf> {
        self.cached("reference")
    }

    /// What becomes of the process that makes images if it is told this.
    fn told(&self, terms: &WarmTerms, then: &[u8]) -> (bool, String) {
        let mut child = self
            .coppice(&["image", "warm-when-told"])
            .stdin(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let line = [&serde_json::to_vec(terms).unwrap()[..], b"\n", then].concat();
        child.stdin.take().unwrap().write_all(&line).unwrap();
        let output = child.wait_with_output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        (output.status.success(), said)
    }
}

fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !is_so() {
        assert!(begun.elapsed() < Duration::from_secs(20), "{what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// The processes whose parent is `parent`.
fn children(parent: u32) -> Vec<u32> {
    let threads = fs::read_dir(format!("/proc/{parent}/task"));
    let children: String = threads
        .into_iter()
        .flatten()
        .flatten()
        .flat_map(|thread| fs::read_to_string(thread.path().join("children")))
        .collect();
    let numbers = children.split_whitespace();
    numbers.map(|pid| pid.parse().unwrap()).collect()
}

/// The one of them that was started with a word.
fn child_of(parent: u32, word: &str) -> Option<u32> {
    children(parent).into_iter().find(|pid| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        line.split(|byte| *byte == 0)
            .any(|of_line| of_line == word.as_bytes())
    })
}

fn kill(pid: u32) {
    let pid = rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
}

#[test]
fn the_guest_of_an_image_is_jailed_as_the_one_that_wants_it_and_has_no_file_of_the_cache_for_writing()
 {
    if !skip::unless_root() {
        return;
    }
    let kernel = Kernel::new(&kernel_of(&HANG));
    fs::set_permissions(kernel.path(), fs::Permissions::from_mode(0o644)).unwrap();
    let mut run = kernel.run(&["--jail", &format!("uid={USER},gid={USER}")]);
    let (mut keeper, mut guest) = (None, None);
    until("there is a process for the image", || {
        keeper = child_of(run.id(), "warm-when-told");
        guest = keeper.and_then(|keeper| child_of(keeper, "warming-guest"));
        guest.is_some()
    });
    let (keeper, guest) = (keeper.unwrap(), guest.unwrap());
    let proc = |name: &str| fs::read_to_string(format!("/proc/{guest}/{name}"));
    until("its guest runs", || {
        fs::read_dir(format!("/proc/{guest}/task"))
            .unwrap()
            .flatten()
            .any(|thread| {
                fs::read_to_string(thread.path().join("comm")).is_ok_and(|name| name == "vcpu0\n")
            })
    });
    let status = proc("status").unwrap();
    let user = &*USER.to_string();
    assert_eq!(field(&status, "Uid"), [user; 4]);
    assert_eq!(field(&status, "Gid"), [user; 4]);
    assert_eq!(field(&status, "Seccomp"), ["2"]);
    assert_eq!(field(&status, "NoNewPrivs"), ["1"]);
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(field(&status, set), ["0000000000000000"], "{set}");
    }
    assert_eq!(field(&status, "NSpid"), [&*guest.to_string(), "1"]);
    assert_eq!(
        proc("net/dev").unwrap().lines().count(),
        3,
        "two lines of head, and lo"
    );

    // It sees the kernel and the initrd, and of the cache nothing else; not even the file that the other guest has of
    // the operator.
    let given: BTreeSet<_> = ["plain", "files", "initrd"]
        .iter()
        .flat_map(|ending| kernel.cached(ending))
        .collect();
    let files: BTreeSet<_> = reachable(guest.into())
        .into_iter()
        .filter(|path| path.starts_with(kernel.folder.path()) && path.is_file())
        .collect();
    assert_eq!(files, given);
    for entry in fs::read_dir(format!("/proc/{guest}/fdinfo"))
        .unwrap()
        .flatten()
    {
        let number = entry.file_name().into_string().unwrap();
        let target = fs::read_link(format!("/proc/{guest}/fd/{number}")).unwrap();
        let info = fs::read_to_string(entry.path()).unwrap();
        let flags = info
            .lines()
            .find_map(|line| line.strip_prefix("flags:"))
            .unwrap();
        let flags = i32::from_str_radix(flags.trim(), 8).unwrap();
        if target.starts_with(kernel.folder.path()) {
            assert_eq!(
                flags & libc::O_ACCMODE,
                libc::O_RDONLY,
                "{}",
                target.display()
            );
        }
    }

    // It ends where nobody waits for it any more.
    kill(run.id());
    run.wait().unwrap();
    kill(keeper);
    until("it ends with who waits for it", || proc("status").is_err());
    assert_eq!(kernel.images(), [] as [PathBuf; 0]);
}

#[test]
fn an_image_belongs_to_who_keeps_it_whoever_the_guest_is() {
    if !skip::unless_root() {
        return;
    }
    for jail in [&[][..], &["--jail"], &["--jail", "uid=65534,gid=65534"]] {
        let kernel = Kernel::new(&tiny_kernel());
        let mut run = kernel.run(jail);
        assert!(run.wait().unwrap().success());
        until("the image is made", || kernel.images().len() == 1);
        let metadata = kernel.images()[0].metadata().unwrap();
        assert_eq!(
            (metadata.uid(), metadata.gid(), metadata.nlink()),
            (0, 0, 1),
            "{jail:?}"
        );
        assert_eq!(metadata.mode() & 0o022, 0, "{jail:?}");
        assert_eq!(metadata.len(), u64::from(RAM) << 20, "{jail:?}");
    }
}

#[test]
fn a_process_that_was_taken_over_gets_no_image_but_the_one_that_was_agreed_on() {
    let kernel = Kernel::new(&tiny_kernel());
    assert!(
        kernel
            .coppice(&["image", "warm", "--mem", "33M", "--kernel"])
            .arg(kernel.path())
            .status()
            .unwrap()
            .success()
    );
    let cached = kernel
        .cached("plain")
        .into_iter()
        .find(|path| path.metadata().unwrap().len() > 4096)
        .unwrap();
    let size = Size {
        vcpus: 1,
        mem_mib: RAM,
    };
    let agreed = WarmRequest::new(cached, "", size, None);
    let terms = |only| WarmTerms {
        confinement: Confinement {
            jail: Some(JailConfig::default()),
            seccomp: SeccompMode::Kill,
        },
        only,
    };
    for image in kernel.images() {
        fs::remove_file(image).unwrap();
    }

    // Whatever it says, it is the word to begin.
    let other = WarmRequest {
        cmdline: "nopti".to_owned(),
        domain: Some("other".to_owned()),
        ..agreed.clone()
    };
    let other = serde_json::to_vec(&other).unwrap();
    let (is_made, said) = kernel.told(&terms(Some(agreed.clone())), &other);
    assert!(is_made, "{said}");
    assert_eq!(kernel.images().len(), 1);
    assert!(!kernel.cache().join("other").exists());
    fs::remove_file(&kernel.images()[0]).unwrap();
    assert!(kernel.told(&terms(Some(agreed.clone())), b"").0);
    assert_eq!(kernel.images(), [] as [PathBuf; 0], "it was dismissed");

    // Where nothing was agreed on, no file is opened but those of the cache.
    for hostile in [
        WarmRequest {
            kernel: kernel.path(),
            ..agreed.clone()
        },
        WarmRequest {
            kernel: kernel.cache().join("../../kernel"),
            ..agreed.clone()
        },
        WarmRequest {
            domain: Some("../..".to_owned()),
            kernel: kernel.path(),
            ..agreed.clone()
        },
        WarmRequest {
            domain: Some("other".to_owned()),
            ..agreed.clone()
        },
    ] {
        let (is_made, said) = kernel.told(&terms(None), &serde_json::to_vec(&hostile).unwrap());
        assert!(
            !is_made && said.contains("no file of the cache"),
            "{hostile:?}: {said}"
        );
    }
    assert_eq!(kernel.images(), [] as [PathBuf; 0]);
    let (is_made, said) = kernel.told(&terms(None), &serde_json::to_vec(&agreed).unwrap());
    assert!(is_made, "{said}");
    assert_eq!(kernel.images().len(), 1);
}

#[test]
fn a_process_that_is_jailed_before_it_knows_its_kernel_has_no_image_made() {
    let kernel = Kernel::new(&tiny_kernel());
    for (jail, has) in [(&["--jail"][..], false), (&[], true)] {
        let socket = kernel.folder.path().join("sock");
        let mut command = kernel.coppice(&["run", "--api-sock"]);
        let mut run = command.arg(&socket).args(jail).spawn().unwrap();
        until("it can be configured", || {
            std::os::unix::net::UnixStream::connect(&socket).is_ok()
        });
        // The process for images is started before there is a socket.
        assert_eq!(!children(run.id()).is_empty(), has, "{jail:?}");
        kill(run.id());
        run.wait().unwrap();
        fs::remove_file(&socket).unwrap();
    }
}
