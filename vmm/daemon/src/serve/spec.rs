//! The checks of what `POST /vms` asks for, and the configuration that comes of it: images and templates have their
//! names replaced by files.

use std::collections::BTreeSet;
use std::iter::once;
use std::path::{Path, PathBuf};

use super::daemon::Daemon;
use super::fault::Fault;
use super::images::Images;
use super::record::{LaterConfig, VmSpec};
use super::store::VSOCK_SOCKET;
use super::templates::Templates;
use config::limits::MAX_BODY;
use config::{VmConfig, VsockConfig, is_guest_id};

/// Most labels, and most bytes of a label's name and value.
const LABELS: usize = 32;
const LABEL: usize = 256;
/// Bytes of the metadata's limit that are kept for the daemon's own part.
const OWN_METADATA: usize = 512;

/// A configuration that can be run, and the images in it.
#[derive(Clone, Debug)]
pub struct Resolved {
    /// With real paths.
    pub config: VmConfig,
    /// Names of images.
    pub images: Vec<String>,
}

/// Gives what is named as an image its path.
fn with_images(mut config: VmConfig, images: &Images) -> Result<Resolved, Fault> {
    let mut used = BTreeSet::new();
    for path in image_files(&mut config) {
        if let Some(name) = path.to_str().and_then(|path| path.strip_prefix("image:")) {
            let found = images.path(name);
            let found = found.ok_or_else(|| Fault::NoImage(name.to_owned()))?;
            used.insert(name.to_owned());
            *path = found;
        }
    }
    let images = used.into_iter().collect();
    Ok(Resolved { config, images })
}

/// The files that may be named as images.
fn image_files(config: &mut VmConfig) -> impl Iterator<Item = &mut PathBuf> {
    let source = config.boot_source.iter_mut();
    let source = source
        .flat_map(|source| once(&mut source.kernel_image_path).chain(source.initrd_path.as_mut()));
    let drives = config.drives.iter_mut();
    let pmem = config.pmem.iter_mut();
    source
        .chain(drives.map(|drive| &mut drive.path_on_host))
        .chain(pmem.map(|pmem| &mut pmem.path_on_host))
}

fn absolute(field: &'static str, path: &Path) -> Result<(), Fault> {
    if path.is_absolute() {
        return Ok(());
    }
    Err(Fault::Invalid {
        field,
        value: path.display().to_string(),
        expected: "an absolute path or image:NAME",
    })
}

/// Has the vsock device of a guest listen in the guest's folder.
///
/// # Errors
/// `Invalid` where another place was asked for.
fn place_vsock(vsock: &mut VsockConfig) -> Result<(), Fault> {
    if let Some(path) = &vsock.uds_path {
        return Err(Fault::Invalid {
            field: "vsock.uds_path",
            value: path.display().to_string(),
            expected: "left out: the socket is vsock.sock in the guest's folder",
        });
    }
    vsock.uds_path = Some(VSOCK_SOCKET.into());
    Ok(())
}

/// Checks that all paths are absolute, as the guest's process works in another folder than the caller.
fn all_absolute(config: &VmConfig) -> Result<(), Fault> {
    if let Some(source) = &config.boot_source {
        absolute("boot-source.kernel_image_path", &source.kernel_image_path)?;
        if let Some(initrd) = &source.initrd_path {
            absolute("boot-source.initrd_path", initrd)?;
        }
    }
    for drive in &config.drives {
        absolute("drives.path_on_host", &drive.path_on_host)?;
        if let Some(parents) = &drive.parents {
            absolute("drives.parents", parents)?;
        }
    }
    for pmem in &config.pmem {
        absolute("pmem.path_on_host", &pmem.path_on_host)?;
        if let Some(parents) = &pmem.parents {
            absolute("pmem.parents", parents)?;
        }
    }
    if let Some(path) = config
        .serial
        .as_ref()
        .and_then(|serial| serial.serial_out_path.as_ref())
    {
        absolute("serial.serial_out_path", path)?;
    }
    if let Some(metrics) = &config.metrics {
        absolute("metrics.metrics_path", &metrics.metrics_path)?;
    }
    if let Some(path) = config
        .logger
        .as_ref()
        .and_then(|logger| logger.log_path.as_ref())
    {
        absolute("logger.log_path", path)?;
    }
    Ok(())
}

