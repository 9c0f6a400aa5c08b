//! Has a reference image made by another process, which is started while this one still may.
//!
//! A guest process gives away the right to execute programs before it reads what its guest or a client says. So the
//! program that makes the image is started before that, and waits on its standard input to be told of which kernel;
//! without a word it ends.

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;

use parking_lot::Mutex;

use serde::{Deserialize, Serialize};

use super::Size;

/// What an image is to be made of.
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

/// A process that waits to be told, until it is told or dismissed.
#[derive(Clone, Debug)]
pub struct Warmer(Arc<Mutex<Option<Child>>>);

impl Warmer {
    /// Starts the process: this program (`coppice image warm-when-told`), whatever has become of its file.
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
    /// Where the process cannot be told.
    pub(crate) fn tell(&self, request: &WarmRequest) -> io::Result<Option<Warming>> {
        let Some(mut child) = self.take() else {
            return Ok(None);
        };
        let told = child.stdin.take().map_or(Ok(()), |mut stdin| {
            stdin.write_all(&serde_json::to_vec(request)?)
        });
        let warming = Warming(child);
        told.map(|()| Some(warming))
    }

    /// Ends the process, if it has not been told.
    pub(crate) fn dismiss(&self) {
        if let Some(mut child) = self.take() {
            drop(child.stdin.take());
            if let Err(error) = child.wait() {
                tracing::debug!(%error, "the process that makes reference images");
            }
        }
    }
}

/// A process that makes an image.
#[derive(Debug)]
pub(crate) struct Warming(Child);

impl Warming {
    /// Waits for its end.
    pub(crate) fn wait(mut self) -> io::Result<ExitStatus> {
        self.0.wait()
    }
}
