//! The work that a guest does before it idles: a script for the guest's `/init`, and the checksum that it has to print.

use std::fmt::{self, Write as _};

use base64::Engine as _;
use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// The beginning of the line on which a guest prints its checksum.
pub(super) const SUM: &str = "BENCH-SUM ";
/// The line that a guest prints when its work is done, and it idles.
pub(super) const IDLE: &str = "BENCH-IDLE";
/// The beginning of the line on which `/init` prints the uptime at its start.
pub(super) const INIT: &str = "COPPICE-INIT uptime=";

/// Lines that [`Workload::Write`] writes, of 128 bytes: 16 MiB.
const LINES: u32 = (16 << 20) / 128;
/// MD5 of the file that `resources/guest/build.sh` puts on the benchmark's disk.
const DATA_MD5: &str = "5190a94c24b537fd1ac2c225956dac1d";
/// MD5 of "idle" and a newline.
const IDLE_MD5: &str = "20426e7fb47b7cc498125e6477f152a5";
/// MD5 of 4096 times all bytes.
const PYTHON_MD5: &str = "c35cc7d8d91728a0cb052831bc4ef372";
/// The modules of the library that Debian's python3-minimal has. The guest compiles each of them, as the disk has no
/// bytecode.
const PYTHON_MODULES: &str = "argparse,ast,calendar,configparser,csv,datetime,dis,email.parser,hashlib,inspect,ipaddress,\
                              logging,pathlib,pickle,platform,random,selectors,ssl,subprocess,threading,time,traceback,typing,urllib.parse";

/// What a guest does before it idles.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Workload {
    /// Mounts its disk.
    Idle,
    /// Reads a file of 40 MiB from its disk.
    Read,
    /// Starts Python, imports much of its library, and stays there.
    Python,
    /// Writes 16 MiB to a folder in memory, no page of it as another guest's.
    Write,
}

impl fmt::Display for Workload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Idle => "idle",
            Self::Read => "read",
            Self::Python => "python",
            Self::Write => "write",
        })
    }
}

/// How a guest sees its disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Device {
    /// virtio-blk.
    Block,
    /// virtio-pmem, read in place.
    Memory,
}

impl Device {
    /// The name in the guest of the disk that follows its own.
    fn next(self) -> &'static str {
        match self {
            Self::Block => "/dev/vdb",
            Self::Memory => "/dev/vda",
        }
    }
}

impl Workload {
    /// The word of the kernel command line that makes `/init` do the work. With `flags_len`, the guest writes that many
    /// bytes of `/proc/kpageflags` to the disk that follows its own before it idles.
    pub(super) fn cmdline(self, device: Device, guest: usize, flags_len: Option<u64>) -> String {
        let script = self.script(device, guest, flags_len);
        let script = base64::engine::general_purpose::STANDARD.encode(script);
        format!("coppice.sh={script}")
    }

    /// The shell commands of guest number `guest`.
    fn script(self, device: Device, guest: usize, flags_len: Option<u64>) -> String {
        let mount = match device {
            Device::Block => "mount -t ext4 -o ro /dev/vda /mnt",
            // The device appears some time after its driver.
            Device::Memory => {
                "until [ -e /dev/pmem0 ]; do sleep 0.1; done; mount -t ext4 -o ro,dax /dev/pmem0 /mnt"
            }
        };
        // The flags are read at once, so that they do not show the work of writing them; and only those of RAM, as the
        // file goes on to the end of pmem.
        let dump = flags_len.map_or_else(String::new, |len| {
            let disk = device.next();
            format!("dd if=/proc/kpageflags of={disk} bs={len} count=1 conv=fsync\n")
        });
        let work = match self {
            Self::Idle => "S=$(echo idle | md5sum)".to_owned(),
            Self::Read => "cat /mnt/data/40M >/dev/null; S=$(md5sum /mnt/data/40M)".to_owned(),
            Self::Python => {
                // Python's root folder has neither file, so that it inherits both as open descriptors.
                let (dump, files) = flags_len.map_or_else(Default::default, |len| {
                    let dump = format!(
                        "import os\nos.write(4, os.read(3, {len}))\nos.fsync(4)\nos.close(4)\n"
                    );
                    let files = format!(" 3</proc/kpageflags 4>{}", device.next());
                    (dump, files)
                });
                format!(
                    "exec chroot /mnt /usr/bin/python3 -c 'import {PYTHON_MODULES}\n\
                     print(\"{SUM}\" + hashlib.md5(bytes(range(256)) * 4096).hexdigest())\n\
                     {dump}print(\"{IDLE}\", flush=True)\n\
                     time.sleep(1e6)'{files}"
                )
            }
            Self::Write => format!(
                "awk 'BEGIN {{ for (i = 0; i < {LINES}; i++) printf \"%08d-%0118d\\n\", {guest}, i }}' >/tmp/data; \
                 S=$(sha256sum /tmp/data)"
            ),
        };
        format!(
            "{mount}\n{work}\nS=${{S%% *}}\necho \"{SUM}${{S:-none}}\"\n{dump}echo {IDLE}\nexec sleep 1000000\n"
        )
    }

