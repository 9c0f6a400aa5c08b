//! A guest that the agent has started, and its console.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use base64::Engine as _;

use crate::output::OutputBuffer;
use crate::result::Failure;

/// The longest wait for anything that a guest does. Guests are slow here, because the host that runs them is emulated.
const PATIENCE: Duration = Duration::from_mins(3);

/// The words on the command line of every guest, so that its console shows the lines that the lab waits for.
const CMDLINE: &str = "console=ttyS0 reboot=k panic=-1 quiet";

/// The cache of unpacked kernels in the lab, which is on its disk, as on a server.
pub const KERNEL_CACHE: &str = "/mnt/cache";

/// How to start a guest.
pub struct Start {
    args: Vec<String>,
    cmdline: String,
    cmdline_option: &'static str,
    program: String,
}

impl Start {
    /// Starts Coppice with a kernel and an initrd.
    pub fn new() -> Self {
        let args = [
            "run",
            "--kernel",
            "guest/vmlinuz",
            "--initrd",
            "guest/initrd.cpio.gz",
            "--log",
            "info",
        ];
        Self {
            args: args.map(str::to_owned).to_vec(),
            cmdline: CMDLINE.to_owned(),
            cmdline_option: "--cmdline",
            program: "./coppice".to_owned(),
        }
    }

    /// Starts Coppice without arguments for a guest: it waits to be configured, or has a configuration file.
    pub fn bare(args: &[&str]) -> Self {
        let args = std::iter::once("run")
            .chain(args.iter().copied())
            .map(str::to_owned)
            .collect();
        Self {
            args,
            cmdline: String::new(),
            cmdline_option: "--cmdline",
            program: "./coppice".to_owned(),
        }
    }

    /// Starts the peer that Coppice is compared with: QEMU's smallest machine, with the same kernel (unpacked, as
    /// Coppice boots it) and initrd, and a disk.
    pub fn peer(kernel: &Path, disk: &str) -> Self {
        // The peer brings its libraries, because the lab's host has none.
        let args = "--library-path peer/lib peer/qemu -L peer/share \
                    -M microvm,accel=kvm,acpi=on -cpu host -smp 1 -m 128 -nodefaults -no-user-config -nographic \
                    -name peer,debug-threads=on -serial stdio -initrd guest/initrd.cpio.gz \
                    -device virtio-blk-device,drive=base -kernel";
        let mut args: Vec<_> = args.split_whitespace().map(str::to_owned).collect();
        args.push(kernel.display().to_string());
        args.push("-drive".to_owned());
        args.push(format!("id=base,if=none,readonly=on,file={disk}"));
        Self {
            args,
            cmdline: CMDLINE.to_owned(),
            cmdline_option: "-append",
            program: "peer/lib/ld-linux-x86-64.so.2".to_owned(),
        }
    }

    /// Adds arguments.
    pub fn args(mut self, args: &[&str]) -> Self {
        self.args.extend(args.iter().copied().map(str::to_owned));
        self
    }

    /// Adds words to the kernel command line.
    pub fn cmdline(mut self, more: &str) -> Self {
        self.cmdline = format!("{} {more}", self.cmdline);
        self
    }

    /// Sets the script that the guest runs before it powers off.
    pub fn script(self, script: &str) -> Self {
        let word = script_word(script);
        self.cmdline(&word)
    }

    /// Starts the guest.
    pub fn spawn(mut self) -> Result<Guest, Failure> {
        if !self.cmdline.is_empty() {
            self.args
                .extend([self.cmdline_option.to_owned(), self.cmdline]);
        }
        let mut child = Command::new(&self.program)
            .args(&self.args)
            .env("XDG_CACHE_HOME", KERNEL_CACHE)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(Failure::io("start coppice"))?;
        let (console, log) = (
            Arc::<OutputBuffer>::default(),
            Arc::<OutputBuffer>::default(),
        );
        if let (Some(stdout), Some(stderr)) = (child.stdout.take(), child.stderr.take()) {
            console.follow(stdout.into())?;
            log.follow(stderr.into())?;
        }
        Ok(Guest {
            child,
            console,
            log,
            started: Instant::now(),
        })
    }
}

/// The word of the command line with the script: `coppice.sh=`.
pub fn script_word(script: &str) -> String {
    format!(
        "coppice.sh={}",
        base64::engine::general_purpose::STANDARD.encode(script)
    )
}

