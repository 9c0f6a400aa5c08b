//! Files, read or mapped into guest memory.

use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::ops::Range;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;

use devices::GuestMemory;
use memshare::{PAGE_SIZE, SharedFile, SharedMemory, data_range};
use vm_memory::{Bytes, GuestAddress};

use super::BootError;
use super::elf::LoadSegment;

/// Opens a regular file for reading. Does not block if the path names a FIFO or a device.
pub(super) fn open_file(path: &Path, role: &'static str) -> Result<(File, u64), BootError> {
    let error = |action| {
        move |source| BootError::File {
            path: path.to_owned(),
            role,
            action,
            source,
        }
    };
    let file = File::options()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
        .map_err(error("open"))?;
    let metadata = file.metadata().map_err(error("read"))?;
    if !metadata.is_file() {
        return Err(BootError::NotAFile {
            path: path.to_owned(),
            role,
        });
    }
    Ok((file, metadata.len()))
}

/// Reads a range of a file into guest memory, except for its holes: RAM is zero before the guest runs, and a page that
/// is not written takes no memory of the host.
pub(super) fn copy(
    memory: &GuestMemory,
    path: &Path,
    role: &'static str,
    mut file: &File,
    segment: &LoadSegment,
) -> Result<(), BootError> {
    let error = |source| BootError::File {
        path: path.to_owned(),
        role,
        action: "read",
        source,
    };
    let mut at = segment.file_offset;
    while let Some(data) = data_range(file, at, segment.file_end()).map_err(error)? {
        file.seek(SeekFrom::Start(data.start)).map_err(error)?;
        let address = GuestAddress(segment.address_of(data.start));
        memory
            .read_exact_volatile_from(address, &mut file, (data.end - data.start) as usize)
            .map_err(|failed| error(std::io::Error::other(failed)))?;
        at = data.end;
    }
    Ok(())
}

/// Maps the whole pages of a range of an immutable file into guest memory, and reads the rest. Reads all of it where
/// the pages of the file are not aligned to the guest's.
pub(super) fn share(
    memory: &GuestMemory,
    shared: &SharedMemory,
    path: &Path,
    role: &'static str,
    shared_file: &Arc<SharedFile>,
    segment: &LoadSegment,
) -> Result<(), BootError> {
    let file = shared_file.file();
    let error = |source| BootError::File {
        path: path.to_owned(),
        role,
        action: "map",
        source,
    };
    let part = |range: Range<u64>| LoadSegment {
        file_offset: range.start,
        file_len: range.end - range.start,
        guest_address: GuestAddress(segment.address_of(range.start)),
        mem_len: range.end - range.start,
        ..*segment
    };
    let mut at = segment.file_offset;
    while let Some(data) = data_range(file, at, segment.file_end()).map_err(error)? {
        let start = data.start.next_multiple_of(PAGE_SIZE);
        let end = data.end / PAGE_SIZE * PAGE_SIZE;
        let address = segment.address_of(start);
        if start < end && address.is_multiple_of(PAGE_SIZE) {
            shared
                .map(address, end - start, shared_file, start)
                .map_err(error)?;
            copy(memory, path, role, file, &part(data.start..start))?;
            copy(memory, path, role, file, &part(end..data.end))?;
        } else {
            copy(memory, path, role, file, &part(data.clone()))?;
        }
        at = data.end;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn holes_of_the_file_are_not_read_into_memory() {
        let sparse = tempfile::tempfile().unwrap();
        sparse.write_all_at(b"head", 0).unwrap();
        sparse.write_all_at(b"tail", 1 << 20).unwrap();
        let mib = 1 << 20;
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 4 << 20)]).unwrap();
        let path = Path::new("sparse");
        let segment = LoadSegment {
            file_offset: 0,
            file_len: mib + 4,
            guest_address: GuestAddress(mib),
            mem_len: mib + 4,
            is_writable: true,
        };
        copy(&memory, path, "kernel", &sparse, &segment).unwrap();
        let (head, tail) = (GuestAddress(mib), GuestAddress(2 * mib));
        assert_eq!(&memory.read_obj::<[u8; 5]>(head).unwrap(), b"head\0");
        assert_eq!(&memory.read_obj::<[u8; 4]>(tail).unwrap(), b"tail");
        let too_long = LoadSegment {
            file_len: mib + 5,
            ..segment
        };
        // The end of the file is treated as a hole, because segments were checked against the file's length before.
        copy(&memory, path, "kernel", &sparse, &too_long).unwrap();
    }
}
