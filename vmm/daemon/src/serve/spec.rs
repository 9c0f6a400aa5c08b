//! What a guest is to be, as `POST /vms` is told.

use std::collections::{BTreeMap, BTreeSet};
use std::iter::once;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use utoipa::ToSchema;

use super::fault::Fault;
use super::identity;
use super::images::Images;
use super::templates::Templates;
use super::told::Told;
use config::VmConfig;
use config::bodies::Metadata;
use config::is_guest_id;
use config::limits::MAX_BODY;

/// Most labels, and most bytes of a label's name and value.
const LABELS: usize = 32;
const LABEL: usize = 256;
/// What the daemon's own part of the metadata takes of their limit, in bytes.
const OWN_METADATA: usize = 512;

/// A guest that is to be made.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VmSpec {
    /// Its name: 1 to 63 lower case letters, digits and dashes. One is made up where absent.
    #[serde(default)]
    #[schema(pattern = "^[a-z0-9-]{1,63}$")]
    pub id: Option<String>,
    /// The guest, as `coppice run --config` takes it (Firecracker's configuration file). Paths are absolute, or `image:NAME`.
    #[serde(default)]
    #[schema(value_type = Option<VmConfig>)]
    pub config: Option<Value>,
    /// The template that it is a clone of, instead of `config`.
    #[serde(default)]
    pub template: Option<String>,
    /// What the guest is told of itself over its vsock device, beside what the daemon tells it: `{"coppice": {"id", "hostname", "cid", "generation"}}`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Metadata>)]
    pub metadata: Option<Map<String, Value>>,
    /// Whether it starts at once.
    #[serde(default = "yes")]
    pub start: bool,
    /// Whether it is started again when it has failed.
    #[serde(default)]
    pub restart: RestartPolicy,
    /// Words to find it by.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
}

const fn yes() -> bool {
    true
}

/// Whether a guest that has run is started again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum RestartPolicy {
    /// It stays as it ended.
    #[default]
    Never,
    /// When it has reset itself, panicked, crashed, or was killed: after 1 s, then 2 s, and so on; not again after five failures that
    /// came within a minute of the start each.
    OnFailure,
    /// Whenever it has ended and nobody has stopped it, in the same way: also when it has powered off, and when the host was shut down, or the daemon
    /// told to stop its guests, by the next daemon.
    Always,
}

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

/// Checks that all paths mean the same in any folder.
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

    /// The configuration, with the paths of images: that which the guest was told, or was made with; that of a clone in `folder` is its template's.
    ///
    /// # Errors
    /// `Json`, `Config`, `Invalid`, `NoImage`, `NoTemplate`.
    pub fn resolved(
        &self,
        told: &Told,
        images: &Images,
        templates: &Templates,
        folder: &Path,
    ) -> Result<Resolved, Fault> {
        if let Some(config) = &told.config {
            // Its process has had it, in the same folder.
            return with_images((**config).clone(), images);
        }
        if let Some(template) = &self.template {
            return Ok(Resolved {
                config: templates.get(template)?.config_of(folder),
                images: Vec::new(),
            });
        }
        let mut config: VmConfig = match &self.config {
            Some(config) => serde_json::from_value(config.clone())?,
            None => VmConfig::default(),
        };
        if let Some(vsock) = &mut config.vsock {
            identity::place(vsock)?;
        }
        config.validate()?;
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
