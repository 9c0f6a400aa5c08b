//! The command that starts a guest of a configuration.

use std::fs::File;
use std::io::Read;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use ::host::program;

use super::configuration::Configuration;
use super::error::BenchError;
use super::options::Options;
use super::page_use;
use super::workload::{Device, Workload};

/// The program that runs guests. This process's program has only the tools.
///
/// # Errors
/// `Io`.
pub(super) fn coppice() -> Result<PathBuf, BenchError> {
    program::beside_this(program::COPPICE).map_err(BenchError::io("find coppice"))
}

/// The words on the command line of every guest, which its work follows.
pub(super) const CMDLINE: &str = "console=ttyS0 reboot=k panic=-1 quiet";

impl Configuration {
    /// The program and arguments of guest number `guest`. `kernel` is the unpacked kernel, for the peer. A guest of
    /// Coppice gets `flags` as one more disk, and writes its page flags to it.
    pub(super) fn command(
        self,
        options: &Options,
        kernel: &Path,
        workload: Workload,
        guest: usize,
        flags: Option<&Path>,
    ) -> Result<Command, BenchError> {
        let flags_len = flags.map(|_| page_use::flags_len(options.memory));
        let work = workload.cmdline(self.device(), guest, flags_len);
        let cmdline = format!("{CMDLINE} {work}");
        let disk = options.inputs.disk(workload);
        let share = match self {
            Self::ShareOff => Some("off"),
            Self::ShareBoot => Some("boot"),
            Self::ShareRead => Some("read"),
            Self::ShareAll | Self::ShareAllTracefs | Self::Pmem => Some("all"),
            Self::QemuMicrovm | Self::QemuMicrovmKsm => {
                let merge = self == Self::QemuMicrovmKsm;
                let format = format_of(disk)?;
                let mut command = options.peer.command(&options.inputs, options.memory, merge);
                command.arg("-drive").arg(format!(
                    "id=base,if=none,file={},format={format},readonly=on",
                    doubled_commas(disk)
                ));
                command.arg("-kernel").arg(kernel);
                command.arg("-append").arg(cmdline);
                return Ok(command);
            }
        };
        let mut command = Command::new(coppice()?);
        command.arg0("coppice").arg("run");
        command.arg("--kernel").arg(&options.inputs.kernel);
        command.arg("--initrd").arg(&options.inputs.initrd);
        command.arg("--mem").arg(format!("{}M", options.memory));
        let option = match self.device() {
            Device::Block => "--disk",
            Device::Memory => "--pmem",
        };
        command
            .arg(option)
            .arg(format!("{},ro", doubled_commas(disk)));
        // This disk comes before those that the user adds, which would change its name in the guest.
        if let Some(flags) = flags {
            command
                .arg("--disk")
                .arg(format!("{},format=raw", doubled_commas(flags)));
        }
        if let Some(share) = share {
            command.args(["--share", share]);
        }
        if self == Self::ShareAllTracefs {
            command.arg("--lean=false");
        }
        command.args(&options.run_arguments);
        command.arg("--cmdline").arg(cmdline);
        Ok(command)
    }
}

/// Escapes a path for a list of options, of Coppice and of QEMU: commas are doubled.
fn doubled_commas(path: &Path) -> String {
    path.to_string_lossy().replace(',', ",,")
}

