//! A network device, saved and restored.
//!
//! Its rings are in its transport's state. What is saved here is what the guest was told of the interface, and what it
//! has set through the control queue; the network itself is the host's matter. Frames that waited for buffers of the
//! guest are dropped, as a network may, and so are the connections of the station.

use serde::{Deserialize, Serialize};

use super::features::GUEST_OFFLOADS;
use super::{KIND, Restored, VirtioNet};
use crate::lifecycle::Device;
use crate::persist::{RestoreError, check_same, invalid};
use crate::rate_limiter::RateLimiterState;

/// What the guest was told of the interface, and what it has set.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetState {
    /// Its address.
    pub mac: [u8; 6],
    /// The MTU that it was given.
    pub mtu: Option<u16>,
    /// Number of pairs of queues.
    pub pairs: u16,
    /// How many of them the guest uses; 1 where it uses none yet.
    pub serving: u16,
    /// The features of receiving that are on, as bits of features.
    pub offloads: u64,
    /// What its limiters have left.
    #[serde(default, skip_serializing_if = "RateLimiterState::is_empty")]
    pub rx_limiter: RateLimiterState,
    /// The same, of frames of the guest.
    #[serde(default, skip_serializing_if = "RateLimiterState::is_empty")]
    pub tx_limiter: RateLimiterState,
    /// Whether the guest was asked to tell the network where it is, and has not yet.
    pub announces: bool,
}

fn text(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

impl VirtioNet {
    /// The state of a device that is paused; see [`crate::persist`].
    pub(crate) fn save_state(&self) -> NetState {
        let active = self.active.as_ref();
        NetState {
            mac: self.config.mac,
            mtu: self.mtu,
            pairs: self.max_pairs(),
            serving: active.map_or(1, |active| active.serving),
            offloads: active.map_or(0, |active| active.offloads),
            rx_limiter: self.limiters.rx.save_state(),
            tx_limiter: self.limiters.tx.save_state(),
            announces: self.config.announces(),
        }
    }

    /// Makes sure that the guest finds the interface that it knows. The device is paused from then on, until
    /// [`Device::resume`], when the guest is asked to tell the network where it is.
    ///
    /// # Errors
    /// [`RestoreError`].
    pub(crate) fn restore_state(&mut self, state: &NetState) -> Result<(), RestoreError> {
        if self.active.is_some() {
            return Err(RestoreError::InUse { device: KIND.name });
        }
        let mtu = |mtu: Option<u16>| mtu.map_or("none".to_owned(), |mtu| mtu.to_string());
        check_same(
            KIND.name,
            "the MAC address",
            &text(state.mac),
            &text(self.config.mac),
        )?;
        check_same(KIND.name, "the MTU", &mtu(state.mtu), &mtu(self.mtu))?;
        check_same(
            KIND.name,
            "the number of pairs of queues",
            &state.pairs,
            &self.max_pairs(),
        )?;
        if !(1..=state.pairs).contains(&state.serving) {
            let reason = "it is not 1 to the number of pairs";
            return Err(invalid(
                KIND.name,
                "the number of pairs in use",
                state.serving,
                reason,
            ));
        }
        if state.offloads & !GUEST_OFFLOADS != 0 {
            let reason = "it has bits of other features";
            return Err(invalid(
                KIND.name,
                "the features of receiving",
                state.offloads,
                reason,
            ));
        }
        self.limiters
            .rx
            .restore_state(KIND.name, &state.rx_limiter)?;
        self.limiters
            .tx
            .restore_state(KIND.name, &state.tx_limiter)?;
        self.restored = Some(Restored {
            serving: state.serving,
            offloads: state.offloads,
        });
        self.config.set_announces(state.announces);
        self.is_elsewhere = true;
        self.pause();
        Ok(())
    }
}
