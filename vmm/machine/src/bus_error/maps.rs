//! What is mapped at an address. The kernel is asked, because the tables of this process are under locks that the
//! stopped thread may hold.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use memshare::PAGE_SIZE;

/// A page of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Mapping {
    pub(super) path: PathBuf,
    /// Where the page begins in the file, in bytes.
    pub(super) offset: u64,
    inode: u64,
}

impl Mapping {
    /// Length of the file, if its name still leads to it.
    pub(super) fn file_len(&self) -> Option<u64> {
        let metadata = std::fs::metadata(&self.path).ok()?;
        (metadata.ino() == self.inode).then_some(metadata.len())
    }
}

/// The file's page at an address of this process.
pub(super) fn of_process(address: usize) -> Option<Mapping> {
    let maps = BufReader::new(File::open("/proc/self/maps").ok()?);
    let mut lines = maps.lines().map_while(Result::ok);
    lines.find_map(|line| parse(&line, address as u64))
}

/// The file's page at an address, where a line is about it: `start-end perms offset dev inode path` (proc(5)).
fn parse(line: &str, address: u64) -> Option<Mapping> {
    let hexadecimal = |text| u64::from_str_radix(text, 16).ok();
    let (range, rest) = line.split_once(' ')?;
    let (start, end) = range.split_once('-')?;
    let (start, end) = (hexadecimal(start)?, hexadecimal(end)?);
    if !(start..end).contains(&address) {
        return None;
    }
    let mut fields = rest.splitn(5, ' ');
    let (_, offset, _, inode) = (
        fields.next()?,
        fields.next()?,
        fields.next()?,
        fields.next()?,
    );
    let path = fields.next()?.trim_start();
    let page = (address - start) / PAGE_SIZE * PAGE_SIZE;
    path.starts_with('/').then_some(Mapping {
        path: path.into(),
        offset: hexadecimal(offset)?.checked_add(page)?,
        inode: inode.parse().ok()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_gives_the_files_page_and_other_memory_gives_none() {
        let file = "7f0000002000-7f0000006000 rw-p 00003000 fe:01 1234       /disks/a b.raw";
        let expected = Mapping {
            path: "/disks/a b.raw".into(),
            offset: 0x5000,
            inode: 1234,
        };
        assert_eq!(parse(file, 0x7f00_0000_4abc), Some(expected));
        assert_eq!(parse(file, 0x7f00_0000_6000), None);
        for line in [
            "7f0000002000-7f0000006000 rw-p 00000000 00:00 0",
            "7f0000002000-7f0000006000 rw-p 00000000 00:00 0          [heap]",
            "7f0000002000-7f0000006000",
            "",
        ] {
            assert_eq!(parse(line, 0x7f00_0000_4abc), None, "{line}");
        }
    }
}
