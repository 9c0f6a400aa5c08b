//! Has a reference image made by another process, which is started while this process may still start one.
//!
//! A guest's process gives up the right to execute programs before it reads anything of its guest or a client. So the
//! program that makes the image is started before that, and is told how it may be made. Then it waits on its standard
//! input for the word to do so, and ends if that is closed instead.
//!
//! ```text
//! coppice run ── WarmTerms, one line ──> coppice image warm-when-told
//!   is jailed
//!   starts its guest ── WarmRequest ───> makes the image
//! ```
//!
//! A guest may have taken over the process that sends the request. So where the terms say what may be asked for, the
//! request is no more than the word to begin.

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;

use parking_lot::Mutex;

use serde::{Deserialize, Serialize};

use super::key::{Size, text_words};
use config::SharingConfig;
use jail::Confinement;
use kvm::boot;

/// The request for an image: the kernel and the machine that it is made with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WarmRequest {
    /// The kernel.
    pub kernel: PathBuf,
    /// What the command line of the guests that are to use the image says of the kernel's text.
    pub cmdline: String,
    /// Their machine.
    pub size: Size,
    /// Their sharing domain, where that has a name.
    pub domain: Option<String>,
}

impl WarmRequest {
    /// The request for guests of `size` with a command line.
    pub fn new(kernel: PathBuf, cmdline: &str, size: Size, domain: Option<String>) -> Self {
        Self {
            kernel,
            cmdline: text_words(cmdline).join(" "),
            size: size.representative(),
            domain,
        }
    }

    /// Whether the kernel is a file of the domain's cache, so that no other file is opened for the request.
    pub fn is_of_cache(&self) -> bool {
        let sharing = SharingConfig {
            domain: self.domain.clone(),
            ..SharingConfig::default()
        };
        sharing.validate().is_ok() && boot::is_in_cache(&self.kernel, self.domain.as_deref())
    }
}

/// How an image may be made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WarmTerms {
    /// How the process of the guest is confined whose memory becomes the image.
    pub confinement: Confinement,
    /// The only image that may be made. `None` for a guest that is to be configured later by a process without a jail,
    /// which has all rights that there are to take.
    pub only: Option<WarmRequest>,
}

/// A process that waits for a request, until it gets one or is dismissed.
#[derive(Clone, Debug)]
pub struct Warmer {
    child: Arc<Mutex<Option<Child>>>,
    only: Option<Arc<WarmRequest>>,
}

impl Warmer {
    /// Starts the process: this program (`coppice image warm-when-told`), by `/proc/self/exe`, so that its file may
    /// have been replaced.
    ///
    /// # Errors
    /// Where the host starts no process; where the terms have a path that is no UTF-8.
    pub fn start(terms: &WarmTerms) -> io::Result<Self> {
        let mut line = serde_json::to_vec(terms)?;
        line.push(b'\n');
        let mut child = Command::new("/proc/self/exe")
            .args(["image", "warm-when-told"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        // It is in the pipe before this process is confined, and nothing that is written later can come before it.
        if let Some(stdin) = &mut child.stdin {
            stdin.write_all(&line)?;
        }
        Ok(Self {
            child: Arc::new(Mutex::new(Some(child))),
            only: terms.only.clone().map(Arc::new),
        })
    }

    fn take(&self) -> Option<Child> {
        self.child.lock().take()
    }

    /// Has the process make an image; `None` where it is gone, or may not make that one.
    ///
    /// # Errors
    /// Where the request cannot be written to the process.
    pub(crate) fn request(&self, request: &WarmRequest) -> io::Result<Option<Warming>> {
        if self.only.as_ref().is_some_and(|only| **only != *request) {
            // The guest was configured anew after its process had been jailed.
            self.dismiss();
            return Ok(None);
        }
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
