//! The kernel, its initial RAM disk and its command line.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::ConfigError;
use super::error::{check_file, check_path};
use crate::limits::CMDLINE_MAX;

/// Firecracker's `boot-source`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct BootSourceConfig {
    /// The kernel: an ELF `vmlinux` or a `bzImage`.
    #[schema(value_type = String)]
    pub kernel_image_path: PathBuf,
    /// The initial RAM disk.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub initrd_path: Option<PathBuf>,
    /// The kernel command line; [`crate::limits::DEFAULT_CMDLINE`] where absent.
    #[serde(default)]
    pub boot_args: Option<String>,
    /// How the kernel is entered. Not in Firecracker.
    #[serde(default)]
    pub boot_protocol: BootProtocol,
    /// Whether Linux does without its trace file system, which takes much memory of a small guest and is hardly used.
    /// Where absent, Linux does without if the guest shares all that can be shared and its command line sets up no
    /// tracing. Not in Firecracker.
    #[serde(default)]
    pub lean: Option<bool>,
}

/// How a kernel is entered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub enum BootProtocol {
    /// The best protocol that the file has.
    #[default]
    Auto,
    /// The PVH entry of an ELF kernel.
    Pvh,
    /// The 64-bit entry of an ELF kernel.
    Linux64,
    /// A bzImage that unpacks itself.
    BzImage,
}

impl BootSourceConfig {
    /// Checks the fields, but no file.
    ///
    /// # Errors
    /// `Invalid`.
    pub fn validate(&self) -> Result<(), ConfigError> {
        check_path("boot-source.kernel_image_path", &self.kernel_image_path)?;
        if let Some(initrd) = &self.initrd_path {
            check_path("boot-source.initrd_path", initrd)?;
        }
        match &self.boot_args {
            Some(args) => check_cmdline(args),
            None => Ok(()),
        }
    }

    /// Checks that the files can be read.
    ///
    /// # Errors
    /// `File`, `NotAFile`.
    pub fn check_files(&self) -> Result<(), ConfigError> {
        check_file(
            "boot-source.kernel_image_path",
            &self.kernel_image_path,
            false,
        )?;
        match &self.initrd_path {
            Some(initrd) => check_file("boot-source.initrd_path", initrd, false),
            None => Ok(()),
        }
    }
}

fn check_cmdline(args: &str) -> Result<(), ConfigError> {
    let field = "boot-source.boot_args";
    // The terminating zero needs a byte.
    let limit = CMDLINE_MAX - 1;
    if args.len() as u64 > limit {
        let expected = format!("{limit} bytes or less");
        return Err(ConfigError::invalid(
            field,
            &format_args!("a text of {} bytes", args.len()),
            expected,
        ));
    }
    match args.chars().find(|c| c.is_control() && *c != '\t') {
        Some(c) => Err(ConfigError::invalid(
            field,
            &format_args!("the character {c:?}"),
            "allowed in a kernel command line",
        )),
        None => Ok(()),
    }
}
