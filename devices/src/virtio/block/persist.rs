//! A block device, saved and restored.
//!
//! All that changes while a driver uses it are its rings, which the transport has, and what its rate limiter has left.
//! What else is saved here is what the guest was told of the disk, so that it does not go on with another one. Whether
//! the disk has the same contents is checked by the caller, who has its file.

use serde::{Deserialize, Serialize};

use super::request::ID_LEN;
use super::{KIND, VirtioBlock};
use crate::lifecycle::Device;
use crate::persist::{RestoreError, check_same};
use crate::rate_limiter::RateLimiterState;

/// What the guest was told of the disk, and what it may do with it at once.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlockState {
    /// Size of the disk in sectors of 512 bytes.
    pub capacity: u64,
    /// Size of a logical block in bytes.
    pub logical_block: u32,
    /// Size of a physical block in bytes.
    pub physical_block: u32,
    /// Whether the disk is only read.
    pub read_only: bool,
    /// The serial number, padded with zeros.
    pub serial: [u8; ID_LEN],
    /// Number of request queues.
    pub queues: u16,
    /// Largest size of each queue.
    pub queue_size: u16,
    /// What the rate limiter has left.
    #[serde(default, skip_serializing_if = "RateLimiterState::is_empty")]
    pub rate_limiter: RateLimiterState,
}

fn access(read_only: bool) -> &'static str {
    if read_only { "read-only" } else { "writable" }
}

fn printable(serial: &[u8]) -> String {
    let end = serial.iter().position(|byte| *byte == 0);
    let serial = &serial[..end.unwrap_or(serial.len())];
    format!("\"{}\"", serial.escape_ascii())
}

impl VirtioBlock {
    /// What the guest was told of the disk. For a device that is paused: no request is in flight then; see
    /// [`crate::persist`].
    pub(crate) fn save_state(&self) -> BlockState {
        let geometry = self.disk.disk().geometry();
        BlockState {
            capacity: self.config.capacity(),
            logical_block: geometry.logical_sector.bytes(),
            physical_block: geometry.physical_sector.bytes(),
            read_only: geometry.read_only,
            serial: self.serial,
            queues: self.queue_sizes.len() as u16,
            queue_size: self.queue_sizes.first().copied().unwrap_or_default(),
            rate_limiter: self.limiter.save_state(),
        }
    }

    /// Makes sure that the guest finds the disk it knows. The device is paused from then on, until [`Device::resume`].
    ///
    /// # Errors
    /// [`RestoreError`]: `Mismatch` names the first property in which the disk differs.
    pub(crate) fn restore_state(&mut self, state: &BlockState) -> Result<(), RestoreError> {
        if self.active.is_some() {
            return Err(RestoreError::InUse { device: KIND.name });
        }
        let now = self.save_state();
        let capacity = |sectors| format!("{sectors} sectors");
        check_same(
            KIND.name,
            "the disk's capacity",
            &capacity(state.capacity),
            &capacity(now.capacity),
        )?;
        let saved = access(state.read_only);
        check_same(KIND.name, "the disk", saved, access(now.read_only))?;
        for (field, saved, now) in [
            (
                "the disk's logical block size",
                state.logical_block,
                now.logical_block,
            ),
            (
                "the disk's physical block size",
                state.physical_block,
                now.physical_block,
            ),
            (
                "the number of queues",
                state.queues.into(),
                now.queues.into(),
            ),
            (
                "the queue size",
                state.queue_size.into(),
                now.queue_size.into(),
            ),
        ] {
            check_same(KIND.name, field, &saved, &now)?;
        }
        check_same(
            KIND.name,
            "the serial number",
            &printable(&state.serial),
            &printable(&now.serial),
        )?;
        self.limiter.restore_state(KIND.name, &state.rate_limiter)?;
        self.pause();
        Ok(())
    }
}
