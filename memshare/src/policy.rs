//! What is shared, and how much work that may be.

use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Which ways to a shared page a guest takes. Each has those before it.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(rename_all = "lowercase")]
pub enum ShareMode {
    /// None: all memory is the guest's own.
    Off,
    /// Kernel and initrd are mapped from their files.
    Boot,
    /// What the guest reads from files that do not change, too.
    Read,
    /// What its kernel makes of memory while it boots, too, by a reference image, and what the guest unpacks of its
    /// initrd.
    #[default]
    All,
}

impl ShareMode {
    /// The modes, with their names.
    pub const NAMES: [(&str, Self); 4] = [
        ("off", Self::Off),
        ("boot", Self::Boot),
        ("read", Self::Read),
        ("all", Self::All),
    ];

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Boot => "boot",
            Self::Read => "read",
            Self::All => "all",
        }
    }
}

/// A word that is no [`ShareMode`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no way of sharing: expected off, boot, read or all")]
pub struct ShareModeError(String);

impl FromStr for ShareMode {
    type Err = ShareModeError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::NAMES
            .into_iter()
            .find(|(name, _)| *name == text)
            .map(|(_, mode)| mode)
            .ok_or_else(|| ShareModeError(text.to_owned()))
    }
}

/// Bounds of the merger's work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Share of a core that the merger may use in the long run, in percent.
    pub cpu_percent: u8,
    /// CPU time that it may use at once, after boot or when it has been idle for long.
    pub burst: Duration,
    /// Runs of file pages that a guest may have: each takes up to two mappings of the process.
    pub runs: usize,
    /// Whether pages of zeros that the guest holds after boot go back to the host.
    pub zeros: bool,
    /// Whether pages that are again as in the snapshot that the guest was loaded from go back to the host.
    pub base: bool,
    /// Whether guest memory may have transparent huge pages, which are not split for less than the whole of them.
    pub huge_pages: bool,
}

/// Mappings that the host lets a process have (`vm.max_map_count`); Linux' default where it does not say.
pub fn max_map_count() -> usize {
    const DEFAULT: usize = 65530;
    std::fs::read_to_string("/proc/sys/vm/max_map_count")
        .ok()
        .and_then(|text| text.trim().parse().ok())
        .unwrap_or(DEFAULT)
}

impl Limits {
    /// The default: 5 % of a core, a burst of two seconds, and a quarter of the mappings that the host allows a process
    /// as runs.
    pub fn of_host(cpu_percent: u8, huge_pages: bool) -> Self {
        Self {
            cpu_percent,
            burst: Duration::from_secs(2),
            runs: max_map_count() / 4,
            zeros: false,
            base: false,
            huge_pages,
        }
    }
}