    /// The checksum that guest number `guest` has to print.
    pub(super) fn expected(self, guest: usize) -> String {
        match self {
            Self::Idle => IDLE_MD5.to_owned(),
            Self::Read => DATA_MD5.to_owned(),
            Self::Python => PYTHON_MD5.to_owned(),
            Self::Write => {
                let mut sum = Sha256::new();
                for line in 0..LINES {
                    sum.update(format!("{guest:08}-{line:0118}\n"));
                }
                let mut text = String::new();
                for byte in sum.finalize() {
                    // Writing to a string does not fail.
                    let _ = write!(text, "{byte:02x}");
                }
                text
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    /// The room for the work on the command line of a Linux kernel, beside the words that are always there.
    const ROOM: usize = 2047 - 100;

    #[test]
    fn scripts_are_shell_and_fit_the_kernel_command_line() {
        for workload in Workload::value_variants() {
            for device in [Device::Block, Device::Memory] {
                for flags_len in [None, Some(6 << 20)] {
                    let cmdline = workload.cmdline(device, 999, flags_len);
                    assert!(cmdline.len() < ROOM, "{workload}");
                    let script = workload.script(device, 1, flags_len);
                    let checked = Command::new("sh").args(["-n", "-c", &script]).status();
                    assert!(checked.unwrap().success(), "{script}");
                }
            }
        }
    }

    #[test]
    fn what_guests_write_differs_and_is_as_a_shell_writes_it() {
        let shell = Command::new("sh")
            .arg("-c")
            .arg(format!(
                "awk 'BEGIN {{ for (i = 0; i < {LINES}; i++) printf \"%08d-%0118d\\n\", 3, i }}' | sha256sum"
            ))
            .output()
            .unwrap();
        let shell = String::from_utf8(shell.stdout).unwrap();
        let expected = Workload::Write.expected(3);
        assert_eq!(shell.split(' ').next(), Some(expected.as_str()));
        assert_ne!(expected, Workload::Write.expected(4));
    }

    #[test]
    fn a_script_names_the_disk_of_the_guest() {
        let script = |device| Workload::Read.script(device, 1, None);
        assert!(script(Device::Block).contains("ro /dev/vda"));
        assert!(script(Device::Memory).contains("ro,dax /dev/pmem0"));
    }

    #[test]
    fn page_flags_are_left_on_the_next_disk_before_the_guest_idles() {
        for workload in Workload::value_variants() {
            for (device, disk) in [(Device::Block, "/dev/vdb"), (Device::Memory, "/dev/vda")] {
                let script = workload.script(device, 1, Some(4096));
                assert!(script.contains("/proc/kpageflags"), "{script}");
                assert!(script.contains(disk), "{script}");
                assert!(script.find("4096") < script.find(IDLE), "{script}");
                let script = workload.script(device, 1, None);
                assert!(!script.contains("kpageflags") && !script.contains("/dev/vdb"));
            }
        }
    }
}
