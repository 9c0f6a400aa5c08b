//! What the host daemon tells the process of a guest when it lets it begin.
//!
//! ```text
//! daemon ── spawn: run --held, names of its sockets ──────────> process waits on its standard input
//!        ── pid.json is written, one line of JSON, the end ──> process reads its `LaunchSpec`, and begins
//! ```
//!
//! The taps of its network interfaces come with the first byte of the line, as descriptors (`SCM_RIGHTS`, unix(7)).
//!
//! The process is always of the same build as the daemon that starts it, so both sides refuse what they do not know.

use std::io::{self, Read};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use config::LoadSnapshot;
use jail::JailConfig;

/// The configuration file of a guest that is not restored, in the folder that its process works in.
pub const CONFIG: &str = "config.json";

/// Longest line in bytes, with its end: what a pipe takes at once, and a socket.
pub const LONGEST_LINE: usize = 64 << 10;
/// Most taps that come with it.
pub const MOST_TAPS: usize = 32;

/// What a process is started for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Purpose {
    /// To be configured over the guest's own API, from [`CONFIG`] on; it never runs the guest.
    Configure,
    /// To run the guest of [`CONFIG`].
    Boot,
    /// To load a snapshot.
    Restore(Box<LoadSnapshot>),
}

/// How a process is to begin, in addition to its command line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LaunchSpec {
    /// What it is started for.
    pub purpose: Purpose,
    /// Its jail, if it is to be in one.
    pub jail: Option<JailConfig>,
    /// A file with the guest's metadata.
    pub metadata: Option<PathBuf>,
    /// The network interfaces whose taps the daemon has made, in the order of the descriptors.
    #[serde(default)]
    pub taps: Vec<String>,
}

