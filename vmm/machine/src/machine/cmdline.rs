//! The kernel command line of a guest: what the user gave, and what follows from its devices.

use memshare::ShareMode;

use config::limits::DEFAULT_CMDLINE;
use config::{DriveConfig, PmemConfig, PmemMode, VmConfig};
use kvm::boot::MmioDevice;

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

/// What a Linux guest is told to do with its memory.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct LinuxOptions {
    /// Linux reports single free pages, see [`report_every_page`].
    pub(super) reporting: bool,
    /// Linux makes no file of each of its trace events: those are some ten thousand inodes in every guest before Linux
    /// 6.6.
    pub(super) lean: Lean,
}

/// Whether Linux does without its trace file system (`--lean`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Lean {
    /// It has its trace file system.
    #[default]
    No,
    /// It does without, unless the command line has it trace something.
    IfUnused,
    /// It does without.
    Yes,
}

impl Lean {
    /// What the user has configured, and otherwise what suits the guest's mode of sharing.
    pub(super) fn new(configured: Option<bool>, mode: ShareMode) -> Self {
        match configured {
            Some(true) => Self::Yes,
            None if mode == ShareMode::All => Self::IfUnused,
            Some(false) | None => Self::No,
        }
    }

    fn applies(self, cmdline: &str) -> bool {
        /// How the words that set up tracing at boot begin (kernel-parameters.txt).
        const TRACING: [&str; 5] = [
            "ftrace",
            "trace_",
            "tp_printk",
            "kprobe_event",
            "stacktrace",
        ];
        let traces = |word: &str| TRACING.iter().any(|name| word.starts_with(name));
        match self {
            Self::No => false,
            Self::IfUnused => !cmdline.split_ascii_whitespace().any(traces),
            Self::Yes => true,
        }
    }
}

const LEAN: &str = "initcall_blacklist=event_trace_init,tracer_init_tracefs";

/// Completes the command line that was given, or the default one.
///
/// Where a drive or a pmem device is marked as the root device, `root=` and its mode are added. A kernel that is told
/// to do without ACPI (`acpi=off`) gets a `virtio_mmio.device=` for each device; with ACPI it finds them in the DSDT,
/// and would take them twice. The words for `options` are added unless the command line has them.
pub(super) fn complete(
    given: Option<&str>,
    root: Option<Root<'_>>,
    virtio: &[MmioDevice],
    options: LinuxOptions,
) -> String {
    let mut cmdline = given.unwrap_or(DEFAULT_CMDLINE).to_owned();
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
    if options.reporting {
        cmdline = report_every_page(cmdline);
    }
    if options.lean.applies(&cmdline) && !cmdline.contains("initcall_blacklist=") {
        cmdline = format!("{cmdline} {LEAN}");
    }
    cmdline
}

/// Has Linux report free memory down to single pages, unless the command line says otherwise. By default Linux reports
/// free blocks of 2 MiB and more, and only while 64 MiB are free, so that a small guest reports nothing. Linux before
/// 6.2 forgets this word when the driver loads.
fn report_every_page(cmdline: String) -> String {
    if cmdline.contains("page_reporting_order") {
        cmdline
    } else {
        cmdline + " page_reporting.page_reporting_order=0"
    }
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
        assert_eq!(
            complete(Some("quiet"), None, &[DEVICE], LinuxOptions::default()),
            "quiet"
        );
        assert_eq!(
            complete(None, None, &[], LinuxOptions::default()),
            DEFAULT_CMDLINE
        );
    }

    #[test]
    fn the_root_device_is_the_first_disk_or_named_by_its_partition() {
        let mut root = DriveConfig::new("root", "root.vhdx");
        root.is_read_only = true;
        assert_eq!(
            complete(
                Some("quiet"),
                Some(Root::Drive(&root)),
                &[],
                LinuxOptions::default()
            ),
            "quiet root=/dev/vda ro"
        );
        root.partuuid = Some("0eaa91a0-01".into());
        root.is_read_only = false;
        assert_eq!(
            complete(
                Some("quiet"),
                Some(Root::Drive(&root)),
                &[],
                LinuxOptions::default()
            ),
            "quiet root=PARTUUID=0eaa91a0-01 rw"
        );
    }

    #[test]
    fn free_pages_are_reported_one_by_one_unless_the_command_line_sets_the_order() {
        let with = |given| {
            let options = LinuxOptions {
                reporting: true,
                ..LinuxOptions::default()
            };
            complete(Some(given), None, &[], options)
        };
        assert_eq!(with("quiet"), "quiet page_reporting.page_reporting_order=0");
        let given = "quiet page_reporting.page_reporting_order=9";
        assert_eq!(with(given), given);
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
                complete(
                    Some("quiet"),
                    Root::of(&config),
                    &[],
                    LinuxOptions::default()
                ),
                format!("quiet root=/dev/pmem0 {word} rootflags=dax")
            );
        }
    }

    #[test]
    fn a_lean_guest_has_no_trace_events_unless_the_command_line_sets_up_tracing() {
        let with = |configured, mode, given| {
            let lean = Lean::new(configured, mode);
            let reporting = false;
            complete(Some(given), None, &[], LinuxOptions { reporting, lean })
        };
        let (all, read) = (ShareMode::All, ShareMode::Read);
        let (lean, full) = (format!("quiet {LEAN}"), "quiet");
        assert_eq!(with(None, all, "quiet"), lean);
        assert_eq!(with(None, read, "quiet"), full);
        assert_eq!(with(Some(true), read, "quiet"), lean);
        assert_eq!(with(Some(false), all, "quiet"), full);
        assert_eq!(
            with(Some(true), all, "initcall_blacklist=x"),
            "initcall_blacklist=x"
        );
        let traced = "trace_event=sched:*";
        assert_eq!(with(None, all, traced), traced);
        assert_eq!(with(Some(true), all, traced), format!("{traced} {LEAN}"));
    }

    #[test]
    fn without_acpi_each_device_is_on_the_command_line() {
        let second = MmioDevice {
            base: 0xc000_2000,
            gsi: 6,
            ..DEVICE
        };
        assert_eq!(
            complete(
                Some("acpi=off"),
                None,
                &[DEVICE, second],
                LinuxOptions::default()
            ),
            "acpi=off virtio_mmio.device=0x1000@0xc0001000:5 virtio_mmio.device=0x1000@0xc0002000:6"
        );
    }
}
