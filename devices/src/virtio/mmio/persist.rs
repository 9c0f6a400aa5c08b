//! The registers of a transport, saved and set again.

use serde::{Deserialize, Serialize};
use vm_memory::{GuestAddress, GuestMemory as _, Permissions};

use super::super::{INTERRUPT_CONFIG_CHANGE, INTERRUPT_USED_BUFFER, RingPosition};
use super::{Activation, MmioTransport, QueueRegisters, status};
use crate::lock;
use crate::persist::{RestoreError, check_same, invalid};

/// A queue. Whether it has event indices follows from the features.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QueueState {
    /// `QueueNumMax`.
    pub max_size: u16,
    /// `QueueNum`.
    pub size: u16,
    /// `QueueReady`.
    pub ready: bool,
    /// Address of the descriptor table.
    pub desc_table: u64,
    /// Address of the available ring (driver area).
    pub avail_ring: u64,
    /// Address of the used ring (device area).
    pub used_ring: u64,
    /// The next buffer to take; 0 in a queue that is not in use.
    pub next_avail: u16,
    /// The next element to use; 0 in a queue that is not in use.
    pub next_used: u16,
}

/// The registers of a transport, those of its interrupt included.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TransportState {
    /// `DeviceID`.
    pub device_id: u32,
    /// The features that the driver was offered.
    pub offered_features: u64,
    /// The features that the driver has accepted.
    pub accepted_features: u64,
    /// `Status`, without `DEVICE_NEEDS_RESET`.
    pub status: u32,
    /// `DEVICE_NEEDS_RESET`.
    pub needs_reset: bool,
    /// `InterruptStatus`.
    pub interrupt_status: u32,
    /// `ConfigGeneration`.
    pub config_generation: u32,
    /// `DeviceFeaturesSel`.
    pub device_features_sel: u32,
    /// `DriverFeaturesSel`.
    pub driver_features_sel: u32,
    /// `QueueSel`.
    pub queue_sel: u32,
    /// The queues, by index.
    pub queues: Vec<QueueState>,
}

impl TransportState {
    /// Whether the device served its queues. One that failed serves none until the driver resets it.
    fn is_active(&self) -> bool {
        self.status & status::DRIVER_OK == status::DRIVER_OK && !self.needs_reset
    }
}

impl MmioTransport {
    /// The registers. For a device that is paused, while no vCPU runs; see [`crate::persist`].
    pub(crate) fn save_state(&self) -> TransportState {
        let (device_id, positions) = {
            let device = lock(&*self.device);
            (device.device_id(), device.ring_positions())
        };
        let positions = positions.into_iter().chain(std::iter::repeat(None));
        let queues = self.queues.iter().zip(&self.max_sizes).zip(positions);
        TransportState {
            device_id,
            offered_features: self.offered,
            accepted_features: self.accepted,
            status: self.status,
            needs_reset: self.interrupt.needs_reset(),
            interrupt_status: self.interrupt.status(),
            config_generation: self.interrupt.config_generation(),
            device_features_sel: self.device_features_sel,
            driver_features_sel: self.driver_features_sel,
            queue_sel: self.queue_sel,
            queues: queues
                .map(|((queue, max_size), position)| {
                    let position = position.unwrap_or_default();
                    QueueState {
                        max_size: *max_size,
                        size: queue.size,
                        ready: queue.ready,
                        desc_table: queue.desc,
                        avail_ring: queue.driver,
                        used_ring: queue.device,
                        next_avail: position.next_avail,
                        next_used: position.next_used,
                    }
                })
                .collect(),
        }
    }

    /// Sets the registers of a new transport, and activates its device if the driver had. The device is to be restored before, which leaves
    /// it paused; the interrupts that were pending are raised when it is resumed.
    ///
    /// # Errors
    /// [`RestoreError`]; the transport is then as it was.
    pub(crate) fn restore_state(&mut self, state: &TransportState) -> Result<(), RestoreError> {
        let (device_id, device) = {
            let device = lock(&*self.device);
            (device.device_id(), device.kind().name)
        };
        if self.status != 0 {
            return Err(RestoreError::InUse { device });
        }
        check_same(device, "the device ID", &state.device_id, &device_id)?;
        self.check_registers(device, state)?;
        let registers: Vec<_> = state.queues.iter().map(QueueRegisters::from).collect();
        if state.is_active() {
            let activation = self.saved_activation(device, state, &registers)?;
            lock(&*self.device)
                .activate(activation)
                .map_err(|source| RestoreError::Activate { device, source })?;
        }
        self.accepted = state.accepted_features;
        self.queues = registers;
        self.status = state.status;
        self.device_features_sel = state.device_features_sel;
        self.driver_features_sel = state.driver_features_sel;
        self.queue_sel = state.queue_sel;
        self.interrupt.restore(
            state.interrupt_status,
            state.config_generation,
            state.needs_reset,
        );
        Ok(())
    }

