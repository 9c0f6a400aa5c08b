//! The programs of Coppice, which lie in one folder.

use std::path::PathBuf;
use std::{env, io};

/// What runs guests and serves them.
pub const COPPICE: &str = "coppice";
/// What `coppice` does beside that, in a program of its own.
pub const TOOLS: &str = "coppice-tools";

/// Where a program of Coppice is: in the folder that the file of this one is, or was, in.
///
/// # Errors
/// Where the host does not tell which file this process runs.
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
