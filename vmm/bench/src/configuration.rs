//! How a guest is started: Coppice with each way of sharing memory, and the peer.

use std::fmt;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use super::workload::Device;

/// How a guest is started.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Configuration {
    /// `coppice run --share off`: no page is shared.
    ShareOff,
    /// `coppice run --share boot`: kernel and initrd are.
    ShareBoot,
    /// `coppice run --share read`: what is read from disks is.
    ShareRead,
    /// `coppice run --share all`: both.
    ShareAll,
    /// The same with `--lean=false`: the guest has its trace file system.
    ShareAllTracefs,
    /// `coppice run --pmem`: the guest reads its disk in place, and shares as with `all`.
    Pmem,
    /// QEMU's microvm machine.
    QemuMicrovm,
    /// The same, with the host's KSM on and settled.
    QemuMicrovmKsm,
}

impl fmt::Display for Configuration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ShareOff => "share-off",
            Self::ShareBoot => "share-boot",
            Self::ShareRead => "share-read",
            Self::ShareAll => "share-all",
            Self::ShareAllTracefs => "share-all-tracefs",
            Self::Pmem => "pmem",
            Self::QemuMicrovm => "qemu-microvm",
            Self::QemuMicrovmKsm => "qemu-microvm-ksm",
        })
    }
}

impl Configuration {
    /// Whether guests are Coppice's, and not the peer's.
    pub(super) fn is_coppice(self) -> bool {
        match self {
            Self::QemuMicrovm | Self::QemuMicrovmKsm => false,
            Self::ShareOff
            | Self::ShareBoot
            | Self::ShareRead
            | Self::ShareAll
            | Self::ShareAllTracefs
            | Self::Pmem => true,
        }
    }

    /// Whether guests have their kernel compared with its reference image.
    pub(super) fn needs_reference(self) -> bool {
        matches!(self, Self::ShareAll | Self::ShareAllTracefs | Self::Pmem)
    }

    /// How its guests see their disk.
    pub(super) fn device(self) -> Device {
        match self {
            Self::Pmem => Device::Memory,
            Self::ShareOff
            | Self::ShareBoot
            | Self::ShareRead
            | Self::ShareAll
            | Self::ShareAllTracefs
            | Self::QemuMicrovm
            | Self::QemuMicrovmKsm => Device::Block,
        }
    }
}
