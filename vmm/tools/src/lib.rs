//! The commands of `coppice` that run no guest: virtual disks, a view of all guests, an examination of the host, and
//! man pages and completions of the command line.
//!
//! None of it is part of a guest's process: it is linked into a program of its own, `coppice-tools`, which `coppice`
//! executes.

pub mod disk_tool;
pub mod doctor;
pub mod pages;
pub mod top;
