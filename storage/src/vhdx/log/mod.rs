//! The log ([MS-VHDX] 2.3): a ring of entries that describe changes before they are made in place.
//!
//! [`sequence`] finds what a log says when a file is opened, [`writer`] appends to it, and [`entry`] is the form
//! that both agree on.

mod entry;
pub(super) mod sequence;
pub(super) mod writer;
