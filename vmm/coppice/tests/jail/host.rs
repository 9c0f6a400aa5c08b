//! What is around a jail: another guest's files, sockets and process.

use std::net::TcpListener;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::net::{SocketAddr, UnixListener};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use serde_json::{Value, json};

/// The user in the jail, who is also the user of the other guest.
pub const USER: u32 = 65534;
const SECRET: &str = "the other guest's";

/// Of the host, or what a process in a jail knows of it.
pub struct Host {
    folder: PathBuf,
    /// The other guest's process.
    pub victim: u32,
    /// A port of the host.
    pub port: u16,
    kept: Option<Kept>,
}

struct Kept {
    _folder: tempfile::TempDir,
    victim: Child,
    _listeners: (TcpListener, UnixListener, UnixListener),
}

impl Host {
    /// A host with one guest, and files for another.
    pub fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().canonicalize().unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        let victim = Command::new("sleep")
            .arg("600")
            .uid(USER)
            .gid(USER)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut host = Self {
            victim: victim.id(),
            port: tcp.local_addr().unwrap().port(),
            folder: path,
            kept: None,
        };
        std::fs::write(host.own_disk(), vec![0; 1 << 20]).unwrap();
        std::fs::write(host.other_disk(), SECRET).unwrap();
        let rest = UnixListener::bind(host.other_socket()).unwrap();
        let name = SocketAddr::from_abstract_name(host.abstract_name()).unwrap();
        let hidden = UnixListener::bind_addr(&name).unwrap();
        for path in [host.own_disk(), host.other_disk(), host.other_socket()] {
            chown(path, Some(USER), Some(USER)).unwrap();
        }
        chown(&host.folder, Some(USER), Some(USER)).unwrap();
        host.kept = Some(Kept {
            _folder: folder,
            victim,
            _listeners: (tcp, rest, hidden),
        });
        host
    }

    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// What the guest in the jail has.
    pub fn own_disk(&self) -> PathBuf {
        self.folder.join("own.raw")
    }

    pub fn other_disk(&self) -> PathBuf {
        self.folder.join("other.raw")
    }

    pub fn other_socket(&self) -> PathBuf {
        self.folder.join("other.sock")
    }

    pub fn abstract_name(&self) -> String {
        format!("coppice-{}", self.port)
    }

    /// For a process in the jail.
    pub fn to_json(&self) -> String {
        json!({"folder": self.folder, "victim": self.victim, "port": self.port}).to_string()
    }

    pub fn from_json(text: &str) -> Self {
        let value: Value = serde_json::from_str(text).unwrap();
        Self {
            folder: value["folder"].as_str().unwrap().into(),
            victim: value["victim"].as_u64().unwrap() as u32,
            port: value["port"].as_u64().unwrap() as u16,
            kept: None,
        }
    }

    /// Nothing has happened to the other guest.
    pub fn is_as_before(&mut self) {
        assert_eq!(std::fs::read_to_string(self.other_disk()).unwrap(), SECRET);
        let mut names: Vec<_> = std::fs::read_dir(&self.folder)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|name| name != ".cache")
            .collect();
        names.sort();
        assert_eq!(names, ["other.raw", "other.sock", "own.raw"]);
        let kept = self.kept.as_mut().unwrap();
        assert!(kept.victim.try_wait().unwrap().is_none(), "it was killed");
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if let Some(kept) = &mut self.kept {
            let _ = kept.victim.kill();
            let _ = kept.victim.wait();
        }
    }
}
