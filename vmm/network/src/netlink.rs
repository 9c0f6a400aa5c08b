//! Interfaces, routes, neighbours and addresses of the host, by rtnetlink(7).
//!
//! Requests go out many at a time and are answered one by one, so that a thousand guests cost some dozen system calls.

use std::io;
use std::os::fd::OwnedFd;

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkHeader,
    NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::RouteNetlinkMessage;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socket_with,
};

/// Why a request fails.
#[derive(Debug, thiserror::Error)]
pub enum NetlinkError {
    /// The socket fails.
    #[error("cannot talk to the kernel's rtnetlink")]
    Socket(#[source] io::Error),
    /// The kernel answers with what is no message of the protocol, or with too little.
    #[error("the answer of the kernel's rtnetlink is cut off or no message")]
    Answer,
    /// The kernel refuses a request.
    #[error("the kernel refuses to {what}")]
    Refused {
        /// What was asked for.
        what: String,
        /// Why.
        source: io::Error,
    },
}

/// A request and what it does, in words for a message.
#[derive(Debug)]
pub(crate) struct Request {
    pub(crate) what: String,
    pub(crate) message: RouteNetlinkMessage,
    kind: Kind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// Makes a thing, or puts it in the place of the one of the same key.
    Put,
    /// Changes or removes what is there.
    Change,
}

impl Request {
    pub(crate) fn put(what: impl Into<String>, message: RouteNetlinkMessage) -> Self {
        let what = what.into();
        Self {
            what,
            message,
            kind: Kind::Put,
        }
    }

    pub(crate) fn change(what: impl Into<String>, message: RouteNetlinkMessage) -> Self {
        let what = what.into();
        Self {
            what,
            message,
            kind: Kind::Change,
        }
    }
}

/// How many requests are on their way at a time: their answers fit the buffer of a socket.
const BATCH: usize = 64;
/// The longest datagram that the kernel makes of a dump is 32 KiB.
const BUFFER: usize = 64 << 10;

/// A socket of the kernel's rtnetlink, of the network namespace of the thread that opened it.
#[derive(Debug)]
pub(crate) struct Netlink {
    socket: OwnedFd,
    sequence: u32,
}

impl Netlink {
    pub(crate) fn open() -> Result<Self, NetlinkError> {
        // No protocol is the first one: NETLINK_ROUTE.
        let (family, protocol) = (AddressFamily::NETLINK, None);
        let socket = socket_with(family, SocketType::RAW, SocketFlags::CLOEXEC, protocol);
        let socket = socket.map_err(|error| NetlinkError::Socket(error.into()))?;
        Ok(Self {
            socket,
            sequence: 0,
        })
    }

    /// Sends all requests, and fails with the first that is refused; those behind it may be done all the same.
    pub(crate) fn send_all(&mut self, requests: Vec<Request>) -> Result<(), NetlinkError> {
        self.send_each(requests, |_| false)
    }

    /// As [`Netlink::send_all`], but takes it as success that what is removed or changed is gone.
    pub(crate) fn send_all_but_gone(&mut self, requests: Vec<Request>) -> Result<(), NetlinkError> {
        let is_gone = |error: &io::Error| {
            matches!(
                error.raw_os_error(),
                Some(libc::ENODEV | libc::ESRCH | libc::ENOENT | libc::EADDRNOTAVAIL)
            )
        };
        self.send_each(requests, is_gone)
    }

    fn send_each(
        &mut self,
        requests: Vec<Request>,
        is_fine: fn(&io::Error) -> bool,
    ) -> Result<(), NetlinkError> {
        let mut failed = None;
        let mut requests = requests.into_iter().peekable();
        while requests.peek().is_some() {
            let batch: Vec<_> = requests.by_ref().take(BATCH).collect();
            let results = self.exchange(&batch)?;
            for (request, result) in batch.into_iter().zip(results) {
                if let Err(source) = result
                    && !is_fine(&source)
                    && failed.is_none()
                {
                    failed = Some(NetlinkError::Refused {
                        what: request.what,
                        source,
                    });
                }
            }
        }
        failed.map_or(Ok(()), Err)
    }

