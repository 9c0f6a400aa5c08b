//! The kernel command line of a guest: what the user gave, and what follows from its devices.

use crate::boot::{self, MmioDevice};
use crate::config::{DriveConfig, PmemConfig, PmemMode, VmConfig};

/// What the guest mounts as its root.
#[derive(Clone, Copy)]
pub(super) enum Root<'a> {
    /// Its first drive, or a partition of it.
    Drive(&'a DriveConfig),
    /// Its first pmem device.
    Pmem(&'a PmemConfig),
}

impl<'a> Root<'a> {
    /// The root of a guest, if one is marked; there is one at most.
    pub(super) fn of(config: &'a VmConfig) -> Option<Self> {
        let drive = config.drives.iter().find(|drive| drive.is_root_device);
        let pmem = config.pmem.iter().find(|pmem| pmem.root_device);
        drive.map(Self::Drive).or(pmem.map(Self::Pmem))
    }

    fn words(self) -> String {
        // The root device is the first of its kind: its name in the guest is known.
        match self {
            Self::Drive(root) => {
                let device = root
                    .partuuid
                    .as_ref()
                    .map_or("/dev/vda".to_owned(), |uuid| format!("PARTUUID={uuid}"));
                let mode = if root.is_read_only { "ro" } else { "rw" };
                format!("root={device} {mode}")
            }
            Self::Pmem(root) => {
                let mode = match root.mode() {
                    PmemMode::Ro => "ro",
                    PmemMode::Cow | PmemMode::Rw => "rw",
                };
                format!("root=/dev/pmem0 {mode} rootflags=dax")
            }
        }
    }
}

/// Completes the command line that was given, or the default one.
///
/// Where a drive or a pmem device is marked as the root device, `root=` and its mode are added. A kernel that is told to do without ACPI (`acpi=off`)
/// gets a `virtio_mmio.device=` for each device; with ACPI it finds them in the DSDT, and would take them twice.
pub(super) fn complete(
    given: Option<&str>,
    root: Option<Root<'_>>,
    virtio: &[MmioDevice],
) -> String {
    let mut cmdline = given.unwrap_or(boot::DEFAULT_CMDLINE).to_owned();
    if let Some(root) = root {
        cmdline = format!("{cmdline} {}", root.words());
    }
    if cmdline
        .split_ascii_whitespace()
        .any(|word| word == "acpi=off")
    {
        for device in virtio {
            cmdline = format!("{cmdline} {}", device.cmdline());
        }
    }
    cmdline
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEVICE: MmioDevice = MmioDevice {
        base: 0xc000_1000,
        size: 0x1000,
        gsi: 5,
    };

    #[test]
    fn what_was_given_stays_as_it_is() {
        assert_eq!(complete(Some("quiet"), None, &[DEVICE]), "quiet");
        assert_eq!(complete(None, None, &[]), boot::DEFAULT_CMDLINE);
    }

    #[test]
    fn the_root_device_is_the_first_disk_or_named_by_its_partition() {
        let mut root = DriveConfig::new("root", "root.vhdx");
        root.is_read_only = true;
        assert_eq!(
            complete(Some("quiet"), Some(Root::Drive(&root)), &[]),
            "quiet root=/dev/vda ro"
        );
        root.partuuid = Some("0eaa91a0-01".into());
        root.is_read_only = false;
        assert_eq!(
            complete(Some("quiet"), Some(Root::Drive(&root)), &[]),
            "quiet root=PARTUUID=0eaa91a0-01 rw"
        );
    }

    #[test]
    fn a_pmem_device_as_root_is_mounted_by_dax() {
        for (mode, word) in [
            (PmemMode::Ro, "ro"),
            (PmemMode::Cow, "rw"),
            (PmemMode::Rw, "rw"),
        ] {
            let mut config = VmConfig {
                pmem: vec![
                    PmemConfig::new("data", "a", PmemMode::Ro),
                    PmemConfig::new("root", "b", mode),
                ],
                ..VmConfig::default()
            };
            assert!(Root::of(&config).is_none());
            config.pmem[1].root_device = true;
            assert_eq!(
                complete(Some("quiet"), Root::of(&config), &[]),
                format!("quiet root=/dev/pmem0 {word} rootflags=dax")
            );
        }
    }

    #[test]
    fn without_acpi_the_kernel_is_told_of_each_device() {
        let second = MmioDevice {
            base: 0xc000_2000,
            gsi: 6,
            ..DEVICE
        };
        assert_eq!(
            complete(Some("acpi=off"), None, &[DEVICE, second]),
            "acpi=off virtio_mmio.device=0x1000@0xc0001000:5 virtio_mmio.device=0x1000@0xc0002000:6"
        );
    }
}