impl VmSpec {
    /// Checks all but the configuration.
    ///
    /// # Errors
    /// `Invalid`.
    pub fn check(&self) -> Result<(), Fault> {
        let invalid = |field, value: &str, expected| {
            Err(Fault::Invalid {
                field,
                value: value.to_owned(),
                expected,
            })
        };
        match &self.id {
            Some(id) if !is_guest_id(id) => {
                return invalid("id", id, "1 to 63 lower case letters, digits and dashes");
            }
            Some(_) | None => {}
        }
        if self.template.is_some() && self.config.is_some() {
            return invalid("config", "an object", "left out, as the template has one");
        }
        if let (None, Some((interface, _))) = (&self.template, self.publish.first_key_value()) {
            let expected = "left out: a guest that is no clone has it in config.network-interfaces";
            return invalid("publish", interface, expected);
        }
        if let Some(metadata) = &self.metadata {
            // An object of JSON always has a text.
            let len = serde_json::to_vec(metadata).map_or(usize::MAX, |text| text.len());
            if len > MAX_BODY - OWN_METADATA {
                return invalid("metadata", "its length", "50688 bytes or less");
            }
        }
        if self.labels.len() > LABELS {
            return invalid("labels", "their number", "32 or less");
        }
        for (name, value) in &self.labels {
            if name.len() > LABEL || value.len() > LABEL {
                return invalid("labels", name, "a name and a value of 256 bytes at most");
            }
        }
        Ok(())
    }

    /// The configuration that the guest, which has `folder`, is to be started with, with the names of images: the later
    /// one where there is one, else its template's, else the one that it was made with.
    ///
    /// # Errors
    /// `Json`, `Config`, `Invalid`, `NoTemplate`.
    pub fn named(
        &self,
        later: &LaterConfig,
        templates: &Templates,
        folder: &Path,
    ) -> Result<VmConfig, Fault> {
        if let Some(config) = &later.config {
            return Ok((**config).clone());
        }
        if let Some(template) = &self.template {
            let mut config = templates.get(template)?.config_of(folder);
            self.publish_ports(&mut config)?;
            return Ok(config);
        }
        let mut config: VmConfig = match &self.config {
            Some(config) => serde_json::from_value(config.clone())?,
            None => VmConfig::default(),
        };
        if let Some(vsock) = &mut config.vsock {
            place_vsock(vsock)?;
        }
        Ok(config)
    }

    /// Has ports of the host lead to the interfaces of a clone.
    fn publish_ports(&self, config: &mut VmConfig) -> Result<(), Fault> {
        for (name, ports) in &self.publish {
            let mut interfaces = config.network_interfaces.iter_mut();
            let interface = interfaces
                .find(|interface| interface.iface_id == *name && interface.network.is_some());
            let interface = interface.ok_or_else(|| Fault::Invalid {
                field: "publish",
                value: name.clone(),
                expected: "an interface of the template that is in a network",
            })?;
            interface.publish.clone_from(ports);
        }
        Ok(())
    }

    /// As [`VmSpec::named`], with the paths of images, and checked.
    ///
    /// # Errors
    /// `Json`, `Config`, `Invalid`, `NoImage`, `NoTemplate`.
    pub fn resolved(
        &self,
        later: &LaterConfig,
        images: &Images,
        templates: &Templates,
        folder: &Path,
    ) -> Result<Resolved, Fault> {
        let config = self.named(later, templates, folder)?;
        config.validate()?;
        if later.config.is_some() || self.template.is_some() {
            return with_images(config, images);
        }
        if config.boot_source.is_none() && self.start {
            return Err(Fault::Invalid {
                field: "config.boot-source",
                value: "null".to_owned(),
                expected: "there, as a guest that starts at once needs it (or \"start\": false)",
            });
        }
        let resolved = with_images(config, images)?;
        all_absolute(&resolved.config)?;
        Ok(resolved)
    }
}

impl Daemon {
    /// The images that a configuration names.
    ///
    /// # Errors
    /// `NoImage`.
    pub fn images_of(&self, config: &VmConfig) -> Result<Vec<String>, Fault> {
        Ok(with_images(config.clone(), &self.images())?.images)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_lies_in_the_folder_of_its_guest_and_nowhere_else() {
        let mut elsewhere = VsockConfig::new(None, "/tmp/v");
        place_vsock(&mut elsewhere).unwrap_err();
        elsewhere.uds_path = None;
        place_vsock(&mut elsewhere).unwrap();
        assert_eq!(elsewhere.path(), Path::new(VSOCK_SOCKET));
    }
}
