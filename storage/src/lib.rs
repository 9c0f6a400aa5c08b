//! Virtual disks.
//!
//! The crate separates *where* from *how*. A [`Disk`] says where the bytes of a range of the virtual disk
//! lie: it resolves the range to [`Extent`]s of its files, allocating for a write. An engine ([`io`]) moves
//! the bytes between those extents and the caller's buffers. One answer of `resolve` serves a guest's
//! request, a conversion tool and a memory mapping alike.
//!
//! The crate knows nothing of KVM or virtio.

pub mod alignment;
pub mod blocking;
pub mod convert;
mod disk;
mod domain;
mod file;
pub mod foreign;
#[cfg(feature = "fuzzing")]
pub mod fuzzing;
mod guid;
pub mod io;
pub mod lock;
mod medium;
mod open;
mod options;
mod progress;
mod raw;
mod refusal;
mod signature;
pub mod vhdx;

pub use disk::{
    ByteRange, Disk, DiskError, Extent, ExtentKind, ExtentState, Geometry, Mapping, RequestId,
    SectorSize,
};
pub use domain::Domain;
pub use lock::OpenMode;
pub use open::{detect, open, remeasure};
pub use options::{FileKinds, Format, OpenOptions, Parents};
pub use progress::{Progress, Unwatched};
pub use refusal::{OpenError, ParentRefusal, Refusal};