/// QEMU's name of a disk's format.
fn format_of(disk: &Path) -> Result<&'static str, BenchError> {
    let mut start = Vec::new();
    File::open(disk)
        .and_then(|file| file.take(8).read_to_end(&mut start))
        .map_err(BenchError::io(format!("read {}", disk.display())))?;
    // MS-VHDX 2.2.1: the signature of the file type identifier.
    Ok(if start == b"vhdxfile" { "vhdx" } else { "raw" })
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::{Args, ValueEnum};

    use crate::Inputs;
    use cli::RunArguments;

    fn options() -> Options {
        Options {
            inputs: Inputs {
                kernel: "k".into(),
                initrd: "i".into(),
                disk: "/proc/version".into(),
                python_disk: "p,q".into(),
            },
            peer: "ld.so --library-path lib qemu".parse().unwrap(),
            run_arguments: vec!["--log".into(), "info".into()],
            ..Options::default()
        }
    }

    fn arguments(configuration: Configuration, workload: Workload) -> Vec<String> {
        arguments_with(configuration, workload, None)
    }

    fn arguments_with(
        configuration: Configuration,
        workload: Workload,
        flags: Option<&Path>,
    ) -> Vec<String> {
        let command = configuration
            .command(&options(), Path::new("/elf"), workload, 1, flags)
            .unwrap();
        std::iter::once(command.get_program())
            .chain(command.get_args())
            .map(|word| word.to_string_lossy().into_owned())
            .collect()
    }

    #[test]
    fn sharing_is_an_option_of_run() {
        let words = arguments(Configuration::ShareAll, Workload::Read).join(" ");
        let program = coppice().unwrap();
        assert_eq!(program.file_name().unwrap(), "coppice");
        let words = words.strip_prefix(program.to_str().unwrap()).unwrap();
        assert!(
            words.starts_with(
                " run --kernel k --initrd i --mem 128M --disk /proc/version,ro \
                 --share all --log info --cmdline console=ttyS0"
            ),
            "{words}"
        );
        let words = arguments(Configuration::ShareOff, Workload::Python).join(" ");
        assert!(
            words.contains("--disk p,,q,ro --share off --log"),
            "{words}"
        );
        let words = arguments(Configuration::Pmem, Workload::Read).join(" ");
        assert!(
            words.contains("--pmem /proc/version,ro --share all --log"),
            "{words}"
        );
    }

    #[test]
    fn page_flags_go_to_a_disk_after_the_guest_s_own() {
        let flags = Some(Path::new("/f,1"));
        let words = arguments_with(Configuration::ShareAll, Workload::Read, flags).join(" ");
        assert!(
            words.contains("--disk /proc/version,ro --disk /f,,1,format=raw --share all --log"),
            "{words}"
        );
        let words = arguments_with(Configuration::Pmem, Workload::Read, flags).join(" ");
        assert!(
            words.contains("--pmem /proc/version,ro --disk /f,,1,format=raw --share all --log"),
            "{words}"
        );
    }

    #[test]
    fn the_peer_is_started_through_its_loader() {
        let words = arguments(Configuration::QemuMicrovmKsm, Workload::Read).join(" ");
        assert!(
            words.starts_with("ld.so --library-path lib qemu -M microvm"),
            "{words}"
        );
        for part in [
            "mem-merge=on",
            "-m 128",
            "file=/proc/version,format=raw",
            "-kernel /elf -append console=ttyS0",
        ] {
            assert!(words.contains(part), "{part} in {words}");
        }
        let words = arguments(Configuration::QemuMicrovm, Workload::Read).join(" ");
        assert!(words.contains("mem-merge=off"), "{words}");
    }

    #[test]
    fn run_understands_what_its_guests_are_started_with() {
        for configuration in Configuration::value_variants() {
            if !configuration.is_coppice() {
                continue;
            }
            let flags = Some(Path::new("/f"));
            let words = arguments_with(*configuration, Workload::Read, flags);
            let command = RunArguments::augment_args(clap::Command::new("coppice"));
            let words = words.into_iter().skip(1);
            let parsed = command.try_get_matches_from(words);
            assert!(parsed.is_ok(), "{configuration}: {parsed:?}");
        }
    }

    #[test]
    fn names_are_those_of_the_command_line() {
        for configuration in Configuration::value_variants() {
            let name = configuration.to_possible_value().unwrap();
            assert_eq!(name.get_name(), configuration.to_string());
            let json = serde_json::to_value(configuration).unwrap();
            assert_eq!(json, configuration.to_string());
        }
    }
}
