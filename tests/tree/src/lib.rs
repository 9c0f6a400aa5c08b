//! Checks that the workspace is a tree, and what `rustfmt` does not check of its comments.
//!
//! [`crates`] holds which crate may use which. Within a crate, [`source`] reads the modules, [`imports`] follows every
//! path to the module that defines what it names, and [`circles`] finds modules that use each other in a circle.
//! [`uncut`] lists those that are still to be cut. [`comments`] keeps comments narrow enough to be read.

pub mod circles;
pub mod comments;
pub mod crates;
pub mod imports;
pub mod module;
mod paths;
pub mod source;
pub mod uncut;
