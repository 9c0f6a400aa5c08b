//! Raw disks: the file is the disk.
//!
//! A block device of the host can be one, where that is asked for. Programs that use a device do not look at the locks
//! here, so its bytes count as those that others may change: no page of it is shared.

use std::fs::File;
use std::sync::Arc;

use crate::disk::{
    ByteRange, Disk, DiskError, Extent, ExtentKind, ExtentState, Geometry, Mapping, RequestId,
    SectorSize,
};
use crate::lock::OpenMode;
use crate::medium::{Holes, Medium, is_block_device, make_zero};
use crate::refusal::Refusal;
use crate::signature;

/// An open raw disk. Sectors of 512 bytes, as no file says otherwise.
#[derive(Debug)]
pub(crate) struct Raw {
    file: Arc<File>,
    is_block_device: bool,
    geometry: Geometry,
    /// Where the sectors begin, in order, that must not come to hold the signature of another format: whoever opened
    /// the disk guessed that it is raw and will guess again, and the guest that writes it would choose the answer.
    guarded: Vec<u64>,
}

impl Raw {
    /// A disk over a file that is open and locked for `mode`.
    pub(crate) fn new(file: Arc<File>, mode: OpenMode) -> Result<Self, Refusal> {
        let size = Medium::len(&file).map_err(|error| Refusal::io("read the length", error))?;
        let sector = SectorSize::B512;
        if size == 0 {
            return Err(Refusal::Empty);
        }
        if !size.is_multiple_of(u64::from(sector.bytes())) {
            return Err(Refusal::RawSize { size });
        }
        Ok(Self {
            is_block_device: is_block_device(&file),
            file,
            geometry: Geometry {
                size,
                logical_sector: sector,
                // What nearly every host file system allocates in.
                physical_sector: SectorSize::B4096,
                discard_granularity: SectorSize::B4096.bytes(),
                read_only: mode.is_read_only(),
            },
            guarded: Vec::new(),
        })
    }

    /// The same disk, with the size that its file has now.
    pub(crate) fn remeasured(&self) -> Result<Self, Refusal> {
        let mode = if self.geometry.read_only {
            OpenMode::ReadOnly
        } else {
            OpenMode::ReadWrite
        };
        let disk = Self::new(self.file.clone(), mode)?;
        Ok(if self.guarded.is_empty() {
            disk
        } else {
            disk.guessed()
        })
    }

    /// The same disk, whose format was guessed: it refuses writes after which the guess would be another one.
    pub(crate) fn guessed(self) -> Self {
        Self {
            guarded: signature::marked_sectors(self.geometry.size),
            ..self
        }
    }

    fn extent(&self, range: ByteRange, out: &mut Vec<Extent>) -> Result<(), DiskError> {
        self.geometry.check(range)?;
        if !range.is_empty() {
            out.push(Extent {
                offset: range.offset(),
                len: range.len(),
                kind: ExtentKind::Data {
                    file: Arc::clone(&self.file),
                    file_offset: range.offset(),
                },
            });
        }
        Ok(())
    }

    fn check_write(&self, range: ByteRange) -> Result<(), DiskError> {
        if self.geometry.read_only {
            return Err(DiskError::ReadOnly);
        }
        self.geometry.check(range)
    }
}

impl Disk for Raw {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn resolve_read(
        &self,
        range: ByteRange,
        out: &mut Vec<Extent>,
    ) -> Result<RequestId, DiskError> {
        self.extent(range, out)?;
        Ok(RequestId::new(0))
    }

    fn resolve_write(
        &self,
        range: ByteRange,
        out: &mut Vec<Extent>,
    ) -> Result<RequestId, DiskError> {
        self.check_write(range)?;
        self.extent(range, out)?;
        Ok(RequestId::new(0))
    }

    fn inspected(&self, range: ByteRange) -> Vec<ByteRange> {
        let sector = u64::from(self.geometry.logical_sector.bytes());
        self.guarded
            .iter()
            .filter(|offset| (range.offset()..range.end()).contains(*offset))
            .filter_map(|offset| ByteRange::new(*offset, sector))
            .collect()
    }

    fn inspect(&self, sector: ByteRange, bytes: &[u8]) -> Result<(), DiskError> {
        match signature::recognise_sector(self.geometry.size, sector.offset(), bytes) {
            Some(name) => Err(DiskError::Disguise {
                offset: sector.offset(),
                name,
            }),
            None => Ok(()),
        }
    }

    fn finish(&self, _id: RequestId, _ok: bool) {}

    fn is_immutable(&self, file: &Arc<File>) -> bool {
        self.geometry.read_only && !self.is_block_device && Arc::ptr_eq(&self.file, file)
    }

    fn files(&self) -> Vec<Arc<File>> {
        vec![self.file.clone()]
    }

