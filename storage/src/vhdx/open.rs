//! Opening a file: all is checked before anything is written.

use std::path::Path;
use std::sync::{Mutex, atomic::AtomicU64};

use super::bat::{self, Layout};
use super::commit::Commit;
use super::disk::{State, Vhdx};
use super::format::Guid;
use super::header::{self, Headers};
use super::log::sequence;
use super::metadata::Metadata;
use super::pages::Pages;
use super::region::{Region, Regions};
use super::space::Space;
use super::view::View;
use crate::disk::{DiskError, Geometry, SectorSize};
use crate::lock::OpenMode;
use crate::medium::Medium;
use crate::open::{OpenError, Refusal, open_locked};

impl Vhdx {
    /// Opens and locks the VHDX at `path`. A log that has to be replayed is replayed into the file where that is opened for
    /// writing; apart from that nothing is written.
    ///
    /// # Errors
    /// See [`Refusal`].
    pub fn open(path: impl AsRef<Path>, mode: OpenMode) -> Result<Self, OpenError> {
        let path = path.as_ref();
        open_locked(path, mode)
            .and_then(|file| Self::from_medium(Box::new(file), mode))
            .map_err(|reason| OpenError::new(path, reason))
    }

    /// Opens the VHDX in a file that is open and locked for `mode`.
    pub(crate) fn from_medium(medium: Box<dyn Medium>, mode: OpenMode) -> Result<Self, Refusal> {
        let file_len = medium
            .len()
            .map_err(|e| Refusal::io("read the length", e))?;
        if file_len == 0 {
            return Err(Refusal::Empty);
        }
        header::check_identifier(&*medium).map_err(|e| truncated(e, file_len))?;
        let mut headers = Headers::read(&*medium, file_len)?;
        let log = Region {
            offset: headers.current().log_offset,
            length: headers.current().log_length,
        };
        let log_guid = headers.current().log_guid;

        let mut view = View::new(medium, file_len);
        if log_guid != Guid::ZERO {
            let read = |buffer: &mut [u8], offset| view.medium.read_exact_at(buffer, offset);
            let replay = sequence::read(&read, log, log_guid, file_len)?;
            view.lay_over(replay.patches, replay.len);
        }
        let read = |buffer: &mut [u8], offset| view.read(buffer, offset);
        let regions = Regions::read(&read, log, view.len())?;
        let metadata = Metadata::read(&read, regions.metadata)?;
        let layout = Layout::new(&metadata, regions.bat)?;
        let end = bat::check(&view, &layout, &regions.all)?;

        if mode.is_read_only() {
            check_payload_untouched(&view, &regions)?;
        } else {
            headers.check_room()?;
            if log_guid != Guid::ZERO {
                replay(&mut view, &mut headers)?;
            }
        }
        tracing::debug!(
            size = metadata.size,
            block_size = metadata.block_size,
            fixed = metadata.fixed,
            id = %metadata.id,
            data_write_guid = %headers.current().data_write_guid,
            "opened a VHDX"
        );
        Ok(Self {
            geometry: Geometry {
                size: metadata.size,
                logical_sector: metadata.logical_sector,
                physical_sector: metadata.physical_sector,
                // What the file system frees under a part of a block.
                discard_granularity: SectorSize::B4096.bytes(),
                read_only: mode.is_read_only(),
            },
            held: if mode.is_read_only() {
                file_len
            } else {
                u64::MAX
            },
            fixed: metadata.fixed,
            view,
            layout,
            state: Mutex::new(State {
                pages: Pages::default(),
                space: Space::after(end),
                announced: false,
                poisoned: false,
                unsynced: false,
            }),
            growth: Mutex::new(()),
            commit: Mutex::new(Commit {
                headers,
                log: None,
                damaged_region_table: regions.damaged_copy,
                flushed: 0,
            }),
            flushes: AtomicU64::new(0),
        })
    }
}

/// A short file ends inside a structure; say that rather than what the read said.
fn truncated(refusal: Refusal, file_len: u64) -> Refusal {
    match refusal {
        Refusal::Io { error, .. } if error.kind() == std::io::ErrorKind::UnexpectedEof => {
            Refusal::corrupt(
                "file identifier",
                0,
                format!("expected \"vhdxfile\", found a file of {file_len} bytes"),
            )
        }
        other => other,
    }
}

/// Payload of a file that is read goes past the view, so the log must have nothing to say about it.
fn check_payload_untouched(view: &View, regions: &Regions) -> Result<(), Refusal> {
    let first_mib = Region {
        offset: 0,
        length: super::format::MIB,
    };
    for patch in view.patches() {
        let inside =
            |region: &Region| region.offset <= patch.offset() && patch.end() <= region.end();
        if !inside(&first_mib) && !regions.all.iter().any(inside) {
            return Err(Refusal::Unsupported(format!(
                "the log changes the payload at file offset {:#x}; open the file once for writing to replay it",
                patch.offset()
            )));
        }
    }
    Ok(())
}

/// Replays the log into the file. The identifier of the log goes only when all is durable.
fn replay(view: &mut View, headers: &mut Headers) -> Result<(), Refusal> {
    tracing::info!(
        changes = view.patches().len(),
        "replaying the log of a VHDX that was not closed"
    );
    view.write_out()
        .map_err(|e| Refusal::io("replay the log", e))?;
    let file_write_guid = Guid::random();
    for _ in 0..2 {
        headers
            .update(&*view.medium, |header| {
                header.log_guid = Guid::ZERO;
                header.file_write_guid = file_write_guid;
            })
            .map_err(|e| match e {
                DiskError::Io { operation, source } => Refusal::io(operation, source),
                other => Refusal::Unsupported(other.to_string()),
            })?;
    }
    Ok(())
}
