//! A keyboard controller, saved and restored.

use serde::{Deserialize, Serialize};

use super::{
    COMMAND_WRITE_CONTROL, COMMAND_WRITE_OUTPUT_PORT, CONTROL_AUX_DISABLED, I8042, KIND,
    OUTPUT_CAPACITY,
};
use crate::persist::{RestoreError, invalid};

/// The controller's state; its status register follows from it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct I8042State {
    /// The control byte.
    pub control: u8,
    /// The command that waits for its byte on the data port.
    pub pending_command: Option<u8>,
    /// What the guest has not read.
    pub output: Vec<u8>,
}

impl I8042 {
    /// The controller's state, while no vCPU runs; see [`crate::persist`].
    pub(crate) fn save_state(&self) -> I8042State {
        I8042State {
            control: self.control,
            pending_command: self.pending,
            output: self.output.iter().copied().collect(),
        }
    }

    /// Takes over the state, instead of what the controller has been used for before.
    ///
    /// # Errors
    /// [`RestoreError::Invalid`]; the controller is then as it was.
    pub(crate) fn restore_state(&mut self, state: &I8042State) -> Result<(), RestoreError> {
        if state.output.len() > OUTPUT_CAPACITY {
            let reason = "it is more than the controller holds";
            let len = state.output.len() as u64;
            return Err(invalid(KIND.name, "the length of the output", len, reason));
        }
        if state.control & CONTROL_AUX_DISABLED == 0 {
            let reason = "there is no auxiliary port to turn on";
            return Err(invalid(
                KIND.name,
                "the control byte",
                state.control,
                reason,
            ));
        }
        match state.pending_command {
            None | Some(COMMAND_WRITE_CONTROL | COMMAND_WRITE_OUTPUT_PORT) => {}
            Some(command) => {
                let reason = "it does not wait for a byte";
                return Err(invalid(KIND.name, "the pending command", command, reason));
            }
        }
        self.control = state.control;
        self.pending = state.pending_command;
        self.output.clear();
        self.output.extend(&state.output);
        self.restored = true;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::controller;
    use super::super::{COMMAND_PORT, CTRL_ALT_DEL, DATA_PORT};
    use super::*;
    use crate::bus::BusDevice;
    use crate::lifecycle::Device;
    use crate::persist::through_json;

    #[test]
    fn what_was_typed_and_a_command_half_given_go_on_in_the_restored_controller() {
        let (mut saved, _) = controller();
        assert!(saved.type_ctrl_alt_del());
        saved.read(DATA_PORT, &mut [0]);
        saved.write(COMMAND_PORT, &[COMMAND_WRITE_CONTROL]);
        let (mut restored, _) = controller();
        restored
            .restore_state(&through_json(&saved.save_state()))
            .unwrap();
        assert!(restored.irqfd.read().is_err());
        restored.resume();
        assert_eq!(restored.irqfd.read().unwrap(), 1);
        restored.resume();
        assert!(restored.irqfd.read().is_err(), "it is raised once");
        restored.write(DATA_PORT, &[0]);
        assert_eq!(restored.control, CONTROL_AUX_DISABLED);
        let state = restored.save_state();
        restored.restore_state(&state).unwrap();
        restored.resume();
        assert!(
            restored.irqfd.read().is_err(),
            "interrupts are off from here"
        );
        for expected in &CTRL_ALT_DEL[1..] {
            let mut data = [0];
            restored.read(DATA_PORT, &mut data);
            assert_eq!(data, [*expected]);
        }
    }

    type Change = fn(&mut I8042State);

    #[test]
    fn a_state_that_no_controller_can_have_is_refused() {
        let (mut device, _) = controller();
        let good = device.save_state();
        let changes: [(&str, Change); 4] = [
            ("output", |state| {
                state.output = vec![0; OUTPUT_CAPACITY + 1];
            }),
            ("control", |state| state.control = 0),
            ("command", |state| state.pending_command = Some(0xfe)),
            ("command", |state| state.pending_command = Some(0)),
        ];
        for (field, change) in changes {
            let mut bad = good.clone();
            change(&mut bad);
            let error = device.restore_state(&bad).unwrap_err();
            assert!(error.to_string().contains(field), "{error}");
            assert_eq!(device.save_state(), good);
        }
    }
}
