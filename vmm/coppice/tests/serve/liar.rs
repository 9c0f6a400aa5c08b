//! The place of a guest's process, at the guest's own socket.

use std::fs;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

/// What is answered to a request, of which the method and the path are given.
pub enum Answer {
    /// These bytes, and the end of the connection.
    Bytes(Vec<u8>),
    /// What the guest's process answers.
    Honest,
}

impl Answer {
    /// A response as HTTP has it.
    pub fn new(status: u16, body: &[u8]) -> Self {
        let length = match status {
            204 => String::new(),
            _ => format!("Content-Length: {}\r\n", body.len()),
        };
        let head =
            format!("HTTP/1.1 {status} OK\r\nContent-Type: application/json\r\n{length}\r\n");
        Self::Bytes([head.as_bytes(), body].concat())
    }
}

/// Takes the place of a guest's process at its socket.
pub struct Liar {
    socket: PathBuf,
    real: PathBuf,
    asked: Arc<AtomicUsize>,
}

impl Drop for Liar {
    /// The process has its socket back, if that is still there.
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.socket);
        let _ = fs::rename(&self.real, &self.socket);
    }
}

impl Liar {
    pub fn take_over(
        folder: &Path,
        answer: impl Fn(&str) -> Answer + Send + Sync + 'static,
    ) -> Self {
        let (socket, real) = (folder.join("api.sock"), folder.join("api.real"));
        fs::rename(&socket, &real).unwrap();
        let listener = UnixListener::bind(&socket).unwrap();
        fs::set_permissions(&socket, fs::Permissions::from_mode(0o666)).unwrap();
        let asked = Arc::<AtomicUsize>::default();
        let liar = Self {
            socket,
            real: real.clone(),
            asked: asked.clone(),
        };
        let answer = Arc::new(answer);
        thread::spawn(move || {
            for client in listener.incoming() {
                let Ok(client) = client else { return };
                asked.fetch_add(1, Ordering::SeqCst);
                let (answer, real) = (answer.clone(), real.clone());
                thread::spawn(move || serve(client, &*answer, &real));
            }
        });
        liar
    }

    /// How many requests have come.
    pub fn asked(&self) -> usize {
        self.asked.load(Ordering::SeqCst)
    }
}

fn serve(mut client: UnixStream, answer: &dyn Fn(&str) -> Answer, real: &Path) {
    let patience = Some(Duration::from_secs(5));
    client.set_read_timeout(patience).unwrap();
    // A request of the daemon comes at once, and is short.
    let mut request = vec![0; 8 << 10];
    let len = client.read(&mut request).unwrap_or(0);
    request.truncate(len);
    let text = String::from_utf8_lossy(&request);
    let line = text.lines().next().unwrap_or_default();
    let line = line.trim_end_matches(" HTTP/1.1").to_owned();
    match answer(&line) {
        // The daemon closes the connection where it has read enough.
        Answer::Bytes(bytes) => _ = client.write_all(&bytes),
        Answer::Honest => relay(&client, &text, real),
    }
    let _ = client.shutdown(Shutdown::Both);
}

/// Passes a request on to the guest's process, on a connection of its own.
fn relay(mut client: &UnixStream, request: &str, real: &Path) {
    let Ok(mut process) = UnixStream::connect(real) else {
        return;
    };
    let patience = Some(Duration::from_secs(20));
    process.set_read_timeout(patience).unwrap();
    let request = request.replacen("\r\n\r\n", "\r\nConnection: close\r\n\r\n", 1);
    let mut response = Vec::new();
    if process.write_all(request.as_bytes()).is_ok() && process.read_to_end(&mut response).is_ok() {
        let _ = client.write_all(&response);
    }
}
