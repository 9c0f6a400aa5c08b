//! Which crate of the workspace may use which.

use std::io;
use std::path::PathBuf;
use std::process::Command;

use serde::Deserialize;

/// What every crate may use, those of tests too: it shows errors to people, and uses none.
pub const REPORTER: &str = "report";

/// The crates from the ground up: each may use those of the lines above its own, and none beside it.
///
/// Cargo refuses circles by itself; this also says which way is down. `storage` and `memshare` know nothing of each
/// other nor of virtio and KVM; the programs beside the daemon are linked into nothing that a guest's process is made
/// of.
pub const LAYERS: &[&[&str]] = &[
    &[REPORTER],
    &["storage", "memshare"],
    &["devices"],
    &["host", "config"],
    &["kvm"],
    &["jail"],
    &["network"],
    &["machine"],
    &["control"],
    &["daemon"],
    &["cli"],
    &["bench", "tools"],
    &["coppice"],
];

/// Tests that may use a crate above their own, and the reason.
pub const UPWARD: &[(&str, &str)] = &[
    // A test checks that the command line parses the arguments that the daemon prints.
    ("daemon", "cli"),
];

/// The crates of tests, which use none of the others but the reporter: the lab runs the program, as a user does.
pub const TESTS: &[&str] = &["lab", "tree"];

/// What the tests of every crate may use.
pub const TEST_HELPERS: &[&str] = &["skip"];

/// A crate of the workspace, as `cargo metadata` describes it.
#[derive(Debug, Deserialize)]
pub struct Crate {
    /// Its name.
    pub name: String,
    /// What it depends on, for its tests and its build too.
    pub dependencies: Vec<Dependency>,
    /// What is built of it.
    pub targets: Vec<Target>,
}

/// A dependency of a crate.
#[derive(Debug, Deserialize)]
pub struct Dependency {
    /// The crate's name.
    pub name: String,
    /// Its folder, where it is of this workspace and not of a registry.
    pub path: Option<PathBuf>,
    /// `dev` or `build`; `None` where it is for the crate itself.
    pub kind: Option<String>,
}

/// A library, program or test.
#[derive(Debug, Deserialize)]
pub struct Target {
    /// `lib`, `bin`, `test`, `bench`, `custom-build`.
    pub kind: Vec<String>,
    /// The file of its root module.
    pub src_path: PathBuf,
}

#[derive(Deserialize)]
struct Metadata {
    packages: Vec<Crate>,
    workspace_root: PathBuf,
}

/// The workspace, as `cargo metadata` describes it.
#[derive(Debug)]
pub struct Workspace {
    /// Its crates.
    pub crates: Vec<Crate>,
    /// Its folder.
    pub root: PathBuf,
}

/// Why the workspace cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum CratesError {
    /// Cargo cannot be started.
    #[error("cannot run cargo metadata")]
    Run(#[source] io::Error),
    /// Cargo failed; its output.
    #[error("cargo metadata failed: {0}")]
    Failed(String),
    /// The output of cargo is not in the documented format.
    #[error("cannot read what cargo metadata printed")]
    Parse(#[source] serde_json::Error),
}

/// The workspace that the working directory is in.
///
/// # Errors
/// [`CratesError`].
pub fn read() -> Result<Workspace, CratesError> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .args(["metadata", "--no-deps", "--format-version", "1"])
        .output()
        .map_err(CratesError::Run)?;
    if !output.status.success() {
        return Err(CratesError::Failed(
            String::from_utf8_lossy(&output.stderr).into_owned(),
        ));
    }
    let metadata: Metadata = serde_json::from_slice(&output.stdout).map_err(CratesError::Parse)?;
    Ok(Workspace {
        crates: metadata.packages,
        root: metadata.workspace_root,
    })
}

/// One line for each dependency that the layers do not allow, and for each crate that they do not know.
pub fn violations(crates: &[Crate]) -> Vec<String> {
    let mut found = Vec::new();
    for user in crates {
        let name = user.name.as_str();
        let layer = layer(name);
        if layer.is_none() && !TESTS.contains(&name) && !TEST_HELPERS.contains(&name) {
            found.push(format!(
                "crate {name} has no place in the layers of {}",
                file!()
            ));
            continue;
        }
        for used in user
            .dependencies
            .iter()
            .filter(|dependency| dependency.path.is_some())
        {
            let is_for_tests = used.kind.as_deref() == Some("dev");
            let is_allowed = TEST_HELPERS.contains(&used.name.as_str())
                || UPWARD.contains(&(name, used.name.as_str()));
            let is_below = layer
                .zip(self::layer(&used.name))
                .is_some_and(|(user, used)| used < user);
            if !(is_below || used.name == REPORTER || is_for_tests && is_allowed) {
                found.push(format!("crate {name} may not use {}", used.name));
            }
        }
    }
    found
}

fn layer(name: &str) -> Option<usize> {
    LAYERS.iter().position(|layer| layer.contains(&name))
}