    fn map(&self, range: ByteRange, out: &mut Vec<Mapping>) -> Result<(), DiskError> {
        self.geometry.check(range)?;
        let mut at = range.offset();
        while at < range.end() {
            let failed = |source| DiskError::Io {
                operation: format!("look for holes from {at:#x}"),
                source,
            };
            let data = self.file.next_data(at).map_err(failed)?;
            let (end, state) = match data.map(|data| data.min(range.end())) {
                Some(data) if data == at => {
                    let hole = self.file.next_hole(at).map_err(failed)?;
                    (hole.clamp(at + 1, range.end()), ExtentState::Mapped)
                }
                Some(data) => (data, ExtentState::Transparent),
                None => (range.end(), ExtentState::Transparent),
            };
            out.push(Mapping {
                offset: at,
                len: end - at,
                state,
                layer: 0,
                file_offset: (state == ExtentState::Mapped).then_some(at),
            });
            at = end;
        }
        Ok(())
    }

    fn flush_by_sync(&self) -> Option<Arc<File>> {
        Some(Arc::clone(&self.file))
    }

    fn flush(&self) -> Result<(), DiskError> {
        if self.geometry.read_only {
            return Ok(());
        }
        self.file.sync_data().map_err(|source| DiskError::Io {
            operation: "sync the file".into(),
            source,
        })
    }

    fn discard(&self, range: ByteRange) -> Result<(), DiskError> {
        self.check_write(range)?;
        if range.is_empty() {
            return Ok(());
        }
        // A file system that cannot give space back leaves the bytes as they are, which a discard may.
        self.file
            .punch_hole(range.offset(), range.len())
            .map(drop)
            .map_err(|source| DiskError::Io {
                operation: format!("punch a hole at {:#x}+{:#x}", range.offset(), range.len()),
                source,
            })
    }

    fn write_zeroes(&self, range: ByteRange, may_unmap: bool) -> Result<(), DiskError> {
        self.check_write(range)?;
        make_zero(&self.file, range.offset(), range.len(), may_unmap)
    }

    fn close(&self) -> Result<(), DiskError> {
        self.flush()
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::fs::FileExt;

    use super::*;

    fn disk(mode: OpenMode) -> (Raw, Arc<File>) {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&vec![7; 65536]).unwrap();
        let file = Arc::new(file);
        (Raw::new(Arc::clone(&file), mode).unwrap(), file)
    }

    fn bytes(file: &File) -> Vec<u8> {
        let mut all = vec![0; 65536];
        file.read_exact_at(&mut all, 0).unwrap();
        all
    }

    #[test]
    fn a_range_is_one_extent_of_the_file() {
        let (disk, _) = disk(OpenMode::ReadWrite);
        let mut out = Vec::new();
        let read = disk
            .resolve_read(ByteRange::new(512, 1024).unwrap(), &mut out)
            .unwrap();
        let written = disk
            .resolve_write(ByteRange::new(4096, 512).unwrap(), &mut out)
            .unwrap();
        disk.finish(read, true);
        disk.finish(written, true);
        assert_eq!(out.len(), 2);
        assert!(matches!(
            out[0],
            Extent {
                offset: 512,
                len: 1024,
                kind: ExtentKind::Data {
                    file_offset: 512,
                    ..
                }
            }
        ));
        assert!(matches!(
            out[1],
            Extent {
                offset: 4096,
                len: 512,
                kind: ExtentKind::Data {
                    file_offset: 4096,
                    ..
                }
            }
        ));
    }

    #[test]
    fn ranges_outside_or_off_the_sectors_are_refused() {
        let (disk, _) = disk(OpenMode::ReadWrite);
        for (offset, len) in [
            (65536, 512),
            (0, 66048),
            (1, 512),
            (0, 100),
            (u64::MAX - 511, 511),
        ] {
            let range = ByteRange::new(offset, len).unwrap();
            assert!(matches!(
                disk.resolve_read(range, &mut Vec::new()),
                Err(DiskError::Range { .. })
            ));
            assert!(matches!(disk.discard(range), Err(DiskError::Range { .. })));
        }
    }

    #[test]
    fn zeroed_and_discarded_ranges_read_as_zeros_and_leave_their_neighbours() {
        let (disk, file) = disk(OpenMode::ReadWrite);
        disk.write_zeroes(ByteRange::new(512, 1024).unwrap(), false)
            .unwrap();
        disk.write_zeroes(ByteRange::new(8192, 8192).unwrap(), true)
            .unwrap();
        disk.discard(ByteRange::new(32768, 4096).unwrap()).unwrap();
        let mut expected = vec![7; 65536];
        expected[512..1536].fill(0);
        expected[8192..16384].fill(0);
        expected[32768..36864].fill(0);
        assert_eq!(bytes(&file), expected);
    }

    #[test]
    fn a_disk_open_for_reading_takes_no_write() {
        let (disk, file) = disk(OpenMode::ReadOnly);
        let range = ByteRange::new(0, 512).unwrap();
        assert!(matches!(
            disk.resolve_write(range, &mut Vec::new()),
            Err(DiskError::ReadOnly)
        ));
        assert!(matches!(disk.discard(range), Err(DiskError::ReadOnly)));
        assert!(matches!(
            disk.write_zeroes(range, true),
            Err(DiskError::ReadOnly)
        ));
        assert_eq!(bytes(&file), vec![7; 65536]);
    }
}