/// Why a process does not know how to begin.
#[derive(Debug, thiserror::Error)]
pub enum LaunchSpecError {
    /// Whoever started the process is gone.
    #[error("standard input was closed before the guest was to begin")]
    Abandoned,
    /// Standard input cannot be read.
    #[error("standard input")]
    Read(#[source] io::Error),
    /// A line that does not end in time.
    #[error("standard input: a launch specification has at most {LONGEST_LINE} bytes")]
    TooLong,
    /// More than one line.
    #[error("standard input: there is more than one launch specification")]
    NotAlone,
    /// A line that is no specification, or a specification that cannot be written as one.
    #[error("launch specification")]
    Json(#[from] serde_json::Error),
}

impl LaunchSpecError {
    /// Whether the process was not told anything, and nobody waits for its answer.
    pub fn is_abandonment(&self) -> bool {
        matches!(self, Self::Abandoned | Self::Read(_))
    }
}

impl LaunchSpec {
    /// The line of JSON that tells a process of it.
    ///
    /// # Errors
    /// `Json` where a path is no UTF-8; `TooLong`.
    pub fn to_line(&self) -> Result<Vec<u8>, LaunchSpecError> {
        let mut line = serde_json::to_vec(self)?;
        line.push(b'\n');
        if line.len() > LONGEST_LINE {
            return Err(LaunchSpecError::TooLong);
        }
        Ok(line)
    }

    /// Waits for that line.
    ///
    /// # Errors
    /// [`LaunchSpecError`].
    pub fn read(input: &mut impl Read) -> Result<Self, LaunchSpecError> {
        let mut read = Vec::new();
        let mut buffer = [0; 4 << 10];
        loop {
            let count = match input.read(&mut buffer) {
                Ok(0) => return Err(LaunchSpecError::Abandoned),
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(LaunchSpecError::Read(error)),
            };
            let new = buffer.get(..count).unwrap_or_default();
            // Strings of JSON have no line ends.
            let end = new.iter().position(|byte| *byte == b'\n');
            read.extend_from_slice(new.get(..end.unwrap_or(count)).unwrap_or_default());
            if read.len() >= LONGEST_LINE {
                return Err(LaunchSpecError::TooLong);
            }
            match end {
                Some(end) if end + 1 < count => return Err(LaunchSpecError::NotAlone),
                Some(_) => return Ok(serde_json::from_slice(&read)?),
                None => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;

    use super::*;
    use config::{DriveOverride, LoadHugePages, MemoryBackend, MemoryBackendType, VsockOverride};
    use jail::CgroupConfig;

    const HOSTILE: &str = "/a,,b=\"c\"\\\n\r\t\u{1}'{}\u{2028},allow=/";

    /// Gives one byte after the other.
    struct Slowly<'a>(&'a [u8]);

    impl Read for Slowly<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let count = buffer.len().min(1);
            self.0.read(buffer.get_mut(..count).unwrap_or_default())
        }
    }

    fn spec(purpose: Purpose) -> LaunchSpec {
        LaunchSpec {
            purpose,
            jail: Some(JailConfig {
                uid: Some(7),
                gid: Some(8),
                cgroup: Some(CgroupConfig {
                    name: HOSTILE.into(),
                    memory: Some(u64::MAX),
                    cpu: Some(150),
                    pids: Some(32),
                    io: Some(10),
                }),
                allow: vec![HOSTILE.into(), ".".into()],
                require_all: true,
                shared: Some(HOSTILE.into()),
            }),
            metadata: Some(HOSTILE.into()),
            taps: vec!["eth0".to_owned(), "eth1".to_owned()],
        }
    }

    fn snapshot() -> LoadSnapshot {
        LoadSnapshot {
            mem_backend: Some(MemoryBackend {
                backend_path: HOSTILE.into(),
                backend_type: MemoryBackendType::Uffd,
            }),
            mem_file_path: Some(HOSTILE.into()),
            resume_vm: true,
            track_dirty_pages: true,
            verify_memory: false,
            clock_realtime: false,
            huge_pages: LoadHugePages::Hugetlbfs2M,
            drives: vec![DriveOverride {
                drive_id: HOSTILE.into(),
                path_on_host: HOSTILE.into(),
                clone: true,
            }],
            vsock_override: Some(VsockOverride {
                uds_path: Some(HOSTILE.into()),
                guest_cid: Some(9),
            }),
            ..LoadSnapshot::new(HOSTILE.into())
        }
    }

    #[test]
    fn a_process_reads_what_was_written_whatever_files_are_called() {
        for purpose in [
            Purpose::Configure,
            Purpose::Boot,
            Purpose::Restore(Box::new(LoadSnapshot::new("s".into()))),
            Purpose::Restore(Box::new(snapshot())),
        ] {
            let bare = LaunchSpec {
                purpose: purpose.clone(),
                jail: None,
                metadata: None,
                taps: Vec::new(),
            };
            for spec in [spec(purpose), bare] {
                let line = spec.to_line().unwrap();
                assert_eq!(line.split(|byte| *byte == b'\n').count(), 2);
                assert_eq!(LaunchSpec::read(&mut &*line).unwrap(), spec);
                assert_eq!(LaunchSpec::read(&mut Slowly(&line)).unwrap(), spec);
            }
        }
    }

    #[test]
    fn a_line_that_is_cut_anywhere_is_no_specification() {
        let line = spec(Purpose::Restore(Box::new(snapshot())))
            .to_line()
            .unwrap();
        for length in 0..line.len() {
            let mut cut = line.get(..length).unwrap();
            let error = LaunchSpec::read(&mut cut).unwrap_err();
            assert!(error.is_abandonment(), "{length}: {error:?}");
        }
    }

    #[test]
    fn a_line_is_as_long_as_a_pipe_takes_and_no_longer() {
        let of_length = |length: usize| {
            let mut spec = spec(Purpose::Boot);
            spec.metadata = Some(PathBuf::new());
            let rest = spec.to_line().unwrap().len();
            spec.metadata = Some("a".repeat(length - rest).into());
            spec
        };
        let longest = of_length(LONGEST_LINE);
        let mut line = longest.to_line().unwrap();
        assert_eq!(line.len(), LONGEST_LINE);
        assert_eq!(LaunchSpec::read(&mut &*line).unwrap(), longest);
        line.insert(0, b' ');
        for input in [&line, &vec![b' '; LONGEST_LINE * 2]] {
            let error = LaunchSpec::read(&mut &**input).unwrap_err();
            assert!(matches!(error, LaunchSpecError::TooLong), "{error:?}");
        }
        let error = of_length(LONGEST_LINE + 1).to_line().unwrap_err();
        assert!(matches!(error, LaunchSpecError::TooLong), "{error:?}");
    }

    #[test]
    fn an_invalid_specification_is_refused() {
        let line = spec(Purpose::Boot).to_line().unwrap();
        let error = LaunchSpec::read(&mut &*[&*line, b"\n"].concat()).unwrap_err();
        assert!(matches!(error, LaunchSpecError::NotAlone), "{error:?}");
        for wrong in [
            "\n",
            "{}\n",
            "\"boot\"\n",
            "{\"purpose\": \"begin\"}\n",
            "{\"purpose\": \"boot\", \"user\": 1}\n",
            "{\"purpose\": \"boot\", \"jail\": {\"user\": 1}}\n",
            "{\"purpose\": {\"restore\": {}}}\n",
        ] {
            let error = LaunchSpec::read(&mut wrong.as_bytes()).unwrap_err();
            assert!(!error.is_abandonment(), "{wrong}: {error:?}");
        }
        let mut unnamed = spec(Purpose::Boot);
        unnamed.metadata = Some(OsStr::from_bytes(b"\xff").into());
        let error = unnamed.to_line().unwrap_err();
        assert!(matches!(error, LaunchSpecError::Json(_)), "{error:?}");
    }
}
