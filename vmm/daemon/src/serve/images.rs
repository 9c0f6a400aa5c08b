//! Kernels, initial RAM disks and disks, by name.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::fault::Fault;
use super::store;

/// What an image is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum ImageKind {
    /// A kernel.
    Kernel,
    /// An initial RAM disk.
    Initrd,
    /// A disk.
    Disk,
}

/// A file that guests name as `image:NAME`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Image {
    /// Its absolute path.
    #[schema(value_type = String)]
    pub path: PathBuf,
    /// What it is.
    pub kind: ImageKind,
}

/// An image and its name.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct NamedImage {
    /// Its name.
    pub name: String,
    /// The image.
    #[serde(flatten)]
    pub image: Image,
}

/// All images.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Images(BTreeMap<String, Image>);

fn check_name(name: &str) -> Result<(), Fault> {
    let word = |c: u8| c.is_ascii_alphanumeric() || b"._-".contains(&c);
    if (1..=128).contains(&name.len()) && name.bytes().all(word) {
        return Ok(());
    }
    Err(Fault::Invalid {
        field: "name",
        value: name.to_owned(),
        expected: "1 to 128 letters, digits, dots, dashes and underscores",
    })
}

impl Image {
    /// Checks that it is there.
    ///
    /// # Errors
    /// `Invalid`.
    pub fn check(&self) -> Result<(), Fault> {
        let invalid = |expected| {
            Err(Fault::Invalid {
                field: "path",
                value: self.path.display().to_string(),
                expected,
            })
        };
        if !self.path.is_absolute() {
            return invalid("an absolute path");
        }
        match std::fs::metadata(&self.path) {
            Ok(metadata) if metadata.is_file() => Ok(()),
            Ok(_) | Err(_) => invalid("a regular file that the daemon can see"),
        }
    }
}

impl Images {
    /// Those of a state folder.
    ///
    /// # Errors
    /// What the host says.
    pub fn load(path: &Path) -> io::Result<Self> {
        store::remove_unfinished(path);
        Ok(store::read(path)?.unwrap_or_default())
    }

    /// The file of an image.
    pub fn path(&self, name: &str) -> Option<PathBuf> {
        self.0.get(name).map(|image| image.path.clone())
    }

    /// An image.
    ///
    /// # Errors
    /// `NoImage`.
    pub fn get(&self, name: &str) -> Result<NamedImage, Fault> {
        let image = self.0.get(name).cloned();
        let image = image.ok_or_else(|| Fault::NoImage(name.to_owned()))?;
        Ok(NamedImage {
            name: name.to_owned(),
            image,
        })
    }

    /// All of them.
    pub fn list(&self) -> Vec<NamedImage> {
        let images = self.0.iter();
        images
            .map(|(name, image)| NamedImage {
                name: name.clone(),
                image: image.clone(),
            })
            .collect()
    }

    /// Adds one, or replaces the one of that name, here and in the file.
    ///
    /// # Errors
    /// `Invalid`, `Store`; then nothing has changed.
    pub fn put(&mut self, path: &Path, name: &str, image: Image) -> Result<(), Fault> {
        check_name(name)?;
        let before = self.0.insert(name.to_owned(), image);
        store::write(path, &self, true).map_err(|error| {
            match before {
                Some(before) => self.0.insert(name.to_owned(), before),
                None => self.0.remove(name),
            };
            Fault::Store(error)
        })
    }

    /// Forgets one, here and in the file. Its file stays.
    ///
    /// # Errors
    /// `NoImage`, `Store`; then nothing has changed.
    pub fn remove(&mut self, path: &Path, name: &str) -> Result<(), Fault> {
        let before = self.0.remove(name);
        let before = before.ok_or_else(|| Fault::NoImage(name.to_owned()))?;
        store::write(path, &self, true).map_err(|error| {
            self.0.insert(name.to_owned(), before);
            Fault::Store(error)
        })
    }
}
