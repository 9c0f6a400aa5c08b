//! A small client of the REST socket, with one request for each connection.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde_json::Value;

use crate::result::Failure;

/// Sends a request; returns the status code and the body as text.
pub fn request_text(
    socket: &Path,
    method: &str,
    path: &str,
    body: &Value,
) -> Result<(u16, String), Failure> {
    let io = |source| Failure::Io {
        what: format!("{method} {path}"),
        source,
    };
    let mut stream = UnixStream::connect(socket).map_err(io)?;
    stream
        .set_read_timeout(Some(Duration::from_mins(1)))
        .map_err(io)?;
    let body = if body.is_null() {
        String::new()
    } else {
        body.to_string()
    };
    let head = format!(
        "{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all((head + &body).as_bytes()).map_err(io)?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).map_err(io)?;
    let status = answer.split(' ').nth(1).and_then(|code| code.parse().ok());
    let Some(status) = status else {
        return Failure::claim(format!("{method} {path}: no HTTP answer: {answer:?}"));
    };
    let body = answer
        .split_once("\r\n\r\n")
        .map_or("", |(_, body)| body.trim());
    Ok((status, body.to_owned()))
}

/// Sends a request; returns the status code and the body (`Null` where there is none).
pub fn request(
    socket: &Path,
    method: &str,
    path: &str,
    body: &Value,
) -> Result<(u16, Value), Failure> {
    let (status, body) = request_text(socket, method, path, body)?;
    let body = match &*body {
        "" => Value::Null,
        body => serde_json::from_str(body)?,
    };
    Ok((status, body))
}

/// Sends a request whose response has to be 204 or 200.
pub fn expect_ok(socket: &Path, method: &str, path: &str, body: &Value) -> Result<Value, Failure> {
    match request(socket, method, path, body)? {
        (200 | 204, body) => Ok(body),
        (status, body) => Failure::claim(format!("{method} {path}: status {status}: {body}")),
    }
}
