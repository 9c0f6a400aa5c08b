//! The tasks of a guest with its vsock device. The lab's own program is copied into the guest, because busybox has no
//! vsock.

use std::io::{Read, Write};
use std::net::Shutdown;

use clap::Subcommand;
use vsock::{VMADDR_CID_ANY, VMADDR_CID_HOST, VsockListener, VsockStream, get_local_cid};

use crate::result::Failure;

/// Bytes that are moved at once.
const CHUNK: usize = 64 << 10;

/// A task of the guest.
#[derive(Clone, Copy, Debug, Subcommand)]
pub enum Task {
    /// Prints the guest's CID.
    Cid,
    /// Accepts one connection, and responds with the length and sum of the data.
    Sink {
        /// The port.
        port: u32,
    },
    /// Sends so many bytes to a port of the host, and prints the response.
    Send {
        /// The port.
        port: u32,
        /// The bytes.
        bytes: u64,
    },
    /// Connects to a port of the host, and waits until the connection ends.
    Hold {
        /// The port.
        port: u32,
    },
    /// Prints a string of the metadata.
    Get {
        /// Its path.
        #[arg(value_parser = path)]
        path: &'static str,
    },
}

/// Parses a path. It is leaked, as a program has one task and then ends.
#[allow(clippy::unnecessary_wraps, reason = "the shape of a value parser")]
fn path(text: &str) -> Result<&'static str, std::convert::Infallible> {
    Ok(String::leak(text.to_owned()))
}

/// Fills a chunk with bytes that depend on their offsets, of which `place` is the first.
fn fill(chunk: &mut [u8], place: u64) {
    for (byte, place) in chunk.iter_mut().zip(place..) {
        *byte = (place.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8;
    }
}

/// Reads to the end, and returns length and sum (FNV-1a) of the data.
///
/// # Errors
/// The host's error.
pub fn sum(mut from: impl Read) -> std::io::Result<String> {
    let (mut len, mut sum) = (0u64, 0xcbf2_9ce4_8422_2325_u64);
    let mut chunk = vec![0; CHUNK];
    loop {
        let got = from.read(&mut chunk)?;
        if got == 0 {
            return Ok(format!("{len} {sum:016x}"));
        }
        len += got as u64;
        for byte in &chunk[..got] {
            sum = (sum ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }
}

/// Sends the first `len` bytes of the data that [`sum_of`] is computed for.
///
/// # Errors
/// The host's error.
pub fn send(mut to: impl Write, len: u64) -> std::io::Result<()> {
    let mut chunk = vec![0; CHUNK];
    let mut sent = 0;
    while sent < len {
        let part = (len - sent).min(CHUNK as u64) as usize;
        fill(&mut chunk[..part], sent);
        to.write_all(&chunk[..part])?;
        sent += part as u64;
    }
    Ok(())
}

/// The response that is expected for so many bytes.
///
/// # Errors
/// None, as the data are written to memory.
pub fn sum_of(len: u64) -> std::io::Result<String> {
    let mut bytes = Vec::new();
    send(&mut bytes, len)?;
    sum(&bytes[..])
}

fn connect(port: u32) -> std::io::Result<VsockStream> {
    VsockStream::connect_with_cid_port(VMADDR_CID_HOST, port)
}

/// Runs a task in the guest. The result is printed on the console.
///
/// # Errors
/// The error of the guest's kernel.
pub fn run(task: Task) -> Result<(), Failure> {
    let failed = Failure::io(format!("{task:?}"));
    let done = || -> std::io::Result<String> {
        match task {
            Task::Cid => Ok(format!("CID {}.", get_local_cid()?)),
            Task::Sink { port } => {
                let listener = VsockListener::bind_with_cid_port(VMADDR_CID_ANY, port)?;
                println!("LISTENS at {port}.");
                let (mut stream, _) = listener.accept()?;
                let answer = sum(&mut stream)?;
                stream.write_all(answer.as_bytes())?;
                Ok(format!("SUNK {answer}."))
            }
            Task::Send { port, bytes } => {
                let mut stream = connect(port)?;
                send(&mut stream, bytes)?;
                stream.shutdown(Shutdown::Write)?;
                let mut answer = String::new();
                stream.read_to_string(&mut answer)?;
                Ok(format!("SENT {answer}."))
            }
            Task::Hold { port } => {
                let mut stream = connect(port)?;
                println!("HOLDS {port}.");
                let ended = stream.read(&mut [0]);
                Ok(format!("HELD {:?}.", ended.map_err(|error| error.kind())))
            }
            Task::Get { path } => {
                let mut stream = connect(80)?;
                write!(stream, "GET {path} HTTP/1.1\r\nHost: host\r\n\r\n")?;
                let mut answer = String::new();
                stream.read_to_string(&mut answer)?;
                let body = answer.split_once("\r\n\r\n").map_or("", |(_, body)| body);
                Ok(body.to_owned())
            }
        }
    };
    println!("{}", done().map_err(failed)?);
    Ok(())
}
