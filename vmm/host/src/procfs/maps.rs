//! The files that a process maps, by `/proc/PID/maps`.

/// A mapping of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MappedFile {
    /// Device and inode, because different files can have the same name.
    pub identity: (String, u64),
    /// Its path, as the kernel reports it.
    pub path: String,
    /// Bytes that are mapped.
    pub bytes: u64,
}

/// `7f0000000000-7f0008000000 r--p 00001000 fe:01 1234   /a/path with spaces`.
fn file(line: &str) -> Option<MappedFile> {
    let (mut words, mut rest) = ([""; 5], line);
    for word in &mut words {
        (*word, rest) = rest.trim_start().split_once(' ')?;
    }
    let [range, _, _, device, inode] = words;
    let (start, end) = range.split_once('-')?;
    let address = |text| u64::from_str_radix(text, 16).ok();
    let inode = inode.parse().ok().filter(|inode| *inode != 0)?;
    Some(MappedFile {
        identity: (device.to_owned(), inode),
        path: rest.trim_start().to_owned(),
        bytes: address(end)?.checked_sub(address(start)?)?,
    })
}

/// The mappings of files in `/proc/PID/maps`, by address.
pub fn mapped_files(text: &str) -> Vec<MappedFile> {
    text.lines().filter_map(file).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_mappings_of_files_are_returned_and_paths_may_have_spaces() {
        let text = "\
            55d0a8e00000-55d0a8e21000 r-xp 00001000 fe:01 1234                       /usr/bin/coppice\n\
            7f1240000000-7f1248000000 rw-p 00000000 00:00 0 \n\
            7f1248000000-7f1248200000 rw-p 00100000 fe:01 99 /disks/base,v1 .vhdx (deleted)\n\
            7ffc12345000-7ffc12366000 rw-p 00000000 00:00 0                          [stack]\n\
            not a mapping\n";
        let files = mapped_files(text);
        let found: Vec<_> = files
            .iter()
            .map(|file| (file.path.as_str(), file.identity.1, file.bytes))
            .collect();
        assert_eq!(
            found,
            [
                ("/usr/bin/coppice", 1234, 0x21000),
                ("/disks/base,v1 .vhdx (deleted)", 99, 2 << 20)
            ]
        );
    }
}
