//! Lets a test report that it cannot run on this machine.
//!
//! The harness only knows tests that passed and tests that failed. A test that returns early because the host forbids
//! what it tests would count as passed, and its output is dropped like that of all tests that pass. So the test also
//! writes a line to the file that `COPPICE_SKIPPED` names; `make unit` prints that file's lines, and their number, when
//! all tests have ended.

mod huge_pages;

use std::ffi::OsStr;
use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::process::Command;

pub use huge_pages::HugePages;

/// Names the file that gets a line for each test that cannot run. An absolute path: tests run in the folders of their
/// crates.
const FILE: &str = "COPPICE_SKIPPED";

/// Records that the calling test does not run, and why. The test has to return after it.
///
/// # Panics
///
/// If the file of `COPPICE_SKIPPED` cannot be written, because otherwise the test would pass without a report.
pub fn because(reason: &str) {
    let thread = std::thread::current();
    let test = thread.name().unwrap_or("a test");
    let line = line(
        &binary(std::env::current_exe().ok().as_deref()),
        test,
        reason,
    );
    eprint!("skipped: {line}");
    if let Some(path) = std::env::var_os(FILE) {
        append(&path, &line);
    }
}

/// Whether this process is root's. Where it is not, records that the calling test does not run, as it has to become
/// other users.
pub fn unless_root() -> bool {
    let is_root = rustix::process::geteuid().is_root();
    if !is_root {
        because("only root can become other users");
    }
    is_root
}

/// Whether a process can have a mount namespace of its own. Where it cannot, records that the calling test does not
/// run.
pub fn unless_own_mounts() -> bool {
    let folder = std::env::temp_dir();
    let mount = Command::new("unshare")
        .args(["--map-root-user", "--mount", "mount", "-t", "tmpfs", "none"])
        .arg(folder)
        .output();
    let why = match mount {
        Ok(output) if output.status.success() => return true,
        Ok(output) => String::from_utf8_lossy(&output.stderr).into_owned(),
        Err(error) => report::chain(&error).to_string(),
    };
    because(&format!("a process can have no mounts of its own: {why}"));
    false
}

fn line(binary: &str, test: &str, reason: &str) -> String {
    // Each test has one line, even if the text of an error has several.
    let reason = reason.split_whitespace().collect::<Vec<_>>().join(" ");
    format!("{binary} {test}: {reason}\n")
}

fn append(path: &OsStr, line: &str) {
    // Tests run at the same time, in processes and threads. With O_APPEND and one write, their lines do not mix.
    File::options()
        .append(true)
        .create(true)
        .open(path)
        .and_then(|mut file| file.write_all(line.as_bytes()))
        .unwrap_or_else(|error| panic!("{}: {}", path.display(), report::chain(&error)));
}

/// The name of a test's program, without the hash that Cargo adds.
fn binary(path: Option<&Path>) -> String {
    let name = path
        .and_then(Path::file_stem)
        .unwrap_or(OsStr::new("test"))
        .to_string_lossy();
    match name.rsplit_once('-') {
        Some((name, hash)) if hash.len() == 16 && u64::from_str_radix(hash, 16).is_ok() => {
            name.to_owned()
        }
        _ => name.into_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_test_that_cannot_run_is_a_line_of_the_file() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("skipped");
        append(path.as_os_str(), &line("serve", "a", "no\n root"));
        append(path.as_os_str(), &line("serve", "b::c", "no KVM"));
        let text = std::fs::read_to_string(&path).expect("the file");
        assert_eq!(text, "serve a: no root\nserve b::c: no KVM\n");
    }

    #[test]
    #[should_panic(expected = "/nowhere/skipped")]
    fn a_test_that_cannot_report_that_it_does_not_run_fails() {
        append(OsStr::new("/nowhere/skipped"), "serve a: no root\n");
    }

    #[test]
    fn a_program_is_named_without_its_hash() {
        let name = |path: &str| binary(Some(Path::new(path)));
        assert_eq!(
            name("/target/debug/deps/serve_many-0123456789abcdef"),
            "serve_many"
        );
        assert_eq!(name("/target/debug/deps/serve-many"), "serve-many");
        assert_eq!(binary(None), "test");
    }
}
