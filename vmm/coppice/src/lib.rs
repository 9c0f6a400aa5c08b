//! What `coppice` does: [`run`] runs a guest to its end, [`warm`] makes reference images of kernels, [`command_line`]
//! is where all of its programs begin.

pub mod command_line;
pub mod run;
pub mod warm;
