//! Who a guest is: the identifier that no other guest of the daemon has, the socket in its folder, and what it is told of itself.
//!
//! ```text
//! vm.json has the CID ──> config.json, or --restore, has it too ──> metadata.json written at each start ──> process
//! ```
//!
//! A clone is loaded as a guest with another identifier. It learns so by its vsock device (`VIRTIO_VSOCK_EVENT_TRANSPORT_RESET`), and what it is called
//! by its metadata, in which each start of a process has a `generation` of its own.

use std::collections::BTreeSet;
use std::io;
use std::path::Path;
use std::sync::Arc;

use serde::Serialize;
use serde_json::{Map, Value, json};
use utoipa::ToSchema;

use super::Daemon;
use super::fault::Fault;
use super::spec::VmSpec;
use super::store;
use super::vm::Vm;
use config::limits::MAX_BODY;
use config::{FIRST_CID, VmConfig, VsockConfig};
use control::api;

/// The socket of the vsock device, in the folder that the process works in.
pub const SOCKET: &str = "vsock.sock";
/// What the guest is told of itself, in the same folder.
pub const METADATA: &str = "metadata.json";
/// The part of the metadata that the daemon writes.
pub const OWN_PART: &str = "coppice";

/// The vsock device of a guest, as its status tells it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct VsockStatus {
    /// Its context identifier, which no other guest of the daemon has.
    pub guest_cid: u32,
    /// The socket that programs of the host connect to; those that the guest connects to lie beside it.
    pub uds_path: String,
}

/// Has the device of a guest listen in the guest's folder.
///
/// # Errors
/// `Invalid` where it was to be elsewhere.
pub fn place(vsock: &mut VsockConfig) -> Result<(), Fault> {
    if let Some(path) = &vsock.uds_path {
        return Err(Fault::Invalid {
            field: "vsock.uds_path",
            value: path.display().to_string(),
            expected: "left out: the socket is vsock.sock in the guest's folder",
        });
    }
    vsock.uds_path = Some(SOCKET.into());
    Ok(())
}

/// Gives the device of a guest the identifier that the guest has.
pub fn identify(config: &mut VmConfig, cid: Option<u32>) {
    if let Some(vsock) = &mut config.vsock {
        vsock.guest_cid = cid.or(vsock.guest_cid);
    }
}

/// A number that no other start of a guest has.
fn generation() -> String {
    let mut bytes = [0u8; 16];
    // The kernel's generator does not fail where it is asked for a few bytes.
    let _ = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty());
    format!("{:032x}", u128::from_ne_bytes(bytes))
}

/// What a guest is told of itself from its next start on. The daemon's part is left out where there is no room for it.
fn metadata(id: &str, cid: Option<u32>, asked: Option<&Map<String, Value>>) -> Map<String, Value> {
    let mut metadata = asked.cloned().unwrap_or_default();
    if let Some(cid) = cid {
        let own = json!({"id": id, "hostname": id, "cid": cid, "generation": generation()});
        metadata.insert(OWN_PART.to_owned(), own);
        // An object of JSON always has a text.
        let len = serde_json::to_vec(&metadata).map_or(usize::MAX, |text| text.len());
        if len > MAX_BODY {
            tracing::warn!(
                vm = id,
                "its metadata leave no room for those of the daemon"
            );
            metadata.remove(OWN_PART);
        }
    }
    metadata
}

/// Writes what a guest is told of itself, if it has a device to ask by, or was told anything; says whether there is something.
///
/// # Errors
/// What the host says.
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

/// The identifier that is asked for, or the first that none of the others has.
fn free_cid<'a>(
    asked: Option<u32>,
    others: impl Iterator<Item = &'a Arc<Vm>>,
) -> Result<Option<u32>, Fault> {
    let taken: BTreeSet<_> = others.filter_map(|vm| vm.now().cid).collect();
    match asked {
        Some(cid) if taken.contains(&cid) => Err(Fault::CidTaken(cid)),
        Some(cid) => Ok(Some(cid)),
        // There are fewer guests than identifiers.
        None => Ok((FIRST_CID..u32::MAX).find(|cid| !taken.contains(cid))),
    }
}

impl Daemon {
    /// The identifier of a guest with a vsock device, while its name is being claimed: the one that it asks for, or the first that no other has.
    ///
    /// # Errors
    /// `CidTaken`; `Invalid` where a guest without such a device is to be told something.
    pub(super) fn cid_for<'a>(
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

    /// Makes the body of `PUT /vsock` name what a guest of the daemon has where it leaves that out: the socket in its folder, and an identifier that
    /// no other guest has. The guest has the identifier from then on. A body that cannot be is the process's to refuse.
    ///
    /// # Errors
    /// `CidTaken`.
    pub(super) fn complete_vsock(&self, vm: &Vm, body: &[u8]) -> Result<Option<Vec<u8>>, Fault> {
        let Ok(mut vsock) = api::parse_object::<VsockConfig>(body) else {
            return Ok(None);
        };
        vsock.uds_path.get_or_insert_with(|| SOCKET.into());
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

    #[test]
    fn a_socket_lies_in_the_folder_of_its_guest_and_nowhere_else() {
        let mut elsewhere = VsockConfig::new(None, "/tmp/v");
        place(&mut elsewhere).unwrap_err();
        elsewhere.uds_path = None;
        place(&mut elsewhere).unwrap();
        assert_eq!(elsewhere.path(), Path::new(SOCKET));
    }
}
