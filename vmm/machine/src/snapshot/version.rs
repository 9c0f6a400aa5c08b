//! The version of the format of snapshots.

/// The version that is written, and the only one that is read. A change of the format that an older reader would
/// misunderstand gets a new version.
pub const VERSION: u32 = 1;
