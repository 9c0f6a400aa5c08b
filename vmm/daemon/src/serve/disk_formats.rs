//! The formats of guests' disks. The daemon finds the format of a disk once, when its operator has just given it to the
//! guest, and keeps it on record: later on the guest decides what the file looks like, and so could turn a raw disk
//! into one of a format that names other files.

use std::collections::BTreeMap;
use std::path::Path;

use super::daemon::Daemon;
use super::fault::Fault;
use super::record::FoundFormat;
use super::task::blocking;
use super::vm::Vm;
use config::{DeviceId, DriveFormat, VmConfig};

/// The disks of a configuration whose format nobody has named: their names, files and formats.
fn unnamed(config: &mut VmConfig) -> Vec<(DeviceId, &Path, &mut Option<DriveFormat>)> {
    let drives = config.drives.iter_mut();
    let drives = drives.map(|drive| (&drive.drive_id, &drive.path_on_host, &mut drive.format));
    let pmem = config.pmem.iter_mut();
    let pmem = pmem.map(|pmem| (&pmem.id, &pmem.path_on_host, &mut pmem.format));
    let all = drives.chain(pmem).filter(|(_, _, format)| format.is_none());
    // A configuration that was checked has no other names.
    let named =
        all.filter_map(|(id, path, format)| Some((DeviceId::new(id).ok()?, &**path, format)));
    named.collect()
}

/// Fills in the formats that are not named, from those on record and from the files that are new to the guest. Gives
/// the record from now on.
fn fill(
    config: &mut VmConfig,
    on_record: &BTreeMap<DeviceId, FoundFormat>,
) -> BTreeMap<DeviceId, FoundFormat> {
    let mut found = BTreeMap::new();
    for (id, path, format) in unnamed(config) {
        let known = on_record.get(&id).filter(|known| known.path == path);
        let Some(known) =
            known.map_or_else(|| DriveFormat::of_file(path), |known| Some(known.format))
        else {
            continue;
        };
        *format = Some(known);
        let path = path.to_owned();
        found.insert(
            id,
            FoundFormat {
                path,
                format: known,
            },
        );
    }
    found
}

impl Daemon {
    /// A configuration that a guest is about to be started with, with the formats of all its disks. Gives too whether
    /// the record of the guest has changed by that.
    ///
    /// # Errors
    /// `Internal`.
    pub async fn with_formats(
        &self,
        vm: &Vm,
        mut config: VmConfig,
    ) -> Result<(VmConfig, bool), Fault> {
        let on_record = vm.now().formats.clone();
        let (config, found) = blocking(move || {
            let found = fill(&mut config, &on_record);
            (config, found)
        })
        .await?;
        let is_changed =
            vm.change(|now| std::mem::replace(&mut now.formats, found.clone()) != found);
        Ok((config, is_changed))
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use config::{ConfiguredDevice, DriveConfig};

    #[test]
    fn a_disk_keeps_the_format_that_it_had_when_it_was_given_to_the_guest() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        fs::write(path("a"), [0; 4096]).unwrap();
        fs::write(path("b"), b"vhdxfile").unwrap();
        let config = |a: &str| {
            let mut config = VmConfig::default();
            DriveConfig::new("a", path(a)).store(&mut config);
            DriveConfig::new("b", path("b")).store(&mut config);
            DriveConfig::new("missing", path("none")).store(&mut config);
            config
        };
        let formats =
            |config: &VmConfig| config.drives.iter().map(|d| d.format).collect::<Vec<_>>();
        let (raw, vhdx) = (Some(DriveFormat::Raw), Some(DriveFormat::Vhdx));
        let mut first = config("a");
        let record = fill(&mut first, &BTreeMap::new());
        assert_eq!(formats(&first), [raw, vhdx, None]);
        // The guest writes what it likes.
        fs::write(path("a"), b"vhdxfile").unwrap();
        fs::write(path("b"), [0; 4096]).unwrap();
        let mut again = config("a");
        assert_eq!(fill(&mut again, &record), record);
        assert_eq!(formats(&again), [raw, vhdx, None]);
        // Another file is looked at, and what is named is believed.
        let mut other = config("b");
        other.drives[1].format = vhdx;
        let record = fill(&mut other, &record);
        assert_eq!(formats(&other), [raw, vhdx, None]);
        assert_eq!(record.len(), 1);
    }
}
