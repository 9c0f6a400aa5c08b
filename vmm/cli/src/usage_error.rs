//! Why the arguments of a command cannot be used.

use std::path::PathBuf;

use config::ConfigError;
use control::mmds::MetadataFileError;

/// Why the arguments of a command cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum UsageError {
    /// The configuration file, or its combination with the arguments, is invalid.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The metadata of the guest cannot be read.
    #[error(transparent)]
    Metadata(#[from] MetadataFileError),
    /// The arguments name no guest, and no socket to configure one.
    #[error(
        "nothing to run: give --kernel, or a --config with a boot-source, or --restore, or --api-sock to be told later"
    )]
    NothingToRun,
    /// A clone has the configuration of its template, which cannot be changed.
    #[error("{0} is the template's: leave it out beside --template")]
    TemplatesOwn(&'static str),
    /// An argument of `coppice run` that `coppice vm create` does not take.
    #[error("{0} is the daemon's to decide")]
    DaemonsOwn(&'static str),
    /// The host daemon has passed another number of taps than it has named interfaces.
    #[error(
        "launch specification: {named} network interfaces are named, and {given} taps were passed"
    )]
    Taps {
        /// The interfaces.
        named: usize,
        /// The taps.
        given: usize,
    },
    /// A part of a boot source is given without a kernel.
    #[error("{0} needs --kernel, or a --config with a boot-source")]
    NeedsKernel(&'static str),
    /// An argument and the configuration file set the same value.
    #[error("{flag} and {field} of {} both say it: leave out one", file.display())]
    Conflict {
        /// The argument.
        flag: &'static str,
        /// The field of the file.
        field: &'static str,
        /// The file.
        file: PathBuf,
    },
}