    /// Checks all but the addresses of the queues, which a driver that has not set `DRIVER_OK` may set to anything.
    fn check_registers(
        &self,
        device: &'static str,
        state: &TransportState,
    ) -> Result<(), RestoreError> {
        let missing = state.offered_features & !self.offered;
        if missing != 0 {
            return Err(invalid(
                device,
                "the offered features",
                state.offered_features,
                "the device as it is made now lacks some",
            ));
        }
        let step = state.status & !status::FAILED;
        let steps = [
            0,
            status::ACKNOWLEDGE,
            status::DRIVER,
            status::FEATURES_OK,
            status::DRIVER_OK,
        ];
        if !steps.contains(&step) {
            let reason = "it is no step of the driver's";
            return Err(invalid(device, "the status", state.status, reason));
        }
        if step & status::FEATURES_OK == status::FEATURES_OK
            && !super::are_features_ok(state.accepted_features, state.offered_features)
        {
            return Err(invalid(
                device,
                "the accepted features",
                state.accepted_features,
                "they are not among those offered, or not those of virtio 1",
            ));
        }
        if state.interrupt_status & !(INTERRUPT_USED_BUFFER | INTERRUPT_CONFIG_CHANGE) != 0 {
            let (value, reason) = (state.interrupt_status, "it has unknown bits");
            return Err(invalid(device, "the interrupt status", value, reason));
        }
        let counts = (state.queues.len(), self.max_sizes.len());
        check_same(device, "the number of queues", &counts.0, &counts.1)?;
        let is_active = state.is_active();
        for (index, (queue, max_size)) in state.queues.iter().zip(&self.max_sizes).enumerate() {
            check_same(device, "the largest queue size", &queue.max_size, max_size)?;
            let fault = |field, value, reason| RestoreError::Queue {
                device,
                queue: index,
                field,
                value,
                reason,
            };
            if !queue.size.is_power_of_two() || queue.size > *max_size {
                let reason = "it is no power of two up to the largest size";
                return Err(fault("the size", queue.size.into(), reason));
            }
            let position = queue.position();
            if !(is_active && queue.ready) && position != RingPosition::default() {
                let (value, reason) = (position.next_avail, "the queue is not in use");
                return Err(fault("the next buffer", value.into(), reason));
            }
            if position.in_flight() > queue.size {
                let reason = "more buffers would be under way than the queue has";
                return Err(fault("the next buffer", position.next_avail.into(), reason));
            }
        }
        Ok(())
    }

    /// The activation that the driver asked for, with the rings where the device was.
    fn saved_activation(
        &self,
        device: &'static str,
        state: &TransportState,
        registers: &[QueueRegisters],
    ) -> Result<Activation, RestoreError> {
        let mut queues = Vec::with_capacity(registers.len());
        for (index, (registers, saved)) in registers.iter().zip(&state.queues).enumerate() {
            if registers.ready {
                self.check_ring(device, index, saved)?;
            }
            let mut queue =
                self.ring(registers, state.accepted_features)
                    .map_err(|_| RestoreError::Queue {
                        device,
                        queue: index,
                        field: "the ring",
                        value: saved.desc_table,
                        reason: "it is not where one can be",
                    })?;
            if let Some(queue) = &mut queue {
                saved.position().set(queue);
            }
            queues.push(queue);
        }
        Ok(Activation {
            memory: self.memory.clone(),
            queues,
            features: state.accepted_features,
        })
    }

    /// Says which part of a ring is not where it can be (VIRTIO 1.2, 2.7: sizes and alignments).
    fn check_ring(
        &self,
        device: &'static str,
        index: usize,
        queue: &QueueState,
    ) -> Result<(), RestoreError> {
        let size = usize::from(queue.size);
        let parts = [
            ("the descriptor table", queue.desc_table, 16, 16 * size),
            ("the available ring", queue.avail_ring, 2, 6 + 2 * size),
            ("the used ring", queue.used_ring, 4, 6 + 8 * size),
        ];
        for (field, address, alignment, len) in parts {
            let reason = if !address.is_multiple_of(alignment) {
                "it is not aligned"
            } else if !self
                .memory
                .check_range(GuestAddress(address), len, Permissions::ReadWrite)
            {
                "it does not lie in guest memory"
            } else {
                continue;
            };
            return Err(RestoreError::Queue {
                device,
                queue: index,
                field,
                value: address,
                reason,
            });
        }
        Ok(())
    }
}

impl QueueState {
    fn position(&self) -> RingPosition {
        RingPosition {
            next_avail: self.next_avail,
            next_used: self.next_used,
        }
    }
}

impl From<&QueueState> for QueueRegisters {
    fn from(state: &QueueState) -> Self {
        Self {
            size: state.size,
            ready: state.ready,
            desc: state.desc_table,
            driver: state.avail_ring,
            device: state.used_ring,
        }
    }
}
