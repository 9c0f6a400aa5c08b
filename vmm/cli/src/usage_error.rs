//! Arguments that do not go together.

use std::path::PathBuf;

use config::ConfigError;
use control::mmds::MetadataFileError;

/// Arguments that do not go together.
#[derive(Debug, thiserror::Error)]
pub enum UsageError {
    /// The configuration file, or what the arguments make of it.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The metadata of the guest.
    #[error(transparent)]
    Metadata(#[from] MetadataFileError),
    /// Nothing to start, and nobody to say what.
    #[error(
        "nothing to run: give --kernel, or a --config with a boot-source, or --restore, or --api-sock to be told later"
    )]
    NothingToRun,
    /// A clone is as its template.
    #[error("{0} is the template's: leave it out beside --template")]
    TemplatesOwn(&'static str),
    /// An argument of `coppice run` that `coppice vm create` does not take.
    #[error("{0} is the daemon's to decide")]
    DaemonsOwn(&'static str),
    /// A part of a boot source without a kernel.
    #[error("{0} needs --kernel, or a --config with a boot-source")]
    NeedsKernel(&'static str),
    /// The command line and the configuration file say the same thing.
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
