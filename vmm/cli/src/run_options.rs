//! The options of `coppice run`.

use std::os::fd::OwnedFd;
use std::path::PathBuf;

use config::{LoadSnapshot, VmConfig};
use control::PayloadLimits;
use jail::Confinement;

/// The options of `coppice run`.
#[derive(Debug)]
pub struct RunOptions {
    /// The guest. It starts at once if it has a boot source, and otherwise waits for `InstanceStart`.
    pub config: VmConfig,
    /// What the jail is made for: `config`, or that of a guest which goes on from a snapshot, as far as it is known
    /// without reading that.
    pub jailed: VmConfig,
    /// The name of the guest.
    pub id: Option<String>,
    /// Where to listen for REST requests.
    pub api_socket: Option<PathBuf>,
    /// How the process is confined before the guest runs.
    pub confinement: Confinement,
    /// Where to serve the serial console.
    pub console_socket: Option<PathBuf>,
    /// Where to write why the guest ended.
    pub end_file: Option<PathBuf>,
    /// Whether the guest waits for `InstanceStart` even with a boot source.
    pub no_start: bool,
    /// Whether the process only takes the configuration of the guest, which another process runs.
    pub only_configure: bool,
    /// Whether the host daemon has started the process, which then waits at its gate.
    pub held: bool,
    /// The snapshot that the guest goes on from.
    pub restore: Option<LoadSnapshot>,
    /// A file with the guest's metadata.
    pub metadata: Option<PathBuf>,
    /// How much is taken of clients.
    pub limits: PayloadLimits,
    /// Taps that the host daemon has made, by the network interface that each is for.
    pub taps: Vec<(String, OwnedFd)>,
}
