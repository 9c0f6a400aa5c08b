//! What a balloon device is made of.

/// What a balloon device is made of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BalloonConfig {
    /// Pages of 4 KiB that the balloon is to have.
    pub target_pages: u32,
    /// The guest takes pages out of the balloon rather than run out of memory.
    pub deflate_on_oom: bool,
    /// Seconds from one set of statistics to the next; without statistics where 0.
    pub statistics_interval: u16,
    /// The host can ask for hints of free pages.
    pub hinting: bool,
    /// The driver reports free pages.
    pub reporting: bool,
}
