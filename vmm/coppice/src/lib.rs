//! What `coppice` does: [`run`] runs a guest to its end, [`gate`] is where the process of a daemon's guest waits
//! before, [`warm`] makes reference images of kernels, [`firecracker`] is what `coppice` does under that name,
//! [`command_line`] is where all of its programs begin.

pub mod command_line;
pub mod firecracker;
pub mod gate;
pub mod run;
pub mod warm;
