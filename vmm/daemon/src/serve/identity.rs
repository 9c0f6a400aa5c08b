//! The identity of a guest: the context identifier (CID) of its vsock device, which no other guest of the daemon has,
//! and its metadata.
//!
//! ```text
//! vm.json has the CID ──> config.json, or its LaunchSpec, has it too
//!                     ──> metadata.json written at each start ──> process
//! ```
//!
//! A clone is loaded as a guest with another CID. It learns that by its vsock device
//! (`VIRTIO_VSOCK_EVENT_TRANSPORT_RESET`), and its name by its metadata, in which each start of a process has a
//! `generation` of its own.

use std::collections::BTreeSet;
use std::io;
use std::path::Path;
use std::sync::Arc;

use serde_json::{Map, Value, json};

use super::daemon::Daemon;
use super::fault::Fault;
use super::record::VmSpec;
use super::store::{self, METADATA, VSOCK_SOCKET};
use super::vm::Vm;
use config::limits::MAX_BODY;
use config::{FIRST_CID, VmConfig, VsockConfig};
use control::api::{self};

/// The part of the metadata that the daemon writes.
pub const OWN_PART: &str = "coppice";

/// Gives the device of a guest the identifier that the guest has.
pub fn identify(config: &mut VmConfig, cid: Option<u32>) {
    if let Some(vsock) = &mut config.vsock {
        vsock.guest_cid = cid.or(vsock.guest_cid);
    }
}

/// A number that no other start of a guest has.
fn generation() -> String {
    let mut bytes = [0u8; 16];
    // The kernel's generator does not fail where it is asked for up to 256 bytes (getrandom(2)).
    let _ = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty());
    format!("{:032x}", u128::from_ne_bytes(bytes))
}

/// The metadata of a guest from its next start on: what the operator gave, and the daemon's part, unless there is no
/// room for that.
fn metadata(id: &str, cid: Option<u32>, asked: Option<&Map<String, Value>>) -> Map<String, Value> {
    let mut metadata = asked.cloned().unwrap_or_default();
    if let Some(cid) = cid {
        let own = json!({"id": id, "hostname": id, "cid": cid, "generation": generation()});
        metadata.insert(OWN_PART.to_owned(), own);
        // An object of JSON can always be written.
        let len = serde_json::to_vec(&metadata).map_or(usize::MAX, |text| text.len());
        if len > MAX_BODY {
            tracing::warn!(
                vm = id,
                "the metadata of a guest leave no room for those of the daemon"
            );
            metadata.remove(OWN_PART);
        }
    }
    metadata
}

/// Writes the metadata of a guest, if it has a vsock device to ask for them by, or was given any; says whether there
/// are some.
///
/// # Errors
/// The host's error.
pub fn write(
    folder: &Path,
    id: &str,
    cid: Option<u32>,
    asked: Option<&Map<String, Value>>,
) -> io::Result<bool> {
    if cid.is_none() && asked.is_none() {
        return Ok(false);
    }
    store::write(&folder.join(METADATA), &metadata(id, cid, asked), false)?;
    Ok(true)
}

/// The CID that is asked for, or the first that none of the others has.
fn free_cid<'a>(
    asked: Option<u32>,
    others: impl Iterator<Item = &'a Arc<Vm>>,
) -> Result<Option<u32>, Fault> {
    let taken: BTreeSet<_> = others.filter_map(|vm| vm.now().cid).collect();
    match asked {
        Some(cid) if taken.contains(&cid) => Err(Fault::CidTaken(cid)),
        Some(cid) => Ok(Some(cid)),
        // One is found, as there are fewer guests than CIDs.
        None => Ok((FIRST_CID..u32::MAX).find(|cid| !taken.contains(cid))),
    }
}

impl Daemon {
    /// The CID of a new guest with a vsock device: the one that it asks for, or the first that no other has. The
    /// registry of guests is locked meanwhile.
    ///
    /// # Errors
    /// `CidTaken`; `Invalid` where a guest without such a device is to have metadata.
    pub fn cid_for<'a>(
        spec: &VmSpec,
        config: &VmConfig,
        others: impl Iterator<Item = &'a Arc<Vm>>,
    ) -> Result<Option<u32>, Fault> {
        let Some(vsock) = &config.vsock else {
            return match &spec.metadata {
                None => Ok(None),
                Some(_) => Err(Fault::Invalid {
                    field: "metadata",
                    value: "an object".to_owned(),
                    expected: "left out, as the guest has no vsock device to ask for it by",
                }),
            };
        };
        free_cid(vsock.guest_cid, others)
    }

    /// Fills in what a body of `PUT /vsock` leaves out: the socket in the guest's folder, and a CID that no other guest
    /// has, which the guest has from then on. `None` where the body is wrong, for the guest's process to refuse it.
    ///
    /// # Errors
    /// `CidTaken`.
    pub fn complete_vsock(&self, vm: &Vm, body: &[u8]) -> Result<Option<Vec<u8>>, Fault> {
        let Ok(mut vsock) = api::parse_object::<VsockConfig>(body) else {
            return Ok(None);
        };
        vsock.uds_path.get_or_insert_with(|| VSOCK_SOCKET.into());
        let vms = self.vms();
        let asked = vsock.guest_cid.or(vm.now().cid);
        vsock.guest_cid = free_cid(asked, vms.values().filter(|other| other.id != vm.id))?;
        vm.change(|now| now.cid = vsock.guest_cid);
        Ok(Some(serde_json::to_vec(&vsock)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_start_of_a_guest_has_a_generation_and_what_was_asked_for_stays() {
        let asked = json!({"role": "web", "coppice": 1});
        let asked = asked.as_object().unwrap();
        let folder = tempfile::tempdir().unwrap();
        let read = || {
            assert!(write(folder.path(), "a", Some(5), Some(asked)).unwrap());
            let path = folder.path().join(METADATA);
            store::read::<Value>(&path).unwrap().unwrap()
        };
        let (first, second) = (read(), read());
        assert_eq!(first["role"], "web");
        assert_eq!(first["coppice"]["hostname"], "a");
        assert_eq!(first["coppice"]["cid"], 5);
        assert_ne!(
            first["coppice"]["generation"],
            second["coppice"]["generation"]
        );
        assert!(!write(folder.path(), "a", None, None).unwrap());
    }
}
