//! Has a reference image made by another process, which is started while this process may still start one.
//!
//! A guest's process gives up the right to execute programs before it reads anything of its guest or a client. So the
//! program that makes the image is started before that, and waits on its standard input for the request that names the
//! kernel. It ends if its standard input is closed without one.

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;

use parking_lot::Mutex;

use serde::{Deserialize, Serialize};

use super::Size;

/// The request for an image: the kernel and the machine that it is made with.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct WarmRequest {
    /// The kernel, as a guest is given it.
    pub kernel: PathBuf,
    /// The command line of the guests that are to use the image.
    pub cmdline: String,
    /// Their machine.
    pub size: Size,
    /// Their sharing domain, where that has a name.
    pub domain: Option<String>,
}

/// A process that waits for a request, until it gets one or is dismissed.
#[derive(Clone, Debug)]
pub struct Warmer(Arc<Mutex<Option<Child>>>);

impl Warmer {
    /// Starts the process: this program (`coppice image warm-when-told`), by `/proc/self/exe`, so that its file may
    /// have been replaced.
    ///
    /// # Errors
    /// Where the host starts no process.
    pub fn start() -> io::Result<Self> {
        let child = Command::new("/proc/self/exe")
            .args(["image", "warm-when-told"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        Ok(Self(Arc::new(Mutex::new(Some(child)))))
    }

    fn take(&self) -> Option<Child> {
        self.0.lock().take()
    }

    /// Has the process make an image; `None` where it is gone.
    ///
    /// # Errors
    /// Where the request cannot be written to the process.
    pub(crate) fn request(&self, request: &WarmRequest) -> io::Result<Option<Warming>> {
        let Some(mut child) = self.take() else {
            return Ok(None);
        };
        let sent = child.stdin.take().map_or(Ok(()), |mut stdin| {
            stdin.write_all(&serde_json::to_vec(request)?)
        });
        let warming = Warming(child);
        sent.map(|()| Some(warming))
    }

    /// Ends the process, if it has no request.
    pub(crate) fn dismiss(&self) {
        if let Some(mut child) = self.take() {
            drop(child.stdin.take());
            if let Err(error) = child.wait() {
                tracing::debug!(error = %host::report::chain(&error), "the process that makes reference images");
            }
        }
    }
}

/// A process that is making an image.
#[derive(Debug)]
pub(crate) struct Warming(Child);

impl Warming {
    /// Waits for the end of the process.
    pub(crate) fn wait(mut self) -> io::Result<ExitStatus> {
        self.0.wait()
    }
}
