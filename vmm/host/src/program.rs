//! The programs of Coppice, which are installed in one folder.

use std::path::PathBuf;
use std::{env, io};

/// The program that runs guests and is the daemon.
pub const COPPICE: &str = "coppice";
/// The program with the commands that run no guest, such as `coppice disk`.
pub const TOOLS: &str = "coppice-tools";

/// The path of a program of Coppice: in the folder that the file of this process's program is, or was, in.
///
/// # Errors
/// Where the host does not report which file this process runs.
pub fn beside_this(name: &str) -> io::Result<PathBuf> {
    Ok(env::current_exe()?.with_file_name(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_lie_in_one_folder() {
        let this = env::current_exe().unwrap();
        let tools = beside_this(TOOLS).unwrap();
        assert_eq!(tools.parent(), this.parent());
        assert!(tools.ends_with(TOOLS));
    }
}