/// A started guest, which is killed when this is dropped.
pub struct Guest {
    child: Child,
    console: Arc<OutputBuffer>,
    log: Arc<OutputBuffer>,
    started: Instant,
}

impl Guest {
    /// Waits until the console shows `text`; returns the time since the start.
    pub fn wait_for(&self, text: &str) -> Result<Duration, Failure> {
        self.wait_since(self.started, text)
    }

    /// As [`Guest::wait_for`], with patience from now on, for a guest that was started long ago.
    pub fn wait_from_now(&self, text: &str) -> Result<Duration, Failure> {
        self.wait_since(Instant::now(), text)
    }

    fn wait_since(&self, since: Instant, text: &str) -> Result<Duration, Failure> {
        let left = PATIENCE.saturating_sub(since.elapsed());
        if !self.console.wait_for(text, left) {
            let state = if self.console.has_ended() {
                "ended before it showed"
            } else {
                "never showed"
            };
            let log = self.log.text();
            let last = log.trim_end().lines().last().unwrap_or("nothing");
            return Failure::claim(format!(
                "the console {state} {text:?}; the last line of the log: {last}"
            ));
        }
        Ok(self.started.elapsed())
    }

    /// The text of the console so far.
    pub fn console(&self) -> String {
        self.console.text()
    }

    /// The rest of the first complete console line that starts with `prefix`.
    pub fn line(&self, prefix: &str) -> Result<String, Failure> {
        let console = self.console();
        let line = console
            .split_inclusive('\n')
            .filter(|line| line.ends_with('\n'))
            .find_map(|line| line.strip_prefix(prefix));
        line.map(|rest| rest.trim().to_owned())
            .ok_or_else(|| Failure::Claim(format!("no console line starts with {prefix:?}")))
    }

    /// Types on the console.
    pub fn type_in(&mut self, text: &str) -> Result<(), Failure> {
        let stdin = self.child.stdin.as_mut();
        stdin
            .map_or(Ok(()), |stdin| stdin.write_all(text.as_bytes()))
            .map_err(Failure::io("type"))
    }

    /// Sends a signal to the VMM.
    pub fn signal(&self, signal: rustix::process::Signal) -> Result<(), Failure> {
        rustix::process::kill_process(self.pid(), signal).map_err(|e| Failure::io("kill")(e.into()))
    }

    fn pid(&self) -> rustix::process::Pid {
        rustix::process::Pid::from_child(&self.child)
    }

    /// `/proc/PID` of the VMM.
    pub fn proc(&self) -> PathBuf {
        Path::new("/proc").join(self.child.id().to_string())
    }

    /// Waits for the VMM's end, and for the rest of its output; `None` where it runs longer than `patience`.
    pub fn try_exit(&mut self, patience: Duration) -> Result<Option<ExitStatus>, Failure> {
        let begun = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().map_err(Failure::io("wait"))? {
                self.console.wait_for_end();
                self.log.wait_for_end();
                return Ok(Some(status));
            }
            if begun.elapsed() > patience {
                return Ok(None);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Waits for the VMM's end, and for the rest of its output.
    pub fn wait(&mut self) -> Result<ExitStatus, Failure> {
        let left = PATIENCE.saturating_sub(self.started.elapsed());
        match self.try_exit(left)? {
            Some(status) => Ok(status),
            None => Failure::claim("the VMM did not end"),
        }
    }

    /// Waits for the end, which has to have this exit code.
    pub fn expect_exit(&mut self, code: i32) -> Result<(), Failure> {
        let status = self.wait()?;
        if status.code() == Some(code) {
            Ok(())
        } else {
            Failure::claim(format!("expected exit code {code}, got {status}"))
        }
    }

    /// Console and log, for the report.
    pub fn report(&self) -> String {
        format!(
            "--- console\n{}\n--- log\n{}\n",
            self.console(),
            self.log.text()
        )
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // The process may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
        REPORTS
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push_str(&self.report());
    }
}

/// Reports of the guests that have ended since the last [`take_reports`].
static REPORTS: Mutex<String> = Mutex::new(String::new());

/// Takes the console and log of all guests of a scenario.
pub fn take_reports() -> String {
    std::mem::take(&mut *REPORTS.lock().unwrap_or_else(PoisonError::into_inner))
}
