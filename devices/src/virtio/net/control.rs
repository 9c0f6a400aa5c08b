//! The control queue (VIRTIO 1.2, 5.1.6.5).

use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK, VIRTIO_NET_CTRL_GUEST_OFFLOADS,
    VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET, VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET,
    VIRTIO_NET_CTRL_RX, VIRTIO_NET_CTRL_RX_ALLMULTI, VIRTIO_NET_CTRL_RX_PROMISC, VIRTIO_NET_ERR,
    VIRTIO_NET_F_MQ, VIRTIO_NET_OK,
};
use virtio_queue::{Error, QueueOwnedT, QueueT};

use super::super::chain::{self, Chain};
use super::features::{GUEST_OFFLOADS, Offloads, has};
use super::{Active, VirtioNet};
use crate::GuestMemory;

/// Class and command, and the longest data of a command that is known.
const LONGEST_COMMAND: usize = 2 + 8;

impl VirtioNet {
    /// Does what the driver asks for, a ring's worth at most.
    pub(super) fn serve_control(&mut self) -> Result<(), Error> {
        let Some(mut active) = self.active.take() else {
            return Ok(());
        };
        let more = self.serve_control_of(&mut active);
        let control = self.control_index(active.features);
        self.active = Some(active);
        if more? {
            self.kick(control);
        }
        Ok(())
    }

    /// Whether there may be more.
    fn serve_control_of(&mut self, active: &mut Active) -> Result<bool, Error> {
        let memory = active.memory.clone();
        let Some(mut queue) = active.control.take() else {
            return Ok(false);
        };
        let (mut used, mut more) = (false, true);
        for _ in 0..queue.size() {
            let Some(descriptors) = queue.iter(&memory)?.next() else {
                if queue.enable_notification(&memory)? {
                    continue;
                }
                more = false;
                break;
            };
            let head = descriptors.head_index();
            let chain = Chain::walk(&descriptors, queue.size()).map_err(|_| Error::InvalidChain)?;
            let written = self.command(active, &memory, &chain)?;
            queue.add_used(&memory, head, written)?;
            used = true;
        }
        if used && queue.needs_notification(&memory)? {
            self.interrupt.signal_used();
        }
        active.control = Some(queue);
        Ok(more)
    }

    /// One command; gives how many bytes were written.
    fn command(
        &mut self,
        active: &mut Active,
        memory: &GuestMemory,
        chain: &Chain,
    ) -> Result<u32, Error> {
        let len = chain::total_len(&chain.readable).min(LONGEST_COMMAND as u64) as usize;
        let mut bytes = [0; LONGEST_COMMAND];
        let bytes = bytes.get_mut(..len).unwrap_or_default();
        chain::read(memory, &chain.readable, bytes).map_err(|_| Error::InvalidChain)?;
        let is_done = match *bytes {
            [class, command, ref data @ ..] => {
                self.obey(active, u32::from(class), u32::from(command), data)
            }
            _ => false,
        };
        let ack = if is_done {
            VIRTIO_NET_OK
        } else {
            VIRTIO_NET_ERR
        } as u8;
        // Without a byte for it the driver is told nothing.
        chain::write(memory, &chain.writable, &[ack]).map_err(|_| Error::InvalidChain)
    }

    /// Whether the command was done.
    fn obey(&mut self, active: &mut Active, class: u32, command: u32, data: &[u8]) -> bool {
        match (class, command, data) {
            // The tap gives the guest all frames, whichever it asks for.
            (
                VIRTIO_NET_CTRL_RX,
                VIRTIO_NET_CTRL_RX_PROMISC | VIRTIO_NET_CTRL_RX_ALLMULTI,
                [_, ..],
            ) => true,
            (VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK, _) => {
                self.config.set_announces(false);
                true
            }
            (VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, [low, high, ..]) => {
                let pairs = u16::from_le_bytes([*low, *high]);
                has(active.features, VIRTIO_NET_F_MQ) && self.use_pairs(active, pairs)
            }
            (VIRTIO_NET_CTRL_GUEST_OFFLOADS, VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET, data) => {
                let Ok(bytes) = <[u8; 8]>::try_from(data) else {
                    return false;
                };
                let offloads = u64::from_le_bytes(bytes);
                if offloads & !(active.features & GUEST_OFFLOADS) != 0 {
                    return false;
                }
                if let Err(error) = self.link.set_offloads(Offloads::of(offloads)) {
                    crate::limited!(warn, error = %report::chain(&error), "virtio-net: the tap's offloads cannot be set");
                    return false;
                }
                active.offloads = offloads;
                true
            }
            _ => false,
        }
    }

    fn use_pairs(&self, active: &mut Active, pairs: u16) -> bool {
        let ready = active
            .pairs
            .iter()
            .take_while(|pair| pair.is_some())
            .count();
        if pairs == 0 || usize::from(pairs) > ready {
            return false;
        }
        if let Err(error) = self.link.use_pairs(pairs) {
            crate::limited!(warn, error = %report::chain(&error), "virtio-net: the tap's queues cannot be set");
            return false;
        }
        active.serving = pairs;
        for pair in 0..pairs {
            self.kick(usize::from(pair) * 2);
        }
        true
    }
}
