//! What `coppice run` is asked for.

use std::path::PathBuf;

use config::{LoadSnapshot, VmConfig};
use jail::Confinement;

/// What `coppice run` was asked for.
#[derive(Debug)]
pub struct RunOptions {
    /// The guest. It starts at once if it has a boot source, and else waits for `InstanceStart`.
    pub config: VmConfig,
    /// The name of the guest.
    pub id: Option<String>,
    /// Where to listen for REST requests.
    pub api_socket: Option<PathBuf>,
    /// What the process gives away before.
    pub confinement: Confinement,
    /// Where to serve the serial console.
    pub console_socket: Option<PathBuf>,
    /// Where to write why it ended.
    pub end_file: Option<PathBuf>,
    /// The guest waits for `InstanceStart` even with a boot source.
    pub no_start: bool,
    /// The guest is configured here, and started in another process.
    pub only_configure: bool,
    /// The host daemon has started the process.
    pub held: bool,
    /// The snapshot that the guest goes on from.
    pub restore: Option<LoadSnapshot>,
    /// A file with the guest's metadata.
    pub metadata: Option<PathBuf>,
}
