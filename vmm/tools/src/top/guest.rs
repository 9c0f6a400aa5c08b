//! The guests of this user, by their processes.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use clap::Parser;

use cli::{Cli, Command, RunArguments};
use config::{MachineConfig, VmConfig};
use control::launch_spec::CONFIG;
use host::program;

/// A guest, as its command line describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct GuestDescription {
    pub(super) name: String,
    pub(super) socket: Option<PathBuf>,
    pub(super) ram_mib: u32,
}

/// The number of words of the command line of a daemon's guest that are parsed. Daemons of older versions gave more
/// words, which are not parsed any more.
const GATED_WORDS: usize = 11;

/// The arguments of `coppice run`, by the kernel's `cmdline` of a process.
fn run_arguments(cmdline: &str) -> Option<RunArguments> {
    // The command line of a copy of the zygote is padded with zeros.
    let mut words: Vec<_> = cmdline.trim_end_matches('\0').split('\0').collect();
    if words.get(2) == Some(&"--held") {
        words.truncate(GATED_WORDS);
    }
    match Cli::try_parse_from(words).ok()?.command {
        Command::Run(arguments) => Some(*arguments),
        Command::Disk(_)
        | Command::Image(_)
        | Command::Serve(_)
        | Command::Zygote { .. }
        | Command::DiskParent { .. }
        | Command::Vm(_)
        | Command::Console { .. }
        | Command::Completions(_)
        | Command::Man(_)
        | Command::Bench(_)
        | Command::Top(_)
        | Command::Doctor(_) => None,
    }
}

/// The guest of a process with the command line `cmdline` in the folder `cwd`.
pub(super) fn describe(cmdline: &str, cwd: &Path) -> Option<GuestDescription> {
    let arguments = run_arguments(cmdline)?;
    let stem = |path: &PathBuf| {
        path.file_stem()
            .map(|stem| stem.to_string_lossy().into_owned())
    };
    let by_file = || {
        [&arguments.api_sock, &arguments.kernel, &arguments.config]
            .into_iter()
            .flatten()
            .find_map(stem)
    };
    let name = arguments.id.clone().or_else(by_file);
    let file = match &arguments.config {
        // A daemon's guest gets its configuration by its launch specification, and it is also in a file of its folder.
        None if arguments.held => Some(Path::new(CONFIG)),
        file => file.as_deref(),
    };
    let configured = || {
        let path = cwd.join(file?);
        // In a daemon's folder, a guest may have put a link or a named pipe there, which would have to be waited for.
        let metadata = if arguments.held {
            fs::symlink_metadata(&path)
        } else {
            fs::metadata(&path)
        };
        let path = metadata.ok()?.is_file().then_some(path)?;
        let config = VmConfig::from_file(&path).ok()?;
        Some(config.machine_config.mem_size_mib)
    };
    let ram = arguments.mem.map(|mem| mem.0).or_else(configured);
    Some(GuestDescription {
        name: name.unwrap_or_else(|| "-".to_owned()),
        socket: arguments.api_sock.map(|path| cwd.join(path)),
        ram_mib: ram.unwrap_or(MachineConfig::default().mem_size_mib),
    })
}

/// Whether `exe` names a `coppice`: by its name, or as the file beside the one that this process runs.
fn is_coppice(exe: &Path) -> bool {
    let name = exe.file_name().map(|name| name.to_string_lossy());
    let name = name.as_deref().unwrap_or_default();
    // The kernel appends this to the name of a file that was replaced since.
    let name = name.strip_suffix(" (deleted)").unwrap_or(name);
    name == program::COPPICE || program::beside_this(program::COPPICE).is_ok_and(|own| own == exe)
}

/// The guest of a process, if the process is a guest's, and this user's.
pub(super) fn of_process(pid: u32) -> Option<GuestDescription> {
    let folder = PathBuf::from(format!("/proc/{pid}"));
    if fs::metadata(&folder).ok()?.uid() != rustix::process::geteuid().as_raw() {
        return None;
    }
    if !is_coppice(&fs::read_link(folder.join("exe")).ok()?) {
        return None;
    }
    let cmdline = fs::read(folder.join("cmdline")).ok()?;
    let cwd = fs::read_link(folder.join("cwd")).ok()?;
    describe(&String::from_utf8_lossy(&cmdline), &cwd)
}

/// The numbers of all processes.
pub(super) fn processes() -> io::Result<Vec<u32>> {
    let entries = fs::read_dir("/proc")?;
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    Ok(names.filter_map(|name| name.parse().ok()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn described(words: &[&str]) -> Option<GuestDescription> {
        let cmdline: String = words.iter().flat_map(|word| [*word, "\0"]).collect();
        describe(&cmdline, Path::new("/cwd"))
    }

    #[test]
    fn a_guest_is_named_by_its_socket_or_its_kernel() {
        let words = [
            "coppice",
            "run",
            "--api-sock",
            "a/web 1.sock",
            "--kernel",
            "k",
        ];
        let guest = described(&words).unwrap();
        assert_eq!((guest.name.as_str(), guest.ram_mib), ("web 1", 128));
        assert_eq!(guest.socket, Some("/cwd/a/web 1.sock".into()));
        let words = [
            "/x/coppice",
            "run",
            "--kernel",
            "/boot/vmlinuz",
            "--mem",
            "1G",
        ];
        let guest = described(&words).unwrap();
        assert_eq!((guest.name.as_str(), guest.ram_mib), ("vmlinuz", 1024));
        assert_eq!(guest.socket, None);
    }

    #[test]
    fn a_guest_of_a_daemon_has_its_configuration_in_its_folder() {
        let folder = tempfile::tempdir().unwrap();
        let config = r#"{"machine-config": {"vcpu_count": 1, "mem_size_mib": 256}}"#;
        fs::write(folder.path().join("config.json"), config).unwrap();
        let new = "coppice\0run\0--held\0--id\0b\0--api-sock\0api.sock\0--console-sock\0console.sock\0--end-file\0end.json\0";
        // Daemons of older versions passed everything on the command line.
        let old = format!("{new}--config\0config.json\0--only-configure\0");
        for cmdline in [new, &old] {
            let guest = describe(cmdline, folder.path()).unwrap();
            assert_eq!((guest.name.as_str(), guest.ram_mib), ("b", 256));
        }
    }

    #[test]
    fn a_guest_that_has_replaced_its_configuration_by_a_pipe_is_not_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("config.json");
        rustix::fs::mkfifoat(rustix::fs::CWD, &path, rustix::fs::Mode::RWXU).unwrap();
        let cmdline = "coppice\0run\0--held\0--id\0b\0--api-sock\0api.sock\0--console-sock\0console.sock\0--end-file\0end.json\0";
        let guest = describe(cmdline, folder.path()).unwrap();
        assert_eq!((guest.name.as_str(), guest.ram_mib), ("b", 128));
    }

    #[test]
    fn other_commands_are_no_guests() {
        for words in [
            &["coppice", "top"][..],
            &["coppice", "disk", "info", "run"],
            &["coppice", "run", "--colour"],
            &["coppice"],
            &[],
        ] {
            assert_eq!(described(words), None, "{words:?}");
        }
    }

    #[test]
    fn a_replaced_program_is_still_one() {
        assert!(is_coppice(Path::new("/usr/bin/coppice")));
        assert!(is_coppice(Path::new("/usr/bin/coppice (deleted)")));
        assert!(is_coppice(&program::beside_this("coppice").unwrap()));
        assert!(!is_coppice(Path::new("/usr/bin/coppice-old")));
        assert!(!is_coppice(Path::new("/")));
    }
}