    fn exchange(&mut self, requests: &[Request]) -> Result<Vec<io::Result<()>>, NetlinkError> {
        let first = self.sequence.wrapping_add(1);
        let mut datagram = Vec::new();
        for request in requests {
            let flags = NLM_F_REQUEST
                | NLM_F_ACK
                | match request.kind {
                    Kind::Put => NLM_F_CREATE | NLM_F_REPLACE,
                    Kind::Change => 0,
                };
            self.append(&mut datagram, request.message.clone(), flags);
        }
        self.transmit(&datagram)?;
        let mut results: Vec<Option<io::Result<()>>> = requests.iter().map(|_| None).collect();
        while results.iter().any(Option::is_none) {
            for message in self.receive()? {
                let at = message.header.sequence_number.wrapping_sub(first) as usize;
                if let (Some(result), NetlinkPayload::Error(error)) =
                    (results.get_mut(at), message.payload)
                {
                    *result = Some(match error.code {
                        None => Ok(()),
                        Some(_) => Err(error.to_io()),
                    });
                }
            }
        }
        Ok(results.into_iter().flatten().collect())
    }

    /// Everything of the kind that a message asks for.
    pub(crate) fn dump(
        &mut self,
        message: RouteNetlinkMessage,
    ) -> Result<Vec<RouteNetlinkMessage>, NetlinkError> {
        let mut datagram = Vec::new();
        self.append(&mut datagram, message, NLM_F_REQUEST | NLM_F_DUMP);
        self.transmit(&datagram)?;
        let mut found = Vec::new();
        loop {
            for message in self.receive()? {
                if message.header.sequence_number != self.sequence {
                    continue;
                }
                match message.payload {
                    NetlinkPayload::Done(_) => return Ok(found),
                    NetlinkPayload::Error(error) => {
                        let (what, source) = ("list its state".to_owned(), error.to_io());
                        return Err(NetlinkError::Refused { what, source });
                    }
                    NetlinkPayload::InnerMessage(message) => found.push(message),
                    _ => {}
                }
            }
        }
    }

    fn append(&mut self, datagram: &mut Vec<u8>, message: RouteNetlinkMessage, flags: u16) {
        self.sequence = self.sequence.wrapping_add(1);
        let mut header = NetlinkHeader::default();
        (header.flags, header.sequence_number) = (flags, self.sequence);
        let mut message = NetlinkMessage::new(header, NetlinkPayload::from(message));
        message.finalize();
        let start = datagram.len();
        datagram.resize(start + aligned(message.buffer_len()), 0);
        message.serialize(&mut datagram[start..]);
    }

    fn transmit(&self, datagram: &[u8]) -> Result<(), NetlinkError> {
        send(&self.socket, datagram, SendFlags::empty())
            .map_err(|error| NetlinkError::Socket(error.into()))?;
        Ok(())
    }

    /// The messages of one datagram. One that the parser does not know is left out: what is asked for is of old kinds.
    fn receive(&self) -> Result<Vec<NetlinkMessage<RouteNetlinkMessage>>, NetlinkError> {
        let mut buffer = vec![0; BUFFER];
        let (_, length) = recv(&self.socket, &mut buffer, RecvFlags::TRUNC)
            .map_err(|error| NetlinkError::Socket(error.into()))?;
        let mut rest = buffer.get(..length).ok_or(NetlinkError::Answer)?;
        let mut messages = Vec::new();
        while !rest.is_empty() {
            let length = rest
                .first_chunk()
                .map(|length| u32::from_ne_bytes(*length) as usize);
            let length = length
                .filter(|length| *length >= 16 && *length <= rest.len())
                .ok_or(NetlinkError::Answer)?;
            match NetlinkMessage::deserialize(&rest[..length]) {
                Ok(message) => messages.push(message),
                Err(error) => tracing::debug!(
                    "a message of rtnetlink is left out: {}",
                    report::chain(&error)
                ),
            }
            rest = &rest[aligned(length).min(rest.len())..];
        }
        Ok(messages)
    }
}

/// Messages begin at multiples of 4 bytes.
fn aligned(length: usize) -> usize {
    length.next_multiple_of(4)
}
