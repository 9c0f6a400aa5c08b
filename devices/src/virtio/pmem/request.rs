//! Requests as the driver frames them (VIRTIO 1.2, 5.19.6): a type and room for a response, cut into descriptors in any
//! way.

use super::super::chain::{self, Chain, Segment};
use super::ring_fault::RingFault;
use crate::GuestMemory;

/// `VIRTIO_PMEM_REQ_TYPE_FLUSH`.
const FLUSH: u32 = 0;
/// Length of `struct virtio_pmem_req`, and of `struct virtio_pmem_resp`.
const LEN: u32 = 4;

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Command {
    /// Make durable what was written.
    Flush,
    /// Nothing that this device knows, or no whole type.
    Unknown,
}

/// The `ret` of a response (5.19.7.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ResponseCode {
    Done,
    Failed,
}

impl ResponseCode {
    pub(super) const fn value(self) -> u32 {
        match self {
            Self::Done => 0,
            // -1: to a driver all but 0 is a failure.
            Self::Failed => u32::MAX,
        }
    }
}

/// Where the response to a request goes.
#[derive(Debug)]
pub(super) struct Response {
    head: u16,
    segments: Vec<Segment>,
}

impl Response {
    /// The head descriptor of the request's chain.
    pub(super) fn head(&self) -> u16 {
        self.head
    }

    /// Writes the response; returns its length.
    pub(super) fn write(&self, memory: &GuestMemory, code: ResponseCode) -> Result<u32, RingFault> {
        let code = code.value().to_le_bytes();
        Ok(chain::write(memory, &self.segments, &code)?)
    }
}

/// Parses a chain.
///
/// # Errors
/// `NoResponse`: without room for a response the device cannot report anything to the driver.
pub(super) fn parse(
    memory: &GuestMemory,
    mut chain: Chain,
) -> Result<(Command, Response), RingFault> {
    let response = Response {
        head: chain.head,
        segments: chain::split_front(&mut chain.writable, LEN).ok_or(RingFault::NoResponse)?,
    };
    let Some(kind) = chain::split_front(&mut chain.readable, LEN) else {
        return Ok((Command::Unknown, response));
    };
    let mut bytes = [0; LEN as usize];
    chain::read(memory, &kind, &mut bytes)?;
    let command = match u32::from_le_bytes(bytes) {
        FLUSH => Command::Flush,
        _ => Command::Unknown,
    };
    Ok((command, response))
}
