//! `--restore STATE[,option...]`.

use std::path::PathBuf;
use std::str::FromStr;

use super::disk::split;
use config::{DriveOverride, LoadSnapshot, MemoryBackend, MemoryBackendType, NetworkOverride};

/// The value of `--restore`. A comma in a path is written twice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RestoreArgument(pub LoadSnapshot);

/// Why a text is not the description of a snapshot.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum RestoreError {
    /// The file is missing.
    #[error(
        "names no file: write STATE[,memory=FILE|,uffd=SOCKET][,below=FILE][,disk.ID=FILE][,clone.ID=FILE][,tap.ID=NAME][,vsock=SOCKET][,cid=N][,clock=kept][,trust][,paused]"
    )]
    NoFile,
    /// An option is unknown.
    #[error(
        "{0:?} is not an option of a snapshot: memory=FILE, uffd=SOCKET, below=FILE, disk.ID=FILE, clone.ID=FILE, tap.ID=NAME, vsock=SOCKET, cid=N, clock=kept, trust, paused (a comma in a path is written twice)"
    )]
    UnknownOption(String),
    /// An option is given twice.
    #[error("{0} is given twice")]
    Twice(String),
    /// A memory file and a page-fault handler are both given.
    #[error("memory=FILE and uffd=SOCKET are both given: leave out one")]
    TwoMemories,
}

impl FromStr for RestoreArgument {
    type Err = RestoreError;

    fn from_str(text: &str) -> Result<Self, RestoreError> {
        let mut parts = split(text).into_iter();
        let path = parts.next().filter(|path| !path.is_empty());
        let mut load = LoadSnapshot::new(path.ok_or(RestoreError::NoFile)?.into());
        load.resume_vm = true;
        for part in parts {
            let named = part.split_once('=').filter(|(_, value)| !value.is_empty());
            let drive = |id: &str, path: &str, clone| DriveOverride {
                drive_id: id.to_owned(),
                path_on_host: PathBuf::from(path),
                clone,
            };
            match (part.as_str(), named) {
                ("trust", None) if load.verify_memory => load.verify_memory = false,
                ("paused", None) if load.resume_vm => load.resume_vm = false,
                ("trust" | "paused", None) => return Err(RestoreError::Twice(part)),
                (_, Some(("memory", path))) if load.mem_file_path.is_none() => {
                    load.mem_file_path = Some(path.into());
                }
                (_, Some(("memory", _))) => return Err(RestoreError::Twice("memory".into())),
                (_, Some(("uffd", path))) if load.mem_backend.is_none() => {
                    load.mem_backend = Some(MemoryBackend {
                        backend_path: path.into(),
                        backend_type: MemoryBackendType::Uffd,
                    });
                }
                (_, Some(("uffd", _))) => return Err(RestoreError::Twice("uffd".into())),
                (_, Some(("below", path))) => load.lower_mem_files.push(path.into()),
                (_, Some(("vsock", path))) => {
                    let vsock = load.vsock_override.get_or_insert_default();
                    if vsock.uds_path.replace(path.into()).is_some() {
                        return Err(RestoreError::Twice("vsock".into()));
                    }
                }
                (_, Some(("cid", number))) => {
                    let Ok(cid) = number.parse() else {
                        return Err(RestoreError::UnknownOption(part));
                    };
                    let vsock = load.vsock_override.get_or_insert_default();
                    if vsock.guest_cid.replace(cid).is_some() {
                        return Err(RestoreError::Twice("cid".into()));
                    }
                }
                (_, Some(("clock", "kept"))) if load.clock_realtime => load.clock_realtime = false,
                (_, Some(("clock", "kept"))) => return Err(RestoreError::Twice("clock".into())),
                (_, Some((option, path))) => match option.split_once('.') {
                    Some(("disk", id)) => load.drives.push(drive(id, path, false)),
                    Some(("clone", id)) => load.drives.push(drive(id, path, true)),
                    Some(("tap", id)) => load.network_overrides.push(NetworkOverride {
                        iface_id: id.to_owned(),
                        host_dev_name: path.to_owned(),
                    }),
                    Some(_) | None => return Err(RestoreError::UnknownOption(part)),
                },
                (_, None) => return Err(RestoreError::UnknownOption(part)),
            }
        }
        if load.mem_backend.is_some() && load.mem_file_path.is_some() {
            return Err(RestoreError::TwoMemories);
        }
        // A disk may be given twice: as the file that it was moved to, and to be cloned from there.
        let of = |drive: &DriveOverride| (drive.drive_id.clone(), drive.clone);
        for (number, drive) in load.drives.iter().enumerate() {
            if load
                .drives
                .iter()
                .skip(number + 1)
                .any(|d| of(d) == of(drive))
            {
                return Err(RestoreError::Twice(format!(
                    "the disk of {}",
                    drive.drive_id
                )));
            }
        }
        load.drives.sort_by_key(|drive| drive.clone);
        Ok(Self(load))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_snapshot_is_described_by_its_state_and_options() {
        let parse = |text: &str| text.parse::<RestoreArgument>().map(|argument| argument.0);
        let plain = parse("a,,b").unwrap();
        assert!(plain.lower_mem_files.is_empty());
        let difference = parse("s,below=first,below=second").unwrap();
        assert_eq!(
            difference.lower_mem_files,
            ["first", "second"].map(PathBuf::from)
        );
        assert_eq!(plain.snapshot_path, PathBuf::from("a,b"));
        assert!(plain.verify_memory && plain.resume_vm && plain.drives.is_empty());
        let all = parse("s,memory=m,clone.root=c.vhdx,disk.data=d,trust,paused").unwrap();
        assert_eq!(all.mem_file_path, Some(PathBuf::from("m")));
        assert!(!all.verify_memory && !all.resume_vm);
        let drives: Vec<_> = all.drives.iter().map(|d| (&*d.drive_id, d.clone)).collect();
        assert_eq!(drives, [("data", false), ("root", true)]);
        let moved = parse("s,disk.root=/d/root.vhdx,clone.root=/d/b.vhdx").unwrap();
        assert_eq!(moved.drives.len(), 2);
        let vsock = parse("s,vsock=v,cid=9").unwrap().vsock_override.unwrap();
        assert_eq!(vsock.uds_path, Some(PathBuf::from("v")));
        assert_eq!(vsock.guest_cid, Some(9));
        assert!(plain.clock_realtime);
        assert!(!parse("s,clock=kept").unwrap().clock_realtime);
        let uffd = parse("s,uffd=h.sock").unwrap().mem_backend.unwrap();
        assert_eq!(uffd.backend_path, PathBuf::from("h.sock"));
        assert_eq!(uffd.backend_type, MemoryBackendType::Uffd);
        assert_eq!(parse("s,uffd=h,memory=m"), Err(RestoreError::TwoMemories));
        for wrong in [
            "",
            "s,uffd=",
            ",trust",
            "s,memory=",
            "s,nothing",
            "s,disk=x",
            "s,a.b=c",
            "s,cid=x",
            "s,clock=",
            "s,clock=saved",
        ] {
            parse(wrong).unwrap_err();
        }
        for twice in [
            "s,trust,trust",
            "s,memory=a,memory=b",
            "s,uffd=a,uffd=b",
            "s,cid=3,cid=4",
            "s,clock=kept,clock=kept",
            "s,clone.a=x,clone.a=y",
        ] {
            assert!(
                matches!(parse(twice), Err(RestoreError::Twice(_))),
                "{twice}"
            );
        }
    }
}
