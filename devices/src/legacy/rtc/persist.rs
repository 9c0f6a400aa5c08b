//! A real-time clock, saved and restored.

use serde::{Deserialize, Serialize};

use super::{CmosRtc, INDEX_MASK, KIND};
use crate::persist::{RestoreError, invalid};

/// The clock's state. The time is none of it: that is the host's, also in a guest that was saved long ago.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RtcState {
    /// The register that the data port shows.
    pub index: u8,
}

impl CmosRtc {
    /// The clock's state, while no vCPU runs; see [`crate::persist`].
    pub(crate) fn save_state(&self) -> RtcState {
        RtcState { index: self.index }
    }

    /// Takes over the state.
    ///
    /// # Errors
    /// [`RestoreError::Invalid`]; the clock is then as it was.
    pub(crate) fn restore_state(&mut self, state: &RtcState) -> Result<(), RestoreError> {
        if state.index & !INDEX_MASK != 0 {
            let reason = "the index has 7 bits";
            return Err(invalid(KIND.name, "the index", state.index, reason));
        }
        self.index = state.index;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::{DATA_PORT, INDEX_PORT, REGISTER_D_VALID};
    use super::*;
    use crate::bus::BusDevice;
    use crate::persist::through_json;

    #[test]
    fn a_read_between_index_and_data_goes_on_in_the_restored_clock() {
        let mut saved = CmosRtc::new();
        saved.write(INDEX_PORT, &[0x8d]);
        let mut restored = CmosRtc::new();
        restored
            .restore_state(&through_json(&saved.save_state()))
            .unwrap();
        let mut data = [0];
        restored.read(DATA_PORT, &mut data);
        assert_eq!(data, [REGISTER_D_VALID]);
        let error = restored
            .restore_state(&RtcState { index: 0x80 })
            .unwrap_err();
        assert_eq!(
            error.to_string(),
            "RTC: the index cannot be 0x80: the index has 7 bits"
        );
        assert_eq!(restored.save_state(), saved.save_state());
    }
}
